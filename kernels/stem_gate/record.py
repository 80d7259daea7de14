"""The record of stem_gate for tests and benchmarks; see `contract.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_efficient.errors import BackendError, HFEError, TokenIdError
from hf_efficient.kernels.contract import Arguments, BadInput, Compilation, Cost, KernelRecord, Sample, Tolerance
from hf_efficient.kernels.stem_gate.api import stem_gate
from hf_efficient.kernels.stem_gate.configs import CHUNK, DECODE_TOKENS, elementwise_config, run_config
from hf_efficient.kernels.stem_gate.op import stem_gate_backward, stem_gate_backward_gate, stem_gate_forward
from hf_efficient.kernels.stem_gate.reference import stem_gate as reference_stem_gate


def _draw(device: torch.device, dtype: torch.dtype, tokens: tuple[int, ...], rows: int, width: int) -> Arguments:
    # Drawn on the CPU, so that every device sees the same numbers.
    generator = torch.Generator().manual_seed(1)
    return {
        "gate": (3 * torch.randn((*tokens, width), generator=generator)).to(device, dtype),
        "table": torch.randn((rows, width), generator=generator).to(device, dtype),
        "ids": torch.randint(0, rows, tokens, generator=generator).to(device),
    }


def samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """Small calls that together reach every branch of the kernels."""

    def draw(*tokens: int, rows: int = 11, width: int = 24, table_dtype: torch.dtype = dtype) -> Arguments:
        arguments = _draw(device, dtype, tokens, rows, width)
        return {**arguments, "table": arguments["table"].to(table_dtype)}

    def looking_up(ids: Tensor, rows: int = 11) -> Arguments:
        return {**draw(*ids.shape, rows=rows), "ids": ids.to(device)}

    several_long_runs = [2] * (CHUNK + 1) + [7] + [9] * (CHUNK + 2)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    cases = {
        "prime sizes": draw(37, rows=13, width=71),
        "one token": draw(1),
        "one column": draw(5, width=1),
        "one row": draw(6, rows=1),
        "no token": draw(0),
        "no leading dimension": draw(),
        "a batch": draw(2, 3, 7),
        "rows aligned to 16 bytes": draw(19, width=128),
        "more tokens than a decoding step": draw(DECODE_TOKENS + 1, rows=300),
        "int32 ids": looking_up(torch.arange(9, dtype=torch.int32)),
        "all ids distinct": looking_up(shuffled[:30], rows=40),
        "all ids equal, exactly one chunk": looking_up(torch.full((CHUNK,), 3)),
        "all ids equal, more than two chunks": looking_up(torch.full((2 * CHUNK + 3,), 3)),
        "long runs side by side": looking_up(torch.tensor(several_long_runs)),
        "a wide table": draw(17, table_dtype=torch.float32),
        "a narrow table": draw(17, table_dtype=torch.bfloat16 if dtype == torch.float32 else torch.float16),
    }
    wider, transposed, single = draw(8, width=48), draw(12), draw(1)
    cases["rows apart in memory"] = {
        "gate": wider["gate"][::2, :24],
        "table": wider["table"][:, 24:],
        "ids": wider["ids"][::2],
    }
    cases["strided rows of elements"] = {**transposed, "gate": transposed["gate"].t().contiguous().t()}
    cases["one gate for all tokens"] = {
        **single,
        "gate": single["gate"].expand(9, -1),
        "ids": single["ids"].expand(9),
    }
    return [Sample(label, arguments) for label, arguments in cases.items()]


def bad_inputs(device: torch.device) -> list[BadInput]:
    """Calls that must raise before a kernel is launched."""
    good = _draw(device, torch.float32, (4,), 6, 8)

    def bad(label: str, error: type[Exception], *words: str, **changes: object) -> BadInput:
        return BadInput(label, {**good, **changes}, error, words)

    gate, table, ids = good["gate"], good["table"], good["ids"]
    return [
        bad("no ids", HFEError, "`ids`", "NoneType", ids=None),
        bad("a gate of integers", HFEError, "`gate`", "int64", "float32", gate=gate.long()),
        bad("a table of bytes", HFEError, "`table`", "uint8", table=table.to(torch.uint8)),
        bad("ids as floats", HFEError, "`ids`", "float32", "int32, int64", ids=ids.float()),
        bad("a gate without a last dimension", HFEError, "`gate`", "()", gate=gate[0, 0]),
        bad("a table of rank 1", HFEError, "`table`", "(8,)", "[R, F]", table=table[0]),
        bad("a table too narrow", HFEError, "`gate`", "(4, 8)", "(4, 7)", table=table[:, :7].contiguous()),
        bad("rows without a last dimension", HFEError, "`table`", "(6, 0)", gate=gate[:, :0], table=table[:, :0]),
        bad("an id too few", HFEError, "`gate`", "(4, 8)", "(3, 8)", ids=ids[:3]),
        bad("a transposed table", HFEError, "`table`", "stride", "contiguous()", table=table.t().contiguous().t()),
        bad(
            "ids on another device",
            HFEError,
            "on cpu" if device.type == "cpu" else "on cuda",
            "on meta",
            "one device",
            ids=ids.to("meta"),
        ),
        bad("a negative id", TokenIdError, "-1", "position [2]", "0..5", ids=ids.new_tensor([0, 1, -1, 2])),
        bad("an id past the end", TokenIdError, "6", "6 rows", ids=ids.new_tensor([0, 1, 2, 6])),
        bad("an unknown backend", BackendError, "'cutlass'", "reference, triton", backend="cutlass"),
    ]


def operators(arguments: Arguments) -> list[tuple[object, tuple[Tensor, ...]]]:
    """The three operators, with the arguments that the public function passes."""
    gate, table, ids = arguments["gate"], arguments["table"], arguments["ids"]
    flat = (gate.reshape(ids.numel(), table.shape[1]), table, ids.reshape(-1))
    return [
        (stem_gate_forward, flat),
        (stem_gate_backward, (torch.ones_like(flat[0]), *flat)),
        (stem_gate_backward_gate, (torch.ones_like(flat[0]), *flat)),
    ]


def compilations(capability: int) -> Iterator[Compilation]:
    """Every kernel in every configuration; none depends on the capability: one has all, the others one pair."""
    import triton.language as tl

    from hf_efficient.kernels.stem_gate.triton_kernels import (
        backward_gate_kernel,
        backward_kernel,
        forward_kernel,
        sum_partials_kernel,
    )

    pairs = [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")]
    pairs = pairs if capability == 86 else pairs[:1]
    sizes = {"tokens": "i32", "rows": "i32", "width": "i32", "gate_stride": "i32", "table_stride": "i32"}
    for gate, table in pairs:
        wide, wide_type = ("fp64", tl.float64) if gate == "fp64" else ("fp32", tl.float32)
        rows = {"gate": f"*{gate}", "table": f"*{table}", "ids": "*i64", **sizes}
        upstream = {"dgate": f"*{gate}", "dout": f"*{gate}", "dout_stride": "i32"}
        runs = {"sorted_ids": "*i32", "order": "*i64", "first": "*i32", "last": "*i32", "partial": f"*{wide}"}
        summed = {"dtable": f"*{table}", **runs, **rows}
        for kernel, types in (
            (forward_kernel, {"out": f"*{gate}", **rows}),
            (backward_gate_kernel, {**upstream, **rows}),
            (backward_kernel, {**upstream, **summed}),
            (sum_partials_kernel, summed),
        ):
            by_runs = "sorted_ids" in kernel.arg_names
            for width in (96, 8192):
                if width == 96 and gate != "bf16":
                    continue  # a narrow tile differs only in its width: one pair of dtypes is enough
                for tokens in (1,) if by_runs else (1, DECODE_TOKENS + 1):
                    config = run_config(width) if by_runs else elementwise_config(tokens, width)
                    constants = {
                        "COMPUTE_DTYPE": wide_type,
                        "CHUNK": CHUNK,
                        "BLOCK_TOKENS": config.block_tokens,
                        "BLOCK_WIDTH": config.block_width,
                    }
                    yield Compilation(
                        label=f"{kernel.__name__} {gate} gate {table} table width {width} from {tokens} tokens",
                        kernel=kernel,
                        types={name: types[name] for name in kernel.arg_names if name in types},
                        constants={name: value for name, value in constants.items() if name in kernel.arg_names},
                        num_warps=config.num_warps,
                        aligned=tuple(n for n in kernel.arg_names if n in types and n not in ("tokens", "rows")),
                    )


def _sizes(arguments: Arguments) -> tuple[int, int, int, int, int, int]:
    gate, table, ids = arguments["gate"], arguments["table"], arguments["ids"]
    return ids.numel(), int(ids.unique().numel()), *table.shape, gate.element_size(), table.element_size()


def forward_cost(arguments: Arguments) -> Cost:
    """(2T F) elements of the gate's dtype and (u F) of the table's, for u distinct ids; the ids themselves."""
    tokens, distinct, _, width, gate_bytes, table_bytes = _sizes(arguments)
    ids = tokens * arguments["ids"].element_size()
    return Cost(bytes=(2 * tokens * gate_bytes + distinct * table_bytes) * width + ids, flops=5 * tokens * width)


def backward_cost(arguments: Arguments) -> Cost:
    """(3T F) elements of the gate's dtype, (u F) of the table read and (R F) of its dense gradient written; the ids."""
    tokens, distinct, rows, width, gate_bytes, table_bytes = _sizes(arguments)
    ids = tokens * arguments["ids"].element_size()
    moved = (3 * tokens * gate_bytes + (distinct + rows) * table_bytes) * width + ids
    return Cost(bytes=moved, flops=12 * tokens * width)


def eager(gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """What one writes without this package: three kernels, and two intermediate results kept for the backward pass."""
    return F.silu(gate) * F.embedding(ids, table).to(gate.dtype)


RECORD = KernelRecord(
    name="stem_gate",
    api=stem_gate,
    reference=reference_stem_gate,
    samples=samples,
    bad_inputs=bad_inputs,
    # Half precision: one rounding of the result, 2^-9 and 2^-12 at most, and of each gradient.
    tolerances={
        torch.float64: Tolerance(1e-14, 1e-14),
        torch.float32: Tolerance(1e-6, 1e-6),
        torch.float16: Tolerance(1e-3, 1e-3),
        torch.bfloat16: Tolerance(4e-3, 4e-3),
    },
    operators=operators,
    compilations=compilations,
    forward_cost=forward_cost,
    backward_cost=backward_cost,
    peers={"eager": eager},
    differentiable=("gate", "table"),
    interpreted=(torch.float64, torch.float32, torch.float16),
)
