"""The record of add_rms_norm for tests and benchmarks; see `contract.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_efficient.errors import BackendError, HFEError
from hf_efficient.kernels.add_rms_norm.api import add_rms_norm
from hf_efficient.kernels.add_rms_norm.configs import MAX_WIDTH, launch_config
from hf_efficient.kernels.add_rms_norm.op import add_rms_norm_rows, rms_norm_rows
from hf_efficient.kernels.add_rms_norm.reference import add_rms_norm as reference_add_rms_norm
from hf_efficient.kernels.contract import Arguments, BadInput, Compilation, Cost, KernelRecord, Sample, Tolerance


def samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """Small calls that together reach every branch of the kernel."""
    # Drawn on the CPU, so that every device sees the same numbers.
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def draw(*shape: int, residual: bool = True) -> Arguments:
        return {
            "x": drawn(*shape),
            "weight": drawn(shape[-1]),
            "eps": 1e-5,
            "residual": drawn(*shape) if residual else None,
        }

    cases = {
        "prime sizes": draw(7, 37),
        "no residual": draw(7, 37, residual=False),
        "a batch": draw(2, 3, 24),
        "one row": draw(1, 128),
        "one column": draw(5, 1),
        "no row": draw(0, 16),
        "no leading dimension": draw(40),
        "several rows a program": draw(1031, 24),
        "a row in tiles": draw(2, 16400),
        "a row in tiles, no residual": draw(2, 16400, residual=False),
    }
    apart = draw(6, 24)
    cases["rows apart in memory"] = {**apart, "x": drawn(12, 40)[::2, :24], "residual": drawn(6, 64)[:, 40:]}
    cases["strided rows of elements"] = {**apart, "x": drawn(24, 6).t(), "weight": drawn(48)[::2]}
    cases["strided rows of elements, no residual"] = {**apart, "x": drawn(24, 6).t(), "residual": None}
    cases["small numbers"] = {**apart, "x": apart["x"] * 2**-12, "residual": apart["residual"] * 2**-12}
    return [Sample(label, arguments) for label, arguments in cases.items()]


def bad_inputs(device: torch.device) -> list[BadInput]:
    """Calls that must raise before a kernel is launched."""
    x, weight = torch.ones(2, 8, device=device), torch.ones(8, device=device)

    def bad(label: str, error: type[Exception], *words: str, **changes: Any) -> BadInput:
        return BadInput(label, {"x": x, "weight": weight, "eps": 1e-5, "residual": x, **changes}, error, words)

    too_wide = MAX_WIDTH + 1
    return [
        bad("no weight", HFEError, "`weight`", "NoneType", weight=None),
        bad("x of integers", HFEError, "`x`", "int64", "bfloat16", x=x.long()),
        bad("x in double precision", HFEError, "`x`", "float64", "bfloat16", x=x.double()),
        bad("a weight in another dtype", HFEError, "`weight`", "float16", "float32", weight=weight.half()),
        bad("a residual in another dtype", HFEError, "`residual`", "float16", "float32", residual=x.half()),
        bad("x without a last dimension", HFEError, "`x`", "()", "[..., D]", x=x[0, 0]),
        bad("empty rows", HFEError, "`x`", "(2, 0)", x=x[:, :0]),
        bad("rows too wide", HFEError, "65537", "65536", x=x.new_ones(1, too_wide), weight=x.new_ones(too_wide)),
        bad("a weight too short", HFEError, "`weight`", "(7,)", "(8,)", weight=weight[:7]),
        bad("a residual of another shape", HFEError, "`residual`", "(1, 8)", "(2, 8)", residual=x[:1]),
        bad("a weight on another device", HFEError, "on meta", "one device", weight=weight.to("meta")),
        bad("an unknown backend", BackendError, "'cutlass'", "reference, triton", backend="cutlass"),
    ]


def operators(arguments: Arguments) -> list[tuple[object, tuple[Any, ...]]]:
    """The operators, with the arguments that the public function passes."""
    x, residual = arguments["x"], arguments["residual"]
    flat = x.reshape(-1, x.shape[-1])
    if residual is None:
        return [(rms_norm_rows, (flat, arguments["weight"], arguments["eps"]))]
    return [(add_rms_norm_rows, (flat, residual.reshape(flat.shape), arguments["weight"], arguments["eps"]))]


def compilations(capability: int) -> Iterator[Compilation]:
    """Narrow, usual and tiled rows, for one row and for many."""
    from hf_efficient.kernels.add_rms_norm.triton_kernels import add_rms_norm_kernel as kernel

    sizes = ("rows", "width", "x_stride", "residual_stride")
    for dtype in ("bf16", "fp16", "fp32"):
        for rows, width, added in ((1, 2048, True), (4096, 128, False), (4096, 2048, True), (1, 65536, True)):
            if dtype != "bf16" and rows > 1:
                continue
            config = launch_config(rows, width)
            absent = () if added else ("residual", "summed")
            types = {name: "i32" if name in sizes else f"*{dtype}" for name in kernel.arg_names if name.islower()}
            types = {name: type_ for name, type_ in {**types, "eps": "fp32"}.items() if name not in absent}
            yield Compilation(
                label=f"{dtype} {rows} rows {width} wide{' with residual' * added}",
                kernel=kernel,
                types=types,
                constants={
                    **dict.fromkeys(absent),
                    "WHOLE_ROW": width <= config.block_width,
                    "BLOCK_ROWS": config.block_rows,
                    "BLOCK_WIDTH": config.block_width,
                    "OVERLAP": capability >= 90,
                },
                num_warps=config.num_warps,
                aligned=tuple(name for name in types if name not in ("rows", "eps")),
            )


def forward_cost(arguments: Arguments) -> Cost:
    """Input and normalised output, with a residual that and the sum besides; the weight."""
    x, added = arguments["x"], arguments["residual"] is not None
    elements = (4 if added else 2) * x.numel() + x.shape[-1]
    return Cost(bytes=elements * x.element_size(), flops=(5 if added else 4) * x.numel())


def eager(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """What one writes without this package, with PyTorch's own fused normalisation."""
    summed = x if residual is None else x + residual
    return F.rms_norm(summed, (x.shape[-1],), weight, eps), summed


RECORD = KernelRecord(
    name="add_rms_norm",
    api=add_rms_norm,
    reference=reference_add_rms_norm,
    samples=samples,
    bad_inputs=bad_inputs,
    # Half precision: three roundings, of the sum, of the normalisation and of the product.
    tolerances={
        torch.float32: Tolerance(1e-6, 0.0),
        torch.float16: Tolerance(1e-3, 0.0),
        torch.bfloat16: Tolerance(6e-3, 0.0),
    },
    operators=operators,
    compilations=compilations,
    forward_cost=forward_cost,
    peers={"eager": eager},
)
