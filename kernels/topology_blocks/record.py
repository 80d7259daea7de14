"""The record of topology_blocks for tests and benchmarks; see `contract.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_efficient.errors import BackendError, HFEError
from hf_efficient.kernels.contract import Arguments, BadInput, Compilation, Cost, KernelRecord, Sample, Tolerance
from hf_efficient.kernels.topology_blocks.api import topology_blocks
from hf_efficient.kernels.topology_blocks.block_lists import BLOCK
from hf_efficient.kernels.topology_blocks.configs import CLASSIFY_WARPS, CLASSIFY_WIDTH, SUMMARISE_WARPS
from hf_efficient.kernels.topology_blocks.op import topology_blocks_forward
from hf_efficient.kernels.topology_blocks.reference import WORD
from hf_efficient.kernels.topology_blocks.reference import topology_blocks as reference_topology_blocks


def fan(paths: int, shared: int, each: int, device: torch.device, rows: int = 1) -> Arguments:
    """A trunk of `shared` tokens, `paths` siblings of `each` tokens, and a conclusion of `shared` that sees all."""
    lengths = torch.tensor([shared, *([each] * paths), shared])
    segments = torch.arange(paths + 2, dtype=torch.int32).repeat_interleave(lengths).expand(rows, -1).contiguous()
    members = torch.zeros(paths + 2, paths + 2, dtype=torch.bool)
    members[:, 0] = members[paths + 1] = True
    members.fill_diagonal_(True)
    return {"segment_ids": segments.to(device), "segment_visibility": bitmaps(members)[None].to(device)}


def bitmaps(members: Tensor) -> Tensor:
    """Bitmaps int64 [N, W] of the sets whose members [N, M] are true."""
    words = max(1, -(-members.shape[1] // WORD))
    padded = torch.nn.functional.pad(members, (0, words * WORD - members.shape[1])).view(-1, words, WORD)
    return (padded.long() << torch.arange(WORD)).sum(-1)


def _random(device: torch.device, rows: int, length: int, segments: int, words: int, shared: bool = False) -> Arguments:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(-1, segments, (rows, length), generator=generator, dtype=torch.int32)
    bounds = torch.iinfo(torch.int64)
    segment_visibility = torch.randint(
        bounds.min, bounds.max, (1 if shared else rows, segments, words), generator=generator
    )
    return {"segment_ids": drawn.sort(dim=1).values.to(device), "segment_visibility": segment_visibility.to(device)}


def samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """Small calls that between them reach every branch of the kernels. No argument has the dtype."""
    plain = fan(2, 131, 257, device)
    cases = {
        "prime sizes": plain,
        "whole blocks": fan(3, BLOCK, 2 * BLOCK, device, rows=2),
        "one segment": fan(0, 3 * BLOCK, 0, device),
        "one token": fan(0, 1, 0, device) | {"segment_ids": plain["segment_ids"][:, :1]},
        "seventy paths": fan(70, 90, 40, device),
        "random bitmaps of three words": _random(device, 2, 700, 150, 3),
        "one table for all rows": _random(device, 3, 300, 40, 1, shared=True),
        "segments that no word holds": _random(device, 1, 400, 90, 1),
        "more blocks than a program looks at": fan(2, 33 * BLOCK, 32 * BLOCK, device),
        "no row": _random(device, 0, 130, 3, 1),
        "no token": _random(device, 2, 0, 3, 1),
        "no segment": {**plain, "segment_visibility": plain["segment_visibility"][:, :0]},
        "no word": {**plain, "segment_visibility": plain["segment_visibility"][..., :0]},
        "only holes": {**plain, "segment_ids": torch.full_like(plain["segment_ids"], -1)},
    }
    padded = plain["segment_ids"].clone()
    padded[:, :150] = -1
    padded[:, 400] = -1
    cases["padding before, and a hole"] = {**plain, "segment_ids": padded}
    cases["every other element in memory"] = {
        "segment_ids": torch.stack((plain["segment_ids"],) * 2, -1)[..., 0],
        "segment_visibility": torch.stack((plain["segment_visibility"],) * 2, -1)[..., 1],
    }
    interleaved = plain["segment_ids"].view(-1)[torch.randperm(776, generator=torch.Generator().manual_seed(1))]
    cases["segments in no order"] = {**plain, "segment_ids": interleaved[None]}
    return [Sample(label, arguments) for label, arguments in cases.items()]


def bad_inputs(device: torch.device) -> list[BadInput]:
    """Calls that must raise before a kernel is launched."""
    good = fan(2, 100, 50, device, rows=2)
    segments, segment_visibility = good["segment_ids"], good["segment_visibility"]

    def bad(label: str, *words: str, error: type[Exception] = HFEError, **changes: object) -> BadInput:
        return BadInput(label, {**good, **changes}, error, words)

    return [
        bad("no bitmaps", "`segment_visibility`", "NoneType", segment_visibility=None),
        bad("long segments", "`segment_ids`", "int64", "int32", segment_ids=segments.long()),
        bad(
            "bitmaps in half words",
            "`segment_visibility`",
            "int32",
            "int64",
            segment_visibility=segment_visibility.int(),
        ),
        bad("segments without rows", "`segment_ids`", "(300,)", "[B, S]", segment_ids=segments[0]),
        bad(
            "bitmaps without rows",
            "`segment_visibility`",
            "(4, 1)",
            "[B, N, W]",
            segment_visibility=segment_visibility[0],
        ),
        bad(
            "bitmaps of other rows",
            "`segment_visibility`",
            "(3, 4, 1)",
            "2 rows",
            segment_visibility=segment_visibility.expand(3, -1, -1),
        ),
        bad("bitmaps on another device", "on meta", "one device", segment_visibility=segment_visibility.to("meta")),
        bad("an unknown backend", "'cutlass'", "reference, triton", error=BackendError, backend="cutlass"),
    ]


def operators(arguments: Arguments) -> list[tuple[object, tuple[Tensor, ...]]]:
    """The operator, with the arguments that the public function passes."""
    return [(topology_blocks_forward, (arguments["segment_ids"], arguments["segment_visibility"]))]


def compilations(capability: int) -> Iterator[Compilation]:
    """Both kernels; all devices have the same."""
    from hf_efficient.kernels.topology_blocks.triton_kernels import classify_kernel, summarise_kernel

    tensors = {
        "present": "*i64",
        "seen": "*i64",
        "segment_ids": "*i32",
        "segment_visibility": "*i64",
        "counts": "*i32",
        "lists": "*i32",
    }
    for kernel, constants, warps in (
        (summarise_kernel, {"BLOCK": BLOCK}, SUMMARISE_WARPS),
        (classify_kernel, {"BLOCK_COUNT": CLASSIFY_WIDTH}, CLASSIFY_WARPS),
    ):
        names = [name for name in kernel.arg_names if name not in constants]
        yield Compilation(
            label=f"{kernel.__name__} {next(iter(constants.values()))}",
            kernel=kernel,
            types={name: tensors.get(name, "i32") for name in names},
            constants=constants,
            num_warps=warps,
            aligned=tuple(name for name in names if name in tensors),
        )


def forward_cost(arguments: Arguments) -> Cost:
    """Segments and bitmaps once, and the lists; a few word operations for each pair of blocks, in both directions."""
    segments, segment_visibility = arguments["segment_ids"], arguments["segment_visibility"]
    rows, length = segments.shape
    blocks = -(-length // BLOCK)
    written = rows * 4 * (4 * blocks * (blocks + 1)) + 8 * rows * blocks * segment_visibility.shape[2]
    return Cost(
        bytes=segments.nbytes + segment_visibility.nbytes + written,
        flops=2 * 5 * rows * blocks**2 * segment_visibility.shape[2],
    )


RECORD = KernelRecord(
    name="topology_blocks",
    api=topology_blocks,
    reference=reference_topology_blocks,
    samples=samples,
    bad_inputs=bad_inputs,
    # No argument is a floating-point number: results are right or wrong.
    tolerances={torch.float32: Tolerance(0.0, 0.0)},
    operators=operators,
    compilations=compilations,
    forward_cost=forward_cost,
    interpreted=(torch.float32,),
)
