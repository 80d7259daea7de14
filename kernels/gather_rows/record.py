"""The record of gather_rows for tests and benchmarks; see `contract.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_efficient.errors import BackendError, HFEError, TokenIdError
from hf_efficient.kernels.contract import Arguments, BadInput, Compilation, Cost, KernelRecord, Sample, Tolerance
from hf_efficient.kernels.gather_rows.api import gather_rows
from hf_efficient.kernels.gather_rows.configs import DECODE_ROWS, launch_config
from hf_efficient.kernels.gather_rows.op import gather_rows_into
from hf_efficient.kernels.gather_rows.reference import gather_rows as reference_gather_rows


def draw(
    device: torch.device,
    dtype: torch.dtype,
    ids: int = 7,
    rows: int = 13,
    width: int = 24,
    cached: tuple[int, ...] | None = None,
) -> Arguments:
    """One call. `cached` names the rows that have a place in the cache, which holds other numbers than the table."""
    # Drawn on the CPU, so that every device sees the same numbers.
    generator = torch.Generator().manual_seed(1)
    arguments: Arguments = {
        "table": torch.randn((rows, width), generator=generator).to(device, dtype),
        "ids": torch.randint(0, rows, (ids,), generator=generator).to(device),
        "cache": None,
        "cache_slots": None,
        "out": None,
    }
    if cached is not None:
        slots = torch.full((rows,), -1, dtype=torch.int32)
        slots[list(cached)] = torch.arange(len(cached), dtype=torch.int32)
        cache = torch.randn((len(cached), width), generator=generator)
        arguments.update(cache=cache.to(device, dtype), cache_slots=slots.to(device))
    return arguments


def samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """Small calls that together reach every branch of the kernel."""

    def drawn(ids: int = 7, rows: int = 13, width: int = 24, cached: tuple[int, ...] | None = None) -> Arguments:
        return draw(device, dtype, ids, rows, width, cached)

    base, wide, all_cached = drawn(cached=(4, 0, 12, 7)), drawn(width=48, cached=(1, 5)), drawn(cached=(*range(13),))
    fresh = torch.zeros(7, 24, device=device, dtype=dtype)
    cases = {
        "prime sizes": drawn(ids=37, rows=53, width=71, cached=(17, 3, 52, 0, 29)),
        "no cache": drawn(),
        "one id": drawn(ids=1, cached=(2,)),
        "no id": drawn(ids=0),
        "one column": drawn(width=1),
        "one row": drawn(rows=1),
        "all rows in the cache": all_cached,
        "no row in the cache": drawn(cached=()),
        "slots outside the cache": {**base, "cache": base["cache"][:2]},
        "a given output": {**base, "out": fresh},
        "a given output without a cache": {**drawn(), "out": fresh},
        "int32 ids": {**base, "ids": base["ids"].int()},
        "several tiles a row": drawn(ids=3, width=2061, cached=(8,)),
        "more rows than a decoding step": drawn(ids=DECODE_ROWS + 1, cached=(6, 11)),
        "rows apart in memory": {
            **wide,
            "table": wide["table"][:, 24:],
            "cache": wide["cache"][:, :24],
            "ids": torch.tensor([5, 0, 1, 0, 12, 9], device=device)[::2],
        },
    }
    return [Sample(label, arguments) for label, arguments in cases.items()]


def bad_inputs(device: torch.device) -> list[BadInput]:
    """Calls that must raise before a kernel is launched."""
    good = draw(device, torch.float32, ids=4, rows=6, width=8, cached=(3, 1))

    def bad(label: str, *words: str, error: type[Exception] = HFEError, **changes: object) -> BadInput:
        return BadInput(label, {**good, **changes}, error, words)

    table, ids, cache, slots = (good[name] for name in ("table", "ids", "cache", "cache_slots"))
    out = table.new_empty(4, 8)
    return [
        bad("no table", "`table`", "NoneType", table=None),
        bad("no ids", "`ids`", "NoneType", ids=None),
        bad("a table of bytes", "`table`", "uint8", "bfloat16", table=table.to(torch.uint8)),
        bad("ids as floats", "`ids`", "float32", "int32, int64", ids=ids.float()),
        bad("a table of rank 1", "`table`", "(8,)", "[V, F]", table=table[0]),
        bad("ids of rank 2", "`ids`", "(2, 2)", "[u]", ids=ids.view(2, 2)),
        bad("a table without rows", "`table`", "(0, 8)", table=table[:0]),
        bad("a table without columns", "`table`", "(6, 0)", table=table[:, :0]),
        bad("a transposed table", "`table`", "stride", "contiguous()", table=table.t().contiguous().t()),
        bad("a cache without slots", "`cache_slots`", "both", cache_slots=None),
        bad("slots without a cache", "`cache`", "both", cache=None),
        bad("a cache in another dtype", "`cache`", "float16", "float32", cache=cache.half()),
        bad("a cache too narrow", "`cache`", "(2, 7)", "(2, 8)", cache=cache[:, :7]),
        bad("slots as int64", "`cache_slots`", "int64", "int32", cache_slots=slots.long()),
        bad("too few slots", "`cache_slots`", "(5,)", "(6,)", cache_slots=slots[:5]),
        bad("an output too long", "`out`", "(5, 8)", "(4, 8)", out=table.new_empty(5, 8)),
        bad("an output in another dtype", "`out`", "float16", "float32", out=out.half()),
        bad("a transposed output", "`out`", "stride", out=table.new_empty(8, 4).t()),
        bad("ids on another device", "on meta", "one device", ids=ids.to("meta"), cache=None, cache_slots=None),
        bad("a cache on another device", "on meta", "one device", cache=cache.to("meta")),
        bad("a negative id", "-1", "position [2]", "0..5", error=TokenIdError, ids=ids.new_tensor([0, 1, -1, 2])),
        bad("an id past the end", "6 rows", error=TokenIdError, ids=ids.new_tensor([0, 1, 2, 6])),
        bad("an unknown backend", "'cutlass'", "reference, triton", error=BackendError, backend="cutlass"),
    ]


def operators(arguments: Arguments) -> list[tuple[object, tuple[Tensor | None, ...]]]:
    """The operator, with the arguments that the public function passes."""
    table, ids, out = arguments["table"], arguments["ids"], arguments["out"]
    if out is None:
        out = table.new_zeros((ids.shape[0], table.shape[1]))
    return [(gather_rows_into, (out, table, ids, arguments["cache"], arguments["cache_slots"]))]


def compilations(capability: int) -> Iterator[Compilation]:
    """Elements of every size; tables on the device and on the host, decoding and bulk; with and without a cache."""
    from hf_efficient.kernels.gather_rows.triton_kernels import gather_rows_kernel as kernel

    for size in (2, 4, 8):
        for on_host, rows in ((False, 1), (False, DECODE_ROWS + 1), (True, DECODE_ROWS + 1)):
            for cached in (True, False):
                if size != 2 and not cached:
                    continue  # elements of another size differ in nothing but that: one of the two shows it
                config = launch_config(rows, 8192 * size, on_host)
                absent = () if cached else ("cache", "cache_slots")
                types = {name: "i32" for name in kernel.arg_names if name.islower() and name not in absent}
                types.update({name: f"*i{8 * size}" for name in ("out", "table", "cache") if name not in absent})
                types["ids"] = "*i64"
                if cached:
                    types["cache_slots"] = "*i32"
                place = "host" if on_host else "device"
                yield Compilation(
                    label=f"{8 * size} bits on the {place} from {rows} rows{' cached' * cached}",
                    kernel=kernel,
                    types=types,
                    constants={**dict.fromkeys(absent), "BLOCK_WIDTH": config.block_bytes // size},
                    num_warps=config.num_warps,
                    aligned=tuple(n for n in types if n not in ("tiles", "rows", "slots", "tiles_of_row")),
                )


def forward_cost(arguments: Arguments) -> Cost:
    """(d + u) F elements for d distinct ids; the ids, and a slot for each distinct one where there is a cache."""
    table, ids = arguments["table"], arguments["ids"]
    distinct = int(ids.unique().numel())
    moved = (distinct + ids.numel()) * table.shape[1] * table.element_size() + ids.numel() * ids.element_size()
    return Cost(bytes=moved + (0 if arguments["cache_slots"] is None else 4 * distinct), flops=0)


def eager(
    table: Tensor, ids: Tensor, *, cache: Tensor | None, cache_slots: Tensor | None, out: Tensor | None
) -> Tensor:
    """What one writes without this package, for a table on the device of the ids and slots that the cache has."""
    found = F.embedding(ids, table)
    if cache is not None and cache_slots is not None:
        slots = cache_slots[ids]
        found = torch.where((slots >= 0)[:, None], cache[slots.clamp(min=0)], found)
    return found if out is None else out.copy_(found)


RECORD = KernelRecord(
    name="gather_rows",
    api=gather_rows,
    reference=reference_gather_rows,
    samples=samples,
    bad_inputs=bad_inputs,
    # A copy is right or wrong.
    tolerances={dtype: Tolerance(0.0, 0.0) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)},
    operators=operators,
    compilations=compilations,
    forward_cost=forward_cost,
    peers={"eager": eager},
    mutates=("out",),
    # The kernel moves integers, which the interpreter has right for every dtype.
    interpreted=(torch.float64, torch.float32, torch.float16, torch.bfloat16),
)
