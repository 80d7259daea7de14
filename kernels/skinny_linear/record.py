"""The record of skinny_linear for tests and benchmarks; see `contract.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_efficient.errors import BackendError, HFEError
from hf_efficient.kernels.contract import Arguments, BadInput, Compilation, Cost, KernelRecord, Sample, Tolerance
from hf_efficient.kernels.skinny_linear.api import skinny_linear
from hf_efficient.kernels.skinny_linear.configs import (
    MAX_ROWS,
    REDUCE_COLUMNS,
    REDUCE_WARPS,
    ROW_CLASSES,
    k_per_split,
    launch_config,
)
from hf_efficient.kernels.skinny_linear.op import skinny_linear_rows
from hf_efficient.kernels.skinny_linear.reference import skinny_linear as reference_skinny_linear


def samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """Small calls that together reach every branch of the kernels."""
    # Drawn on the CPU, so that every device sees the same numbers.
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def draw(
        *leading: int,
        sizes: tuple[int, ...] = (29,),
        depth: int = 37,
        biased: tuple[bool, ...] = (),
        residual: bool = False,
        gated: bool = False,
    ) -> Arguments:
        return {
            "x": drawn(*leading, depth),
            "weights": [drawn(size, depth) for size in sizes],
            "biases": [drawn(n) if has else None for n, has in zip(sizes, biased, strict=True)] if biased else None,
            "residual": drawn(*leading, sum(sizes)) if residual else None,
            "gated": gated,
        }

    cases = {
        "prime sizes": draw(7, sizes=(29, 13, 5), biased=(True, False, True), residual=True),
        "one row, three weights": draw(1, sizes=(29, 13, 5), biased=(True, False, True), residual=True),
        "one row, gated": draw(1, sizes=(31, 31), biased=(True, True), gated=True),
        "gated": draw(5, sizes=(31, 31), biased=(True, True), gated=True),
        "one row, aligned": draw(1, sizes=(48, 16), depth=64),
        "aligned": draw(16, sizes=(48, 16), depth=64),
        "aligned, gated": draw(17, sizes=(32, 32), depth=128, gated=True),
        "a batch of one token each": draw(3, 1, sizes=(11,), residual=True),
        "no leading dimension": draw(sizes=(11,), residual=True),
        "no row": draw(0, sizes=(11, 3)),
        "one output": draw(2, sizes=(1,)),
        "depth of one": draw(2, sizes=(5,), depth=1),
        "the most rows": draw(MAX_ROWS, sizes=(19,)),
        "one row, several deep tiles": draw(1, sizes=(5,), depth=4133),
        "several deep tiles": draw(2, sizes=(5, 2), depth=555, residual=True),
    }
    apart = draw(6, sizes=(9, 9), depth=32, residual=True)
    wide = drawn(9, 80)
    cases["rows apart in memory"] = {
        **apart,
        "x": drawn(12, 32)[::2],
        "weights": [wide[:, :32], wide[:, 48:]],
        "residual": drawn(18, 6).t(),
    }
    cases["strided rows of elements"] = {**apart, "x": drawn(32, 6).t()}
    return [Sample(label, arguments) for label, arguments in cases.items()]


def bad_inputs(device: torch.device) -> list[BadInput]:
    """Calls that must raise before a kernel is launched."""
    x, weight, bias = torch.ones(2, 8, device=device), torch.ones(6, 8, device=device), torch.ones(6, device=device)

    def bad(label: str, error: type[Exception], *words: str, **changes: Any) -> BadInput:
        return BadInput(label, {"x": x, "weights": [weight], **changes}, error, words)

    return [
        bad("no weight", HFEError, "`weights`", "0 tensors", "1 to 3", weights=[]),
        bad("four weights", HFEError, "`weights`", "4 tensors", "1 to 3", weights=[weight] * 4),
        bad("a gate without its partner", HFEError, "1 tensors", "exactly 2", gated=True),
        bad(
            "gated weights of two shapes", HFEError, "`weights[1]`", "(5, 8)", weights=[weight, weight[:5]], gated=True
        ),
        bad(
            "gated with a residual",
            HFEError,
            "`residual`",
            "gated=True",
            weights=[weight, weight],
            residual=torch.ones(2, 6, device=device),
            gated=True,
        ),
        bad("a weight that is none", HFEError, "`weights[0]`", "NoneType", weights=[None]),
        bad("biases too few", HFEError, "`biases`", "1 entries", "2 weights", weights=[weight, weight], biases=[bias]),
        bad("a bias too short", HFEError, "`biases[0]`", "(5,)", "(6,)", biases=[bias[:5]]),
        bad("too many rows", HFEError, "65 rows", "64", "functional.linear", x=x.new_ones(5, 13, 8)),
        bad("x of integers", HFEError, "`x`", "int64", "bfloat16", x=x.long()),
        bad("x in double precision", HFEError, "`x`", "float64", "bfloat16", x=x.double()),
        bad("x without a last dimension", HFEError, "`x`", "()", "[..., K]", x=x[0, 0]),
        bad("an empty x", HFEError, "`x`", "(2, 0)", x=x[:, :0], weights=[weight[:, :0]]),
        bad("an empty weight", HFEError, "`weights[0]`", "(0, 8)", weights=[weight[:0]]),
        bad("a weight too narrow", HFEError, "`weights[0]`", "(6, 7)", "(6, 8)", weights=[weight[:, :7].contiguous()]),
        bad("a weight of rank 1", HFEError, "`weights[0]`", "(8,)", "[N, K]", weights=[weight[0]]),
        bad("a transposed weight", HFEError, "`weights[0]`", "stride", weights=[weight.t().contiguous().t()]),
        bad("a weight in another dtype", HFEError, "`weights[0]`", "float16", "float32", weights=[weight.half()]),
        bad("a residual of another shape", HFEError, "`residual`", "(2, 5)", "(2, 6)", residual=x[:, :5]),
        bad("a weight on another device", HFEError, "on meta", "one device", weights=[weight.to("meta")]),
        bad("an unknown backend", BackendError, "'cutlass'", "reference, triton", backend="cutlass"),
    ]


def operators(arguments: Arguments) -> list[tuple[object, tuple[Any, ...]]]:
    """The operator, with the arguments that the public function passes."""
    x, weights, residual = arguments["x"], arguments["weights"], arguments["residual"]
    rows = x.numel() // x.shape[-1]
    return [
        (
            skinny_linear_rows,
            (
                x.reshape(rows, x.shape[-1]),
                weights,
                arguments["biases"] or [None] * len(weights),
                None if residual is None else residual.reshape(rows, residual.shape[-1]),
                arguments["gated"],
            ),
        )
    ]


# Outputs, depth and whether gated, of a 1B model (hidden 2048, feed-forward 8192) and of SmolLM2-135M.
_SHAPES = (
    (3072, 2048, False),
    (2048, 2048, False),
    (8192, 2048, True),
    (32768, 2048, False),
    (2048, 8192, False),
    (1536, 576, True),
)

# Every entry is compiled for these; 80 shares the tiles of 86, 100 those of 90, and one of each kind does there.
_TABLES = (86, 90)


def compilations(capability: int) -> Iterator[Compilation]:
    """Every configuration that these shapes may pick; with biases, a residual and masks where nothing else differs."""
    from hf_efficient.kernels.skinny_linear.triton_kernels import gemm_kernel, gemv_kernel

    seen = set()
    for outputs, depth, gated in _SHAPES:
        for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
            for rows in ROW_CLASSES:
                config = launch_config(rows, outputs, depth, size, gated, divmod(capability, 10))
                plain = outputs == 32768  # the head: neither bias nor residual
                key: tuple[Any, ...] = (dtype, min(rows, 16), gated, plain)
                if capability in _TABLES:
                    key = (*key, rows, config)
                # Half precisions differ in nothing but the instruction, float32 in nothing but the rows, and up to 16
                # rows in nothing but the width of a product.
                once = rows == 16 or (dtype != "bf16" and rows == 1)
                if key in seen or (once and outputs != 3072) or (dtype != "bf16" and not once):
                    continue
                seen.add(key)
                kernel = gemv_kernel if rows == 1 else gemm_kernel
                pointer = f"*{dtype}"
                absent = ("w2", "b2", "residual") if gated else ("b0", "b1", "b2", "residual") if plain else ()
                sizes = ("rows", "n0", "n1", "n2", "x_stride", "stride0", "stride1", "stride2")
                types = {name: "i32" if name in sizes else pointer for name in kernel.arg_names if name.islower()}
                types = {name: type_ for name, type_ in types.items() if name not in absent}
                constants = {
                    **dict.fromkeys(absent),
                    "GATED": gated,
                    "K": depth if dtype == "bf16" else depth - 16,
                    "BLOCK_N": config.block_n,
                    "BLOCK_K": config.block_k,
                    "OVERLAP": capability >= 90,
                }
                if rows > 1:
                    constants["BLOCK_M"], constants["K_PER_SPLIT"] = rows, k_per_split(config, depth)
                if config.splits > 1:
                    yield _reduce_compilation(dtype, config.splits, capability)
                    # Partial sums have neither biases nor a residual, and are in float32.
                    absent = ("b0", "b1", "b2", "residual")
                    constants.update(dict.fromkeys(absent))
                    types = {name: type_ for name, type_ in types.items() if name not in absent} | {"out": "*fp32"}
                yield Compilation(
                    label=f"{kernel.__name__} {dtype} {rows} rows {outputs} outputs {depth} deep{' gated' * gated}",
                    kernel=kernel,
                    types=types,
                    constants=constants,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    aligned=tuple(name for name in types if name != "rows"),
                )


def _reduce_compilation(dtype: str, splits: int, capability: int) -> Compilation:
    from hf_efficient.kernels.skinny_linear.triton_kernels import reduce_splits_kernel

    types = {
        name: "i32" if name.startswith("n") else f"*{dtype}"
        for name in reduce_splits_kernel.arg_names
        if name.islower()
    }
    types["partial"] = "*fp32"
    return Compilation(
        label=f"reduce_splits_kernel {dtype} {splits} splits",
        kernel=reduce_splits_kernel,
        types=types,
        constants={"SPLITS": splits, "BLOCK_N": REDUCE_COLUMNS, "OVERLAP": capability >= 90},
        num_warps=REDUCE_WARPS,
        aligned=tuple(types),
    )


def forward_cost(arguments: Arguments) -> Cost:
    """The weights and biases, x, the residual and the output, once each; two operations a weight and row."""
    x, weights, residual = arguments["x"], arguments["weights"], arguments["residual"]
    depth, outputs = x.shape[-1], sum(weight.shape[0] for weight in weights)
    rows = x.numel() // depth
    written = rows * (outputs // 2 if arguments["gated"] else outputs)
    biases = sum(bias.numel() for bias in arguments["biases"] or () if bias is not None)
    added = 0 if residual is None else residual.numel()
    elements = outputs * depth + x.numel() + biases + added + written
    return Cost(bytes=elements * x.element_size(), flops=2 * rows * outputs * depth)


def eager(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None] | None, residual: Tensor | None, gated: bool
) -> Tensor:
    """What one writes without this package: a matrix product for each weight, and what belongs around them."""
    parts = [F.linear(x, w, b) for w, b in zip(weights, biases or [None] * len(weights), strict=True)]
    if gated:
        return F.silu(parts[0]) * parts[1]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return out if residual is None else out + residual


RECORD = KernelRecord(
    name="skinny_linear",
    api=skinny_linear,
    reference=reference_skinny_linear,
    samples=samples,
    bad_inputs=bad_inputs,
    # Half precision: one rounding of the result, 2^-9 and 2^-12 at most.
    tolerances={
        torch.float32: Tolerance(2e-6, 0.0),
        torch.float16: Tolerance(1e-3, 0.0),
        torch.bfloat16: Tolerance(4e-3, 0.0),
    },
    operators=operators,
    compilations=compilations,
    forward_cost=forward_cost,
    peers={"eager": eager},
)
