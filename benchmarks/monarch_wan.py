"""How much faster is the whole Wan 2.1 transformer with Monarch attention, not its attention alone?

    python -m benchmarks.monarch_wan [--parts step clip] [--compiled]

Random weights in the shape of Wan2.1-T2V-1.3B, bfloat16, 480 x 832 pixels and 81 frames: 21 x 30 x 52 = 32,760 tokens.

- step: one forward pass of the bidirectional model at batch 1; with `--compiled` also with compiled blocks.
- clip: the causal model writes the latents of 81 frames, chunks of 3 latent frames at 4 steps each, with a KV cache.
  Text encoder and video decoder are left out.

Softmax attention is cuDNN's, the fastest of torch's kernels at this shape.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import common_options, describe_machine, read, times, write
from benchmarks.plot import load_pyplot
from hf_efficient.modeling.monarch_wan.configuration_monarch_wan import MonarchWanConfig
from hf_efficient.modeling.monarch_wan.modeling_monarch_wan import MonarchWanModel

PARTS = ("step", "clip")
IDENTITY = ("part", "attention", "compiled")
FRAMES, HEIGHT, WIDTH = 21, 60, 104
TILINGS: dict[str, dict[str, int] | None] = {
    "softmax (cuDNN)": None,
    "Monarch (1, 2, 1)": {"f_tied": 1, "h_reduce": 2, "w_reduce": 1},
    "Monarch (1, 1, 1)": {"f_tied": 1, "h_reduce": 1, "w_reduce": 1},
}
ROUNDS = 5


def build(variant: str, tiling: dict[str, int] | None, device: torch.device) -> MonarchWanModel:
    """The model with random weights; those of the zero-initialised head too, so that the result is not zero."""
    torch.manual_seed(0)
    config = MonarchWanConfig(variant=variant, monarch=tiling, attn_implementation="sdpa")
    with torch.device(device):
        model = MonarchWanModel(config).to(torch.bfloat16).eval()
    torch.nn.init.normal_(model.head.head.weight, std=0.02)
    return model


def inputs(device: torch.device) -> tuple[Tensor, Tensor]:
    """Latents [1, 16, 21, 60, 104] and text [1, 512, 4096]."""
    generator = torch.Generator(device).manual_seed(0)
    latents = torch.randn((1, 16, FRAMES, HEIGHT, WIDTH), device=device, generator=generator)
    return latents, torch.randn((1, 512, 4096), device=device, generator=generator).to(torch.bfloat16)


def measured(call: Callable[[], Any], rounds: int, device: torch.device) -> dict[str, float]:
    """Median, least and most seconds of a call, and its peak memory."""
    call()
    torch.cuda.reset_peak_memory_stats()
    samples = [each / 1e3 for each in times({"call": call}, rounds, 1, device, warm_up=0)["call"]]
    return {
        "seconds": round(statistics.median(samples), 4),
        "seconds_min": round(min(samples), 4),
        "seconds_max": round(max(samples), 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def measure(part: str, compiled: bool, device: torch.device) -> Iterator[dict[str, Any]]:
    """A line for each attention."""
    latents, text = inputs(device)
    for name, tiling in TILINGS.items():
        model = build("bidirectional" if part == "step" else "causal", tiling, device)
        if compiled:
            torch._dynamo.reset()
            for block in model.blocks:
                block.compile(dynamic=False)

        def call(model: MonarchWanModel = model) -> Tensor:
            with torch.no_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                if part == "clip":
                    return model.sample_chunks(latents, text, generator=torch.Generator(device).manual_seed(0))
                return model(latents.to(torch.bfloat16), torch.full((1,), 500.0, device=device), text)[0]

        began = time.perf_counter()
        finite = bool(call().isfinite().all())
        first = time.perf_counter() - began
        if not finite:
            raise SystemExit(f"{part} with {name}: the result is not finite")
        yield {
            "part": part,
            "attention": name,
            "compiled": compiled,
            "first_call_s": round(first, 2),
            **measured(call, ROUNDS if part == "step" else 2, device),
        }
        del model
        torch.cuda.empty_cache()


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """One panel for each part: seconds as bars."""
    pyplot = load_pyplot()
    if pyplot is None:
        return
    shown = {"step": "one step of 32,760 tokens", "clip": "81 frames in chunks, 4 steps each"}
    figure, axes = pyplot.subplots(1, len(shown), figsize=(11, 4), layout="constrained")
    for axis, (part, title) in zip(axes, shown.items(), strict=True):
        found = [line for line in lines if line["part"] == part]
        labels = [line["attention"] + (", compiled" if line["compiled"] else "") for line in found]
        bars = axis.barh(labels, [line["seconds"] for line in found])
        axis.bar_label(bars, fmt="%.3g s", fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"Wan 2.1 1.3B, {title}", fontsize=10)
        axis.set_xlabel("seconds")
    figure.suptitle(f"{lines[0]['device']}, torch {lines[0]['torch']}, triton {lines[0]['triton']}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    options = common_options(__doc__, "monarch_wan.jsonl and monarch_wan.png")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--compiled", action="store_true", help="measure the step with compiled blocks too")
    arguments = options.parse_args()
    device = torch.device(arguments.device)
    environment = describe_machine(device, arguments.commit)
    path = arguments.output / "monarch_wan.jsonl"
    for part in arguments.parts:
        for compiled in (False, True) if arguments.compiled and part == "step" else (False,):
            for line in measure(part, compiled, device):
                write(path, [line | environment], IDENTITY)
                print(
                    f"{line['part']:5s} {line['attention']:18s} {'compiled' if compiled else 'eager':8s} "
                    f"{line['seconds']:8.3f} s  first {line['first_call_s']} s  {line['peak_gib']} GiB",
                    flush=True,
                )
    draw(read(path), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
