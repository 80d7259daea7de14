"""Pictures of results: for each mode, the share of the copy bandwidth that each provider reaches, case by case."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any


def load_pyplot() -> Any:
    """matplotlib.pyplot, drawing to files; None, with a line that says so, where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        print('The picture needs matplotlib: pip install "hf-efficient[bench]"', flush=True)
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(lines: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the lines of one results file to a PNG."""
    pyplot = load_pyplot()
    if pyplot is None:
        return

    modes = list(dict.fromkeys(line["mode"] for line in lines))
    providers = list(dict.fromkeys(line["provider"] for line in lines))
    most_cases = max(len({line["case"] for line in lines if line["mode"] == mode}) for mode in modes)
    size = (max(11, 0.9 * most_cases), 3.6 * len(modes))
    figure, axes = pyplot.subplots(len(modes), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, mode in zip(axes[:, 0], modes, strict=True):
        cases = list(dict.fromkeys(line["case"] for line in lines if line["mode"] == mode))
        width = 0.8 / len(providers)
        for number, provider in enumerate(providers):
            found = {line["case"]: line for line in lines if line["mode"] == mode and line["provider"] == provider}
            lines_here = [found.get(case, {}) for case in cases]
            shares = [100 * (line.get("of_copy") or 0) for line in lines_here]
            launched = [
                share * line["ms"] / line["ms_launched"] if share else 0
                for share, line in zip(shares, lines_here, strict=True)
            ]
            places = [place + (number - (len(providers) - 1) / 2) * width for place in range(len(cases))]
            bars = axis.bar(places, shares, width, label=provider)
            labels = [
                f"{1e3 * line['ms']:.{0 if line['ms'] > 0.1 else 1}f}" if line.get("ms") else "–" for line in lines_here
            ]
            axis.bar_label(bars, labels, fontsize=7, padding=1)
            axis.scatter(places, launched, marker="_", s=90, color="black", zorder=3)
        axis.set_xticks(range(len(cases)), cases, fontsize=8, rotation=20, ha="right")
        axis.axhline(100, color="grey", linewidth=0.8)
        axis.set_ylabel("% of copy bandwidth")
        axis.set_title(f"{mode} (over the bars: microseconds; black: called one by one from Python)", fontsize=10)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    first = lines[0]
    figure.suptitle(f"{title}\n{first['device']}, torch {first['torch']}, triton {first['triton']}", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
