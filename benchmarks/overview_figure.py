"""Draw docs/figures/overview.png, the README's figure: speed and quality of each architecture, losing cases included.

    python -m benchmarks.overview_figure

Every number is read from `benchmarks/results/` or from a page of `docs/`; one that is not found there is an error.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.plot import load_pyplot

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SPEED_FILES = (
    *("generation.jsonl", "stem_train.jsonl", "stem_offload.jsonl", "bhyt_train.jsonl", "bhyt_decode.jsonl"),
    *("topology_generation.jsonl", "topology_attention.jsonl"),
)
BETTER, EQUAL, WORSE = "#00798c", "#6b7280", "#c2410c"
GROUPS = {
    "none": "Stock decoder  --patch none",
    "stem": "STEM  --patch stem",
    "bhyt": "BHyT  --patch bhyt",
    "topology": "Multiverse, MedVerse  --patch multiverse",
}


@dataclass(frozen=True)
class Row:
    """One line of the figure.

    Attributes:
        group: key of `GROUPS`.
        label: what was measured.
        against: what it is compared with.
        value: a ratio of times (above 1: faster), or a difference of losses in nats (below 0: better).
        text: the value as it is printed.
        interval: 95 % confidence, where it was measured.
    """

    group: str
    label: str
    against: str
    value: float
    text: str
    interval: tuple[float, float] | None = None


def read_lines(name: str) -> list[dict[str, Any]]:
    """The lines of a results file."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line]


def one(lines: list[dict[str, Any]], **wanted: object) -> dict[str, Any]:
    """The one line with these values; `ValueError` when there is none, or more than one."""
    found = [line for line in lines if all(line.get(key) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} lines with {wanted}, not one")
    return found[0]


def quote(page: str, pattern: str) -> list[float]:
    """The numbers that the groups of `pattern` match on a page of docs/; `ValueError` when the page lacks them."""
    found = re.search(pattern, (ROOT / "docs" / page).read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"docs/{page} has no {pattern!r}")
    return [float(number) for number in found.groups()]


def speed(group: str, label: str, against: str, theirs: float, ours: float) -> Row:
    """A row of how many times faster `ours` is than `theirs`, both times."""
    return Row(group, label, against, theirs / ours, f"{theirs / ours:.2f} ×")


def speed_rows() -> Iterator[Row]:
    """Ratios of times, all from results files."""
    generation = read_lines("generation.jsonl")
    compiled = "transformers, compiled"
    for batch in (1, 32):
        theirs, ours = (
            one(generation, part="generate", batch=batch, provider=provider)["ms"]
            for provider in ("transformers static", "hf_efficient")
        )
        yield speed("none", f"generate, batch {batch}", compiled, theirs, ours)
    for batch, context in ((8, 8192), (1, 1024)):
        theirs, ours = (
            one(generation, part="prefill", batch=batch, context=context, provider=provider)["ms"]
            for provider in ("transformers eager", "hf_efficient")
        )
        label = f"prefill, {context:,} tokens, batch {batch}"
        yield speed("none", label, "transformers, default", theirs, ours)
    theirs, ours = (
        one(generation, part="generate", batch=1, provider=provider)["first_tokens_s"]
        for provider in ("transformers eager", "hf_efficient")
    )
    yield speed("none", "first call: kernels compile", "transformers, default", theirs, ours)

    training = [line for line in read_lines("stem_train.jsonl") if line["part"] == "step"]
    # The file has each name twice: bfloat16 first, then float32 under autocast.
    bfloat16 = {line["name"]: line["ms"] for line in reversed(training)}
    dense = bfloat16["dense SwiGLU, compiled, fused AdamW"]
    sparse = bfloat16["STEM, sparse gradients, RowSparseAdamW"]
    yield speed("stem", "training an FFN, sparse gradients", "dense SwiGLU, compiled", dense, sparse)
    whole = bfloat16["STEM, dense gradients, fused AdamW"]
    yield speed("stem", "training an FFN, dense gradients", "dense SwiGLU, compiled", dense, whole)
    offload = read_lines("stem_offload.jsonl")
    resident, host = (one(offload, part="decode", batch=1, variant=name)["ms"] for name in ("resident", "host"))
    saved = [one(offload, part="memory", variant=name)["device_gb"] for name in ("resident", "host")]
    against = "on GPU; {:.1f} → {:.1f} GB".format(*saved)
    yield speed("stem", "decoding, tables in host memory", against, resident, host)

    training = read_lines("bhyt_train.jsonl")
    for label, against, theirs, ours in (
        ("training step", "transformers' RMSNorm", "stock", "ours, BHyT exact"),
        ("training step", "Liger's fused RMSNorm", "stock's decoder, Liger", "stock's decoder, BHyT exact"),
    ):
        times = [one(training, part="eager", provider=provider)["ms"] for provider in (theirs, ours)]
        yield speed("bhyt", label, against, times[0], times[1])
    decoding = read_lines("bhyt_decode.jsonl")
    times = [one(decoding, provider=provider)["ms"] for provider in ("ours, RMSNorm", "ours, BHyT exact")]
    yield speed("bhyt", "decoding step", "our fused RMSNorm", times[0], times[1])

    generation = read_lines("topology_generation.jsonl")
    for case, label in (
        ("A: 8 paths of 1024", "generate, 8 paths of 1,024 tokens"),
        ("C: 6 steps of 96", "generate, MedVerse, 6 steps of 96"),
        ("1 paths of 256", "generate, text that does not fork"),
    ):
        ratio = one(generation, model="1b", case=case, batch=1)["speedup"]
        yield Row("topology", label, "sequential, captured", ratio, f"{ratio:.2f} ×")
    attention = read_lines("topology_attention.jsonl")
    for case, label, peer, against in (
        ("16k, 8 paths", "attention fwd+bwd, 8 paths, 16k", "flex", "FlexAttention"),
        ("8k, 2 paths", "attention fwd+bwd, 2 paths, 8k", "causal, cuDNN", "causal, cuDNN"),
    ):
        theirs, ours = (
            one(attention, part="attention", case=case, mode="forward+backward", provider=provider)["ms"]
            for provider in (peer, "hf_efficient")
        )
        yield speed("topology", label, against, theirs, ours)


def quality_rows() -> Iterator[Row]:
    """Differences of the loss in nats: from the source after a conversion, or from a dense model trained alike."""
    source = "source; per token"
    (bound,) = quote("decoder.md", r"same logits \(within 1e-(\d)")
    yield Row("none", "converted", source, 0.0, f"0 (logits within 1e-{bound:.0f})")

    value, low, high = quote("conversion.md", r"Δ nll +([\d.]+)  \[([\d.]+), ([\d.]+)\]")
    yield Row("stem", "converted, 5 of 30 layers", source, value, f"+{value:.2f}", (low, high))
    value, low, high = quote("stem.md", r"([\d.]+) nats of loss \[([\d.]+), ([\d.]+)\]")
    yield Row("stem", "converted, 10 of 30 layers", source, value, f"+{value:.2f}", (low, high))
    models = json.loads((RESULTS / "stem_from_scratch.json").read_text(encoding="utf-8"))["levels"]["bpe"]["models"]
    value = mean(run["best"] for run in models["STEM, same FLOPs"]["runs"])
    value -= mean(run["best"] for run in models["dense"]["runs"])
    yield Row("stem", "from scratch, BPE, equal FLOPs", "dense; per byte", value, f"{value:+.2f}".replace("-", "−"))

    for label, pattern, digits in (
        ("converted, default", r"\| lossless[^|]*\|[^|]*\| ([\d.]+) \[([\d.]+), ([\d.]+)\]", 5),
        ("converted, bounded", r"\| bounded[^|]*\|[^|]*\| ([\d.]+) \[([\d.]+), ([\d.]+)\]", 2),
    ):
        value, low, high = (math.log(ratio) for ratio in quote("bhyt.md", pattern))
        yield Row("bhyt", label, source, value, f"+{value:.{digits}f}", (low, high))
    study = json.loads((RESULTS / "bhyt_depth_study.json").read_text(encoding="utf-8"))["depths"]["16"]
    value = study["BHyT (2, 1)"]["runs"][0]["nll_per_byte"][-1] - study["RMSNorm"]["runs"][0]["nll_per_byte"][-1]
    yield Row("bhyt", "from scratch, first 200 steps", "RMSNorm; per byte", value, f"+{value:.2f}")

    (bound,) = quote("topology.md", r"up to 3e-(\d) on a CPU")
    yield Row("topology", "converted, before fine-tuning", source, 0.0, f"0 (logits within 3e-{bound:.0f})")


def colour_of(gain: float) -> str:
    """The colour of a gain: a ratio's logarithm, or what a loss goes down by. Below 1.5 % nothing is claimed."""
    return EQUAL if abs(gain) < 0.015 else BETTER if gain > 0 else WORSE


def draw_panel(axis: Any, rows: list[Row], neutral: float, is_ratio: bool) -> None:
    """A group of rows for each architecture, from top to bottom; a dot for each value, joined to the neutral line."""
    place, places = 0.0, []
    for group, title in GROUPS.items():
        name, flag = title.split("  ")
        axis.text(-0.52, place, name, transform=axis.get_yaxis_transform(), fontweight="bold", va="center", fontsize=9)
        axis.text(0.0, place, f" {flag}", transform=axis.get_yaxis_transform(), va="center", fontsize=8, color=EQUAL)
        place += 1
        for row in (row for row in rows if row.group == group):
            colour = colour_of(math.log(row.value) if is_ratio else -row.value)
            axis.plot([neutral, row.value], [place, place], color=colour, linewidth=2, solid_capstyle="butt", zorder=2)
            axis.plot([row.value], [place], "o", color=colour, markersize=6, zorder=3)
            if row.interval:
                axis.plot(row.interval, [place, place], color=colour, linewidth=5, alpha=0.3, zorder=1)
            below = row.value < neutral
            edge = (min if below else max)(row.value, *(row.interval or (row.value,)))
            offset = (-7, 0) if below else (7, 0)
            axis.annotate(
                row.text,
                (edge, place),
                offset,
                textcoords="offset points",
                ha="right" if below else "left",
                va="center",
                fontsize=9,
                color=colour,
                fontweight="bold",
            )
            axis.text(-0.51, place, row.label, transform=axis.get_yaxis_transform(), va="center", fontsize=9)
            axis.text(
                1.01,
                place,
                f"vs {row.against}",
                transform=axis.get_yaxis_transform(),
                va="center",
                fontsize=8.5,
                color=EQUAL,
            )
            places.append(place)
            place += 1
        place += 0.3
    axis.axvline(neutral, color="#374151", linewidth=1, zorder=1)
    axis.set_ylim(place - 0.5, -0.7)
    axis.set_yticks([])
    for side in ("left", "right", "top"):
        axis.spines[side].set_visible(False)
    axis.grid(axis="x", color="#e5e7eb", linewidth=0.7, zorder=0)
    axis.tick_params(axis="x", labelsize=8.5, length=0)


def draw(path: Path) -> None:
    """Draw the figure to a PNG, 1,600 pixels wide, in 64 colours (which halves the file)."""
    pyplot = load_pyplot()
    if pyplot is None:
        return
    from PIL import Image  # matplotlib requires it

    devices = {line["device"] for name in SPEED_FILES for line in read_lines(name)} - {"cpu"}
    faster, better = list(speed_rows()), list(quality_rows())
    heights = [len(rows) + 1.3 * len(GROUPS) for rows in (faster, better)]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 9.2), gridspec_kw={"height_ratios": heights})
    figure.subplots_adjust(left=0.295, right=0.755, top=0.935, bottom=0.075, hspace=0.24)

    draw_panel(above, faster, 1.0, True)
    above.set_xscale("log")
    above.set_xlim(0.045, 16)
    ticks = (0.1, 0.5, 1, 2, 4, 8)
    above.set_xticks(ticks, [f"{tick:g} ×" for tick in ticks])
    above.minorticks_off()
    above.set_title(
        f"Speed (right of 1 × is faster; {' and '.join(sorted(devices))}, bfloat16)",
        fontsize=10.5,
        fontweight="bold",
        x=-0.52,
        ha="left",
        pad=8,
    )
    draw_panel(below, better, 0.0, False)
    below.set_xlim(-0.5, 1.02)
    below.set_title(
        "Quality: change of the loss in nats (left of 0 is better)",
        fontsize=10.5,
        fontweight="bold",
        x=-0.52,
        ha="left",
        pad=8,
    )
    note = (
        "Speed: models and layers of 1B shapes. Conversions: SmolLM2-135M before recovery training, held-out text "
        "(STEM: 5 layers\n"
        "on Python's documentation, 10 on C4), band: 95 % confidence. From scratch: at most 28 M parameters "
        "on 1.8 MB of text,\n"
        "BHyT with one learning rate for all. Commands, machines and every other case: docs/performance.md."
    )
    figure.text(0.056, 0.008, note, fontsize=8, color=EQUAL)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=200, facecolor="white")
    pyplot.close(figure)
    path.parent.mkdir(exist_ok=True)
    Image.open(picture).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    draw(ROOT / "docs" / "figures" / "overview.png")
