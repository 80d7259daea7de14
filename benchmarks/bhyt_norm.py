"""Does a residual addition with BHyT run at the memory's pace, and how does it compare with addition and RMSNorm?

    PYTHONPATH=FOLDER_WITH_LIGER python -m benchmarks.bhyt_norm [--output FOLDER]

Forward, and forward with backward, of ``s = x + residual; y = norm(s)`` with gradients into both results, bfloat16. The
peers compute another function, RMSNorm, since that is what a BHyT site replaces: the stock layer's, PyTorch's own, the
stock one compiled, and Liger's fused kernel, where that package is to be found. The floor is 8 bytes an element in each
direction. Replayed from a CUDA graph, and called one by one from Python.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import RESULTS, copy_bandwidth, describe_machine, time_calls
from benchmarks.plot import plot
from hf_efficient.kernels.bhyt_norm.api import bhyt_norm
from hf_efficient.modeling.decoder.rms_norm import rms_norm

SHAPES = ((16384, 4096), (65536, 2048), (8192, 8192))
# What the floor of an element is counted with.
PEAK_BYTES_PER_SECOND = 3.0e12

Function = Callable[..., tuple[Tensor, Tensor]]


def _rms(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return F.rms_norm(summed, weight.shape, weight, 1e-6), summed


def _stock_rms(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As the stock Llama layer writes it."""
    summed = x + residual
    return rms_norm(summed, weight, 1e-6), summed


def _providers(rows: int, device: torch.device) -> dict[str, Function]:
    bound = torch.ones(1, device=device, dtype=torch.bfloat16, requires_grad=True)
    variance = torch.rand(rows, device=device).add_(0.5).requires_grad_()
    branch = torch.tensor([0.01, 0.0], device=device)
    torch._dynamo.reset()
    estimated = partial(bhyt_norm, variance=variance, branch=branch, first_bound=bound.detach())
    found: dict[str, Function] = {
        "BHyT, exact": lambda x, r, w: bhyt_norm(x, w, bound, 1e-6, residual=r)[:2],
        "BHyT, estimated": lambda x, r, w: estimated(x, w, bound, 1e-6, residual=r)[:2],
        "RMSNorm, stock": _stock_rms,
        "RMSNorm, F.rms_norm": _rms,
    }
    if device.type == "cuda":
        found["RMSNorm, compiled"] = torch.compile(_stock_rms, dynamic=False)
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Liger

        found["RMSNorm, Liger"] = lambda x, r, w: Liger.apply(x, r, w, 1e-6, 0.0, "llama", False)
    except ImportError:
        print("liger-kernel is not installed: left out")
    return found


def measure(rows: int, width: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A line for each provider and mode."""
    x, residual, dnormed, dsummed = (torch.randn(rows, width, device=device, dtype=torch.bfloat16) for _ in range(4))
    weight = torch.ones(width, device=device, dtype=torch.bfloat16, requires_grad=True)
    leaves = (x.requires_grad_(), residual.requires_grad_(), weight)

    def forward(function: Function) -> Any:
        with torch.no_grad():
            return function(*leaves)

    def train(function: Function) -> Any:
        return torch.autograd.grad(function(*leaves), leaves, (dnormed, dsummed))

    copy = copy_bandwidth(device)
    for name, function in _providers(rows, device).items():
        for mode, call, passes in (("forward", forward, 1), ("forward and backward", train, 2)):
            launched = timing = time_calls([partial(call, function)], device)
            graph = True
            if device.type == "cuda":
                try:
                    timing = time_calls([partial(call, function)], device, graph=True)
                except RuntimeError:  # not every provider can be captured
                    graph = False
            floor_bytes = passes * 8 * rows * width
            yield {
                "case": f"{rows} x {width}",
                "mode": mode,
                "provider": name,
                "ms": round(timing.median, 6),
                "ms_p20": round(timing.p20, 6),
                "ms_p80": round(timing.p80, 6),
                "ms_launched": round(launched.median, 6),
                "graph": graph,
                "floor_bytes": floor_bytes,
                "floor_ms": round(1e3 * floor_bytes / PEAK_BYTES_PER_SECOND, 6),
                "of_floor": round(1e3 * floor_bytes / PEAK_BYTES_PER_SECOND / timing.median, 4),
                "copy_gb_per_s": round(copy, 1),
                "of_copy": round(floor_bytes / timing.median / 1e6 / copy, 4),
            }


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda")
    options.add_argument("--shapes", nargs="*", default=[f"{rows}x{width}" for rows, width in SHAPES])
    options.add_argument("--output", type=Path, default=RESULTS)
    options.add_argument("--commit", help="commit to record where the checkout has no .git")
    arguments = options.parse_args(argv)
    device = torch.device(arguments.device)
    environment = describe_machine(device, arguments.commit)
    lines = []
    # A graph can be captured on any stream but the default one, and a backward pass runs on the stream of its forward.
    with torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext():
        for shape in arguments.shapes:
            rows, width = map(int, shape.split("x"))
            for line in measure(rows, width, device):
                lines.append({**line, **environment})
                shown = ("case", "mode", "provider", "ms", "ms_launched", "of_floor", "graph")
                print(*(line[key] for key in shown), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "bhyt_norm.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    plot(lines, "Residual addition with BHyT, and with RMSNorm", path.with_suffix(".png"))


if __name__ == "__main__":
    main()
