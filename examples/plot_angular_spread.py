"""Draw how the rows of a model's STEM tables are spread over directions, beside random rows.

    python examples/plot_angular_spread.py MODEL --output spread.png

One histogram of cosines between rows for each STEM layer, over the density that isotropic rows of the same width have.
Needs matplotlib.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from transformers import AutoModelForCausalLM

from hf_efficient import stem_angular_spread
from hf_efficient.editing.stem_analysis import AngularSpread

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (after the backend is chosen)


def plot_angular_spread(spreads: Sequence[AngularSpread], path: str | Path, title: str = "") -> None:
    """Draw the cosines of each table as a histogram over the density that isotropic rows have; writes a PNG."""
    columns = min(len(spreads), 5)
    lines = -(-len(spreads) // columns)
    size = (2.6 * columns + 0.6, 2.3 * lines + 0.5)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained", sharex=True)
    reach = max(float(s.cosines.abs().quantile(0.995)) for s in spreads) if spreads else 1.0
    grid = torch.linspace(-reach, reach, 401)
    for axis in axes.flat[len(spreads) :]:
        axis.set_axis_off()
    for axis, spread in zip(axes.flat, spreads, strict=False):
        axis.hist(spread.cosines.numpy(), 61, range=(-reach, reach), density=True, color="tab:blue")
        # Cosines of random directions in F dimensions are normal to within 1/F.
        density = (-0.5 * (grid / spread.baseline_std) ** 2).exp() / (spread.baseline_std * math.sqrt(2 * math.pi))
        axis.plot(grid.numpy(), density.numpy(), color="black", linewidth=1, label="random rows")
        axis.set_title(
            f"layer {spread.layer}: std {spread.std:.3f} (random {spread.baseline_std:.3f})\n"
            f"mean {spread.mean:+.3f}, directions {spread.participation_ratio:.0f} "
            f"(random {spread.baseline_participation:.0f})",
            fontsize=7,
        )
        axis.set_yticks([])
        axis.tick_params(labelsize=7)
    axes[0, 0].legend(fontsize=7, loc="upper right")
    figure.suptitle(title or "cosines between rows of a table", fontsize=9)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a STEM checkpoint")
    parser.add_argument("--output", type=Path, default=Path("angular_spread.png"), help="PNG to write")
    parser.add_argument("--layers", type=int, nargs="+", help="STEM layers; all by default")
    parser.add_argument("--center", action="store_true", help="subtract the mean row first")
    parser.add_argument("--title", default="")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    layers = arguments.layers or model.config.stem_layers
    spreads = [stem_angular_spread(model, layer, center=arguments.center) for layer in layers]
    for spread in spreads:
        print(f"layer {spread.layer}: standard deviation {spread.std:.4f}, of random rows {spread.baseline_std:.4f}")
    plot_angular_spread(spreads, arguments.output, arguments.title)


if __name__ == "__main__":
    main()
