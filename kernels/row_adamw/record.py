"""The record of row_adamw for tests and benchmarks; see `contract.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_efficient.errors import BackendError, HFEError, TokenIdError
from hf_efficient.kernels.contract import Arguments, BadInput, Compilation, Cost, KernelRecord, Sample, Tolerance
from hf_efficient.kernels.row_adamw.api import row_adamw
from hf_efficient.kernels.row_adamw.configs import launch_config
from hf_efficient.kernels.row_adamw.op import row_adamw_step
from hf_efficient.kernels.row_adamw.reference import row_adamw as reference_row_adamw


def draw(
    device: torch.device,
    dtype: torch.dtype,
    ids: int = 5,
    rows: int = 11,
    width: int = 24,
    grad_dtype: torch.dtype | None = None,
) -> Arguments:
    """One call in the midst of training: rows with various counts of steps and of decay still to be made up for."""
    # Drawn on the CPU, so that every device sees the same numbers.
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    steps = torch.randint(0, 2000, (rows,), generator=generator, dtype=torch.int32)
    steps[::3] = 0
    return {
        "param": drawn(rows, width).to(device, dtype),
        "exp_avg": (0.1 * drawn(rows, width)).to(device, wide),
        "exp_avg_sq": (0.1 * drawn(rows, width).square()).to(device, wide),
        "steps": steps.to(device),
        "log_decays": (-0.3 * torch.rand(rows, generator=generator, dtype=torch.float64)).to(device),
        "ids": torch.randperm(rows, generator=generator)[:ids].to(device),
        "grad": drawn(ids, width).to(device, grad_dtype or dtype),
        "lr": 0.02,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "log_decay": -0.31,
        "scale": None,
    }


def samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """Small calls that together reach every branch of the kernel."""

    def drawn(**sizes: Any) -> Arguments:
        return draw(device, dtype, **sizes)

    base, wide, quarter = drawn(), drawn(width=48), torch.tensor(0.25, device=device)
    cases = {
        "prime sizes": {**drawn(ids=17, rows=41, width=71), "scale": quarter},
        "no scale": base,
        "no row": drawn(ids=0),
        "one row": drawn(ids=1),
        "all rows": drawn(ids=11),
        "one column": drawn(width=1),
        "several tiles a row": drawn(ids=3, width=2061),
        "no weight decay": {**base, "log_decay": 0.0, "log_decays": torch.zeros_like(base["log_decays"])},
        "no momentum": {**base, "betas": (0.0, 0.0)},
        "int32 ids": {**base, "ids": base["ids"].int()},
        "a wide gradient": drawn(grad_dtype=torch.float32),
        "a narrow gradient": drawn(grad_dtype=torch.float16),
        "a gradient of one number": {**base, "grad": base["grad"][:1, :1].expand(5, 24)},
        "a strided gradient": {**base, "grad": base["grad"].t().contiguous().t()},
        "rows apart in memory": {
            **base,
            "param": wide["param"][:, 24:],
            "exp_avg": wide["exp_avg"][:, :24],
            "exp_avg_sq": wide["exp_avg_sq"][:, 24:],
            "grad": wide["grad"][:, 16:40],
            "ids": torch.tensor([5, 0, 10, 0, 3, 0, 1, 0, 4], device=device)[::2],
        },
    }
    return [Sample(label, arguments) for label, arguments in cases.items()]


def bad_inputs(device: torch.device) -> list[BadInput]:
    """Calls that must raise before a kernel is launched."""
    good = draw(device, torch.float32, ids=4, rows=6, width=8)

    def bad(label: str, *words: str, error: type[Exception] = HFEError, **changes: object) -> BadInput:
        return BadInput(label, {**good, **changes}, error, words)

    param, m, steps, decays, ids, grad = (
        good[name] for name in ("param", "exp_avg", "steps", "log_decays", "ids", "grad")
    )
    scale = torch.ones(1, device=device)
    return [
        bad("no moments", "`exp_avg`", "NoneType", exp_avg=None),
        bad("a parameter of integers", "`param`", "int64", "bfloat16", param=param.long()),
        bad("half-precision moments", "`exp_avg`", "bfloat16", "float32", exp_avg=m.bfloat16()),
        bad("moments in double precision", "`exp_avg_sq`", "float64", "float32", exp_avg_sq=m.double()),
        bad("steps as int64", "`steps`", "int64", "int32", steps=steps.long()),
        bad("decays in single precision", "`log_decays`", "float32", "float64", log_decays=decays.float()),
        bad("ids as floats", "`ids`", "float32", "int64", ids=ids.float()),
        bad("a gradient of integers", "`grad`", "int64", "float32", grad=grad.long()),
        bad("a parameter of rank 3", "`param`", "(6, 8, 1)", "[V, F]", param=param[..., None]),
        bad("a parameter without columns", "`param`", "(6, 0)", param=param[:, :0]),
        bad("ids of rank 2", "`ids`", "(2, 2)", "[u]", ids=ids.view(2, 2)),
        bad("moments of another shape", "`exp_avg`", "(5, 8)", "(6, 8)", exp_avg=m[:5]),
        bad("too few steps", "`steps`", "(5,)", "(6,)", steps=steps[:5]),
        bad("a gradient for each row", "`grad`", "(6, 8)", "(4, 8)", grad=param),
        bad("a transposed parameter", "`param`", "stride", param=param.t().contiguous().t()),
        bad("strided steps", "`steps`", "stride 2", steps=steps.repeat(2)[::2]),
        bad("a scale with a dimension", "`scale`", "(1,)", "()", scale=scale),
        bad("a scale of integers", "`scale`", "int64", "float32", scale=scale[0].long()),
        bad("a gradient on another device", "on meta", "one device", grad=grad.to("meta")),
        bad("a negative id", "-1", "position [2]", error=TokenIdError, ids=ids.new_tensor([0, 1, -1, 2])),
        bad("an id past the end", "6 rows", error=TokenIdError, ids=ids.new_tensor([0, 1, 2, 6])),
        bad("an unknown backend", "'cutlass'", "reference, triton", error=BackendError, backend="cutlass"),
    ]


def operators(arguments: Arguments) -> list[tuple[object, tuple[Any, ...]]]:
    """The operator, with the arguments that the public function passes."""
    tensors = ("param", "exp_avg", "exp_avg_sq", "steps", "log_decays", "ids", "grad", "scale")
    numbers = (arguments["lr"], *arguments["betas"], arguments["eps"], arguments["log_decay"])
    return [(row_adamw_step, (*(arguments[name] for name in tensors), *numbers))]


def compilations(capability: int) -> Iterator[Compilation]:
    """Every dtype of parameter and gradient that go together; wide and narrow rows, with and without a scale."""
    import triton.language as tl

    from hf_efficient.kernels.row_adamw.triton_kernels import row_adamw_kernel as kernel

    numbers = ("lr", *(f"{form}beta{i}" for form in ("", "one_minus_", "log_") for i in (1, 2)), "eps", "log_decay")
    pairs = [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32"), ("fp16", "fp16"), ("fp64", "fp64")]
    for param, grad in pairs:
        wide, wide_type = ("fp64", tl.float64) if param == "fp64" else ("fp32", tl.float32)
        for width, scaled in ((8192, True), (192, False)):
            if width == 192 and param != "bf16":
                continue  # a narrow tile differs only in its width: one pair of dtypes is enough
            config = launch_config(width)
            types = dict.fromkeys(("rows", "width", *(n for n in kernel.arg_names if "stride" in n)), "i32")
            types.update(dict.fromkeys(numbers, "fp64"), steps="*i32", log_decays="*fp64", ids="*i64")
            types.update(param=f"*{param}", grad=f"*{grad}", exp_avg=f"*{wide}", exp_avg_sq=f"*{wide}")
            absent = {} if scaled else {"scale": None}
            if scaled:
                types["scale"] = "*fp32"
            yield Compilation(
                label=f"{param} parameter {grad} gradient width {width}{' scaled' * scaled}",
                kernel=kernel,
                types=types,
                constants={**absent, "COMPUTE_DTYPE": wide_type, "BLOCK_WIDTH": config.block_width},
                num_warps=config.num_warps,
                aligned=tuple(name for name in types if name not in (*numbers, "rows")),
            )


def forward_cost(arguments: Arguments) -> Cost:
    """For each of the u F elements: gradient read, parameter and both moments read and written; the numbers of rows."""
    ids, grad, param, m = (arguments[name] for name in ("ids", "grad", "param", "exp_avg"))
    element = grad.element_size() + 2 * param.element_size() + 4 * m.element_size()
    of_row = ids.element_size() + 2 * (arguments["steps"].element_size() + arguments["log_decays"].element_size())
    return Cost(bytes=grad.numel() * element + ids.numel() * of_row, flops=17 * grad.numel())


def eager(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    log_decays: Tensor,
    ids: Tensor,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    log_decay: float,
    scale: Tensor | None,
) -> Tensor:
    """What one writes without this package."""
    g = grad.to(exp_avg.dtype)
    if scale is not None:
        g = g * scale
    steps[ids] += 1
    exp_avg[ids] = exp_avg[ids].lerp(g, 1 - betas[0])
    exp_avg_sq[ids] = exp_avg_sq[ids].mul(betas[1]).addcmul(g, g, value=1 - betas[1])
    corrected = [1 - beta ** steps[ids, None].double() for beta in betas]
    change = exp_avg[ids] / corrected[0] / ((exp_avg_sq[ids] / corrected[1]).sqrt() + eps)
    decayed = param[ids] * (log_decay - log_decays[ids, None]).exp()
    param[ids] = (decayed - lr * change).to(param.dtype)
    log_decays[ids] = log_decay
    return param


RECORD = KernelRecord(
    name="row_adamw",
    api=row_adamw,
    reference=reference_row_adamw,
    samples=samples,
    bad_inputs=bad_inputs,
    # Half precision: one rounding of the parameter, 2^-9 and 2^-12 at most.
    tolerances={
        torch.float64: Tolerance(1e-13, 0.0),
        torch.float32: Tolerance(1e-6, 0.0),
        torch.float16: Tolerance(1e-3, 0.0),
        torch.bfloat16: Tolerance(4e-3, 0.0),
    },
    operators=operators,
    compilations=compilations,
    forward_cost=forward_cost,
    peers={"eager": eager},
    mutates=("param", "exp_avg", "exp_avg_sq", "steps", "log_decays"),
    interpreted=(torch.float64, torch.float32, torch.float16),
)
