"""The record of bhyt_norm for tests and benchmarks; see `contract.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_efficient.errors import BackendError, HFEError
from hf_efficient.kernels.bhyt_norm.api import bhyt_norm
from hf_efficient.kernels.bhyt_norm.configs import MAX_WIDTH, REDUCE_COLUMNS, backward_config, forward_config
from hf_efficient.kernels.bhyt_norm.op import bhyt_norm_backward, bhyt_norm_forward
from hf_efficient.kernels.bhyt_norm.reference import LEAST_SHARE
from hf_efficient.kernels.bhyt_norm.reference import bhyt_norm as reference_bhyt_norm
from hf_efficient.kernels.contract import Arguments, BadInput, Compilation, Cost, KernelRecord, Sample, Tolerance

# Arguments that a call may leave out.
_OPTIONAL = ("residual", "variance", "affine", "branch", "first_bound", "out_scale")


def samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """Small calls that together reach every branch of the kernels."""
    # Drawn on the CPU, so that every device sees the same numbers.
    generator = torch.Generator().manual_seed(1)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32

    def drawn(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, of)

    def draw(*shape: int, bound: float = 2.0, residual: bool = True, given: bool = False) -> Arguments:
        arguments: Arguments = {
            # Mostly of one sign, or the gradients of weight and bound would be sums that cancel.
            "x": drawn(*shape) + 0.75,
            "weight": drawn(shape[-1]).abs() + 0.5,
            "bound": torch.full((1,), bound, dtype=dtype, device=device),
            "eps": 1e-5,
            **dict.fromkeys(_OPTIONAL),
        }
        if residual:
            arguments["residual"] = 2 * drawn(*shape)
        if given:
            arguments["variance"] = drawn(*shape[:-1], of=statistics).abs() + 0.5
        return arguments

    def numbers(*values: float) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    cases = {
        "prime sizes": draw(7, 37),
        "a given mean square": draw(7, 37, given=True),
        "a given mean square, no residual": draw(7, 37, given=True, residual=False),
        "an estimated mean square": {**draw(7, 37, given=True), "affine": numbers(1.25, 0.25)},
        "no residual": draw(7, 37, residual=False),
        "an estimate that falls too low": {**draw(7, 37, given=True), "affine": numbers(0.5, -0.25)},
        "a small bound with its scale": {**draw(5, 64, bound=2.0**-6), "out_scale": numbers(640.0)},
        "far into saturation": draw(5, 64, bound=40.0),
        "a negative bound": draw(5, 64, bound=-2.0),
        "a bound of zero": draw(5, 64, bound=0.0),
        "a batch": draw(2, 3, 24),
        "one row": draw(1, 128),
        "one column": draw(5, 1),
        "no row": draw(0, 16),
        "no leading dimension": draw(40),
        "several rows a program": draw(1031, 24),
        "more rows than the interpreter has programs": draw(40, 136, given=True),
        "wider than a tile of columns": draw(3, 2300, given=True),
    }
    apart = draw(6, 24)
    cases["rows apart in memory"] = {**apart, "x": drawn(12, 40)[::2, :24], "residual": drawn(6, 64)[:, 40:]}
    cases["strided rows of elements"] = {**apart, "x": drawn(24, 6).t()}
    cases["a row of zeros"] = {**apart, "x": apart["x"] * 0, "residual": apart["residual"] * 0}
    wider = {torch.float16: torch.float32, torch.bfloat16: torch.float32}.get(dtype, dtype)
    cases["a residual stream as wide as may be"] = {**apart, "residual": drawn(6, 24, of=wider)}
    cases |= {
        "an estimate from the branch": {
            **draw(7, 37, given=True),
            "branch": numbers(4.0, 0.5),
            "first_bound": numbers(3.0),
        },
        "a line of the branch's estimate": {
            **draw(7, 37, given=True),
            "affine": numbers(1.25, 0.5),
            "branch": numbers(4.0, 0.5),
            "first_bound": numbers(3.0),
        },
        "a scale for each channel": {**draw(5, 64), "out_scale": drawn(64).abs() + 0.5},
    }
    return [Sample(label, arguments) for label, arguments in cases.items()]


def bad_inputs(device: torch.device) -> list[BadInput]:
    """Calls that must raise before a kernel is launched."""
    x, weight, one = (torch.ones(shape, device=device) for shape in ((2, 8), (8,), (1,)))

    def bad(label: str, error: type[Exception], *words: str, **changes: Any) -> BadInput:
        return BadInput(label, {"x": x, "weight": weight, "bound": one, "eps": 1e-5, **changes}, error, words)

    wide = x.new_ones(1, MAX_WIDTH + 1)
    return [
        bad("no weight", HFEError, "`weight`", "NoneType", weight=None),
        bad("no bound", HFEError, "`bound`", "NoneType", bound=None),
        bad("x of integers", HFEError, "`x`", "int64", "bfloat16", x=x.long()),
        bad("x without a last dimension", HFEError, "`x`", "()", "[..., D]", x=x[0, 0]),
        bad("empty rows", HFEError, "`x`", "(2, 0)", x=x[:, :0]),
        bad("rows too wide", HFEError, str(MAX_WIDTH + 1), str(MAX_WIDTH), x=wide, weight=wide[0]),
        bad("a weight too short", HFEError, "`weight`", "(7,)", "(8,)", weight=weight[:7]),
        bad("a bound for each channel", HFEError, "`bound`", "(8,)", "(1,)", bound=weight),
        bad("a bound without dimensions", HFEError, "`bound`", "()", "(1,)", bound=one[0]),
        bad("no eps", HFEError, "eps=0.0", "positive", eps=0.0),
        bad("kappa below zero", HFEError, "kappa=-10.0", "positive", kappa=-10.0),
        bad("kappa that is no number", HFEError, "kappa=nan", "positive", kappa=float("nan")),
        bad("a residual of another shape", HFEError, "`residual`", "(1, 8)", "(2, 8)", residual=x[:1]),
        bad("a narrower residual", HFEError, "`residual`", "float16", "float32", residual=x.half()),
        bad("a residual of the other half", HFEError, "`residual`", "float16", x=x.bfloat16(), residual=x.half()),
        bad("a mean square for each element", HFEError, "`variance`", "(2, 8)", "(2,)", variance=x),
        bad("a mean square in half precision", HFEError, "`variance`", "float16", "float32", variance=x[:, 0].half()),
        bad("an estimate from nothing", HFEError, "`affine`", "`variance`", affine=one.expand(2)),
        bad(
            "a branch without its bound", HFEError, "`branch`", "`first_bound`", variance=x[:, 0], branch=one.expand(2)
        ),
        bad("a bound without its branch", HFEError, "`branch`", "`first_bound`", first_bound=one),
        bad("an estimate of three", HFEError, "`affine`", "(3,)", "(2,)", affine=one.expand(3), variance=x[:, 0]),
        bad("a scale for half of the channels", HFEError, "`out_scale`", "(4,)", "(8,)", out_scale=weight[:4]),
        bad("a weight on another device", HFEError, "on meta", "one device", weight=weight.to("meta")),
        bad("an unknown backend", BackendError, "'cutlass'", "reference, triton", backend="cutlass"),
    ]


def operators(arguments: Arguments) -> list[tuple[object, tuple[Any, ...]]]:
    """Both operators, with the arguments that the public function passes."""
    x, weight, bound, eps = (arguments[name] for name in ("x", "weight", "bound", "eps"))
    residual, variance, *estimate = (arguments[name] for name in _OPTIONAL)
    flat = x.reshape(-1, x.shape[-1])
    rows = None if residual is None else residual.reshape(flat.shape)
    given = None if variance is None else variance.reshape(-1)
    summed = flat if rows is None else flat.to(rows.dtype) + rows
    found = summed.float().square().mean(-1) if given is None else given
    kept = (summed, found, weight, bound, *estimate, eps, 10.0, given is None)
    return [
        (bhyt_norm_forward, (flat, rows, weight, bound, given, *estimate, eps, 10.0)),
        (bhyt_norm_backward, (torch.ones_like(flat), torch.ones_like(summed), None, *kept)),
    ]


_STATISTICS = ("variance", "dvariance", "dv", "partial")
_INTEGERS = ("rows", "row_steps", "programs", "width")
# Arguments of an estimated site, and those that a call may leave out.
_OF_ESTIMATES = ("affine", "branch", "first_bound")
_LEFT_OUT = ("residual", "summed", "dsummed", "dv", "out_scale")


def compilations(capability: int) -> Iterator[Compilation]:
    """Exact and estimating sites, with and without the optional parts, for narrow and wide rows."""
    import triton.language as tl

    from hf_efficient.kernels.bhyt_norm.triton_kernels import backward_kernel, forward_kernel, reduce_partials_kernel

    def compilation(
        kernel: Any, label: str, dtype: str, absent: tuple[str, ...], launch: dict[str, Any]
    ) -> Compilation:
        statistics = "fp64" if dtype == "fp64" else "fp32"
        names = [name for name in kernel.arg_names if name.islower()]
        gone = [name for name in names if name in absent]
        types = {n: f"*{statistics if n in _STATISTICS else dtype}" for n in names if n not in gone}
        types |= {n: "i32" for n in types if n in _INTEGERS or n.endswith("_stride")}
        warps = launch.pop("num_warps")
        constants = {
            "EPS": 1e-6,
            "KAPPA": 10.0,
            "LEAST": LEAST_SHARE,
            "COMPUTE_DTYPE": tl.float64 if dtype == "fp64" else tl.float32,
            "APPROXIMATE": dtype in ("bf16", "fp16"),
            "ESTIMATED": "affine" in types,
            "OVERLAP": False,
            **launch,
        }
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        # A scale of one number has stride 0, which is a constant to the launcher only where it is 1.
        aligned = tuple(n for n in types if n not in ("rows", "row_steps", "programs", "scale_stride"))
        return Compilation(label, kernel, types, {**dict.fromkeys(gone), **constants}, warps, aligned)

    for dtype, exact, width, full in (
        *(("bf16", exact, *shape) for exact in (True, False) for shape in ((128, False), (4096, True))),
        ("bf16", True, MAX_WIDTH, True),
        ("fp32", True, 4096, True),
        ("fp64", True, 4096, True),
    ):
        absent: tuple[str, ...] = () if full else _LEFT_OUT
        absent += _OF_ESTIMATES if exact or not full else ("dv",)
        label = f"{dtype} {'exact' if exact else 'estimated'} {width} wide"
        row_bytes = 3 * width * {"fp32": 4, "fp64": 8}.get(dtype, 2)
        # Launches overlap with one row.
        overlaps = (False, True) if capability >= 90 and width == 4096 and dtype == "bf16" else (False,)
        for overlap in overlaps:
            early = " overlapping" if overlap else ""
            forward = forward_config(1 if overlap else 4096, width, exact)
            launch = {"BLOCK_ROWS": forward.block_rows, "BLOCK_WIDTH": forward.block_width, "EXACT": exact}
            launch |= {"num_warps": forward.num_warps, "OVERLAP": overlap}
            yield compilation(forward_kernel, f"forward {label}{early}", dtype, absent, launch)
        backward = backward_config(4096, width, row_bytes)
        launch = {"BLOCK_ROWS": backward.block_rows, "BLOCK_WIDTH": backward.block_width}
        launch |= {"NUM_STAGES": backward.num_stages, "num_warps": backward.num_warps, "EXACT": exact}
        # Without a residual the forward pass writes no sum, but the backward pass still reads the input.
        kept = tuple(name for name in absent if name != "summed")
        yield compilation(backward_kernel, f"backward {label}", dtype, kept, launch)
    for dtype in ("bf16", "fp64"):
        launch = {"BLOCK_ROWS": 64, "BLOCK_WIDTH": REDUCE_COLUMNS, "num_warps": 4}
        yield compilation(reduce_partials_kernel, f"reduce {dtype}", dtype, (), launch)


def _bytes_of_rows(arguments: Arguments) -> tuple[int, int]:
    """Bytes of all elements in the dtype of x, and in that of the stream."""
    x, residual = arguments["x"], arguments["residual"]
    return x.nbytes, x.numel() * (x if residual is None else residual).element_size()


def forward_cost(arguments: Arguments) -> Cost:
    """Branch and stream in, sum and result out; without a residual, in and out. Row and column numbers besides."""
    branch, stream = _bytes_of_rows(arguments)
    moved = 2 * branch + (0 if arguments["residual"] is None else 2 * stream)
    x = arguments["x"]
    rows = x.numel() // x.shape[-1]
    return Cost(bytes=moved + 4 * rows + arguments["weight"].nbytes, flops=30 * x.numel())


def backward_cost(arguments: Arguments) -> Cost:
    """Two gradients and the sum in, one gradient out."""
    branch, stream = _bytes_of_rows(arguments)
    x = arguments["x"]
    rows = x.numel() // x.shape[-1]
    return Cost(bytes=branch + 3 * stream + 4 * rows + 2 * arguments["weight"].nbytes, flops=50 * x.numel())


RECORD = KernelRecord(
    name="bhyt_norm",
    api=bhyt_norm,
    reference=reference_bhyt_norm,
    samples=samples,
    bad_inputs=bad_inputs,
    # Half precision: one rounding of the sum, which affects everything after it, and one of each result.
    tolerances={
        torch.float64: Tolerance(1e-12, 1e-12),
        torch.float32: Tolerance(2e-6, 5e-6),
        torch.float16: Tolerance(1e-3, 2e-3),
        torch.bfloat16: Tolerance(6e-3, 1e-2),
    },
    operators=operators,
    compilations=compilations,
    forward_cost=forward_cost,
    backward_cost=backward_cost,
    differentiable=("x", "weight", "bound", "residual", "variance", "affine"),
    after_rounding=("out2", "variance"),
    interpreted=(torch.float64, torch.float32, torch.float16),
)
