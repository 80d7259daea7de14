"""The record of decode_attention for tests and benchmarks; see `contract.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_efficient.errors import BackendError, HFEError
from hf_efficient.kernels.contract import Arguments, BadInput, Compilation, Cost, KernelRecord, Sample, Tolerance
from hf_efficient.kernels.decode_attention.api import decode_attention
from hf_efficient.kernels.decode_attention.configs import COMBINE_TILE, launch_config, padded_head_dim
from hf_efficient.kernels.decode_attention.op import decode_attention_forward
from hf_efficient.kernels.decode_attention.reference import decode_attention as reference_decode_attention
from hf_efficient.kernels.decode_attention.reference import visible_slots

ALL_BITS = -1  # every bit of an int64 is set


@dataclasses.dataclass(frozen=True)
class _Shape:
    batch: int = 2
    heads: int = 2
    kv_heads: int = 1
    queries: int = 1
    slots: int = 67
    head_dim: int = 16


def _draw(device: torch.device, dtype: torch.dtype, shape: _Shape) -> Arguments:
    """A full cache of which each query sees all but the slots of later queries."""
    # Drawn on the CPU, so that every device sees the same numbers.
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    cache = (shape.batch, shape.kv_heads, shape.slots, shape.head_dim)
    last = torch.arange(shape.slots - shape.queries, shape.slots, device=device)
    return {
        "q": 2 * normal(shape.batch, shape.heads, shape.queries, shape.head_dim),
        "k": normal(*cache),
        "v": normal(*cache),
        "kv_len": torch.full((shape.batch,), shape.slots, dtype=torch.int32, device=device),
        "q_pos": last.expand(shape.batch, -1),
    }


def samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """Small calls that together reach every branch of the kernels."""

    def draw(shape: _Shape = _Shape(), **changes: object) -> Arguments:  # noqa: B008  (frozen)
        return {**_draw(device, dtype, shape), **changes}

    def integers(*values: object, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def segments(rows: int, slots: int, most: int) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.randint(-1, most, (rows, slots), generator=generator, dtype=torch.int32).to(device)

    def bitmaps(*shape: int) -> Tensor:
        bounds = torch.iinfo(torch.int64)
        generator = torch.Generator().manual_seed(4)
        return torch.randint(bounds.min, bounds.max, shape, generator=generator).to(device)

    def poisoned(arguments: Arguments, lengths: Tensor) -> Arguments:
        """What must not be read is infinite. (Not NaN, so that it compares equal to itself.)"""
        k, v = arguments["k"].clone(), arguments["v"].clone()
        for row, length in enumerate(lengths.expand(k.shape[0]).tolist()):
            k[row, :, length:] = v[row, :, length:] = float("inf")
        return {**arguments, "k": k, "v": v, "kv_len": lengths}

    single = _Shape(slots=131, head_dim=64, heads=8, kv_heads=2)
    padded = integers(*([-1] * start + [0] * (67 - start) for start in (11, 0)))
    forest = _Shape(queries=5, slots=97)
    cases = {
        "prime sizes": draw(_Shape(2, 14, 2, 2, 71, 24)),
        "dynamic cache, one length for all": draw(single, kv_len=131),
        "left padding": draw(kv_segment_ids=padded),
        "static cache, lengths of their own": poisoned(
            draw(_Shape(batch=3, slots=90), q_pos=integers([64], [0], [-1])), integers(65, 1, 0)
        ),
        "a length without dimensions": poisoned(draw(q_pos=integers([40])), integers(41)[0]),
        "a group of three, many splits": draw(_Shape(1, 3, 1, 1, 290, 32)),
        "a group of four, two queries": draw(_Shape(heads=4, queries=2), q_pos=integers([60, 50], dtype=torch.int64)),
        "no group, head_dim 80": draw(_Shape(heads=3, kv_heads=3, head_dim=80)),
        "an odd head_dim": draw(_Shape(head_dim=7)),
        "a wide head": draw(_Shape(batch=1, head_dim=256, slots=40)),
        "64 queries, several tiles": draw(_Shape(1, 3, 1, 64, 70)),
        "window": draw(window=9),
        "window of one slot": draw(window=1),
        "window, queries far apart": draw(_Shape(queries=3), window=20, q_pos=integers([66, 30, -1], [5, 0, 21])),
        "holes": draw(_Shape(queries=2), kv_segment_ids=segments(2, 67, 2)),
        "a row of holes": draw(kv_segment_ids=integers([-1] * 67, [0] * 67)),
        "segments of fewer slots": draw(kv_segment_ids=segments(1, 40, 3), window=50),
        "segments of more slots": draw(kv_segment_ids=segments(2, 80, 3)),
        "segments in one word": draw(forest, kv_segment_ids=segments(2, 97, 64), segment_visibility=bitmaps(2, 5, 1)),
        "segments in two words": draw(forest, kv_segment_ids=segments(2, 97, 128), segment_visibility=bitmaps(2, 5, 2)),
        "segments at the edges of a word": draw(
            _Shape(queries=4, slots=64),
            kv_segment_ids=integers([0, 1, 62, 63, 64, 65, 127, -1] * 8),
            segment_visibility=integers([[1, 0], [-(2**63), 0], [0, -(2**63) + 1], [2**62, 2]], dtype=torch.int64),
            q_pos=integers([63] * 4),
        ),
        "segments that no word holds": draw(
            forest,
            kv_segment_ids=segments(1, 97, 200),
            segment_visibility=integers([[ALL_BITS]] * 5, dtype=torch.int64),
            window=64,
        ),
        "a query that sees no segment": draw(
            forest,
            kv_segment_ids=segments(2, 97, 3),
            segment_visibility=integers([[0], [1], [2], [4], [0]], dtype=torch.int64),
        ),
        "a scale of its own": draw(scale=0.01),
        "one slot": draw(_Shape(slots=1)),
        "no slot": draw(_Shape(slots=0, queries=0), q_pos=integers([3], [0]), q=draw()["q"]),
        "no query": draw(_Shape(queries=0)),
        "no batch row": draw(_Shape(batch=0)),
    }
    cases["heads beside each other in memory"] = {
        name: value.transpose(1, 2).contiguous().transpose(1, 2) if name in "qkv" else value
        for name, value in draw(single).items()
    }
    packed = draw(_Shape(batch=4, head_dim=32, slots=68))
    cases["every other element in memory"] = {
        "q": packed["q"][::2, :, :, 16:],
        "k": packed["k"][::2, :, 1::2, :16],
        "v": packed["v"][1::2, :, ::2, 16:],
        "kv_len": integers(30, 99, 20, 99)[::2],
        "q_pos": integers([31, 7], [29, 7]).t()[:1].t(),
        "kv_segment_ids": segments(68, 2, 3).t(),
    }
    shared = draw(_Shape(batch=1))
    cases["one cache for all rows"] = {
        **shared,
        "q": draw(_Shape(batch=3))["q"],
        "k": shared["k"].expand(3, -1, -1, -1),
        "v": shared["v"].expand(3, -1, -1, -1),
        "kv_len": shared["kv_len"].expand(3),
        "q_pos": integers([20], [66], [40]),
    }
    return [Sample(label, arguments) for label, arguments in cases.items()]


def bad_inputs(device: torch.device) -> list[BadInput]:
    """Calls that must raise before a kernel is launched."""
    good = _draw(device, torch.float32, _Shape(heads=4, kv_heads=2))
    q, k, v, q_pos = good["q"], good["k"], good["v"], good["q_pos"]
    seg = torch.zeros(2, 67, dtype=torch.int32, device=device)
    segment_visibility = torch.ones(2, 1, 1, dtype=torch.int64, device=device)
    wide = torch.zeros(2, 2, 67, 272, device=device)

    def bad(label: str, *words: str, error: type[Exception] = HFEError, **changes: object) -> BadInput:
        return BadInput(label, {**good, **changes}, error, words)

    return [
        bad("no cache", "`k`", "NoneType", k=None),
        bad("no length", "`kv_len`", "NoneType", kv_len=None),
        bad("a length of text", "`kv_len`", "str", kv_len="67"),
        bad("queries of integers", "`q`", "int64", q=q.long()),
        bad("a cache in another dtype", "`v`", "float16", "float32", v=v.half()),
        bad("queries without heads", "`q`", "(2, 1, 16)", "[B, Hq, Q, D]", q=q[:, 0]),
        bad("keys without heads", "`k`", "(2, 67, 16)", "[B, Hkv, C, D]", k=k[:, 0]),
        bad("a cache of fewer rows", "`k`", "(1, 2, 67, 16)", "(2, 2, 67, 16)", k=k[:1]),
        bad("values of other slots", "`v`", "(2, 2, 66, 16)", "that of `k`", v=v[:, :, 1:]),
        bad("heads that make no groups", "3 heads", "2", "multiple", q=q[:, :3]),
        bad(
            "a head_dim too large", "head_dim is 272", "256", q=torch.zeros(2, 4, 1, 272, device=device), k=wide, v=wide
        ),
        bad("keys of a strided head_dim", "`k`", "stride", "contiguous()", k=torch.cat([k, k], -1)[..., ::2]),
        bad("positions as floats", "`q_pos`", "float32", "int32, int64", q_pos=q_pos.float()),
        bad("a position too many", "`q_pos`", "(2, 2)", "[B, Q]", q_pos=q_pos.expand(2, 2)),
        bad("positions without rows", "`q_pos`", "(2,)", "[B, Q]", q_pos=q_pos[:, 0]),
        bad("lengths as floats", "`kv_len`", "float32", kv_len=good["kv_len"].float()),
        bad("a length too many", "`kv_len`", "(3,)", "[B] (here 2)", kv_len=seg[0, :3]),
        bad("more slots than there are", "`kv_len`", "68", "67 slots", kv_len=68),
        bad("an empty window", "`window` is 0", "None", window=0),
        bad("segments of other rows", "`kv_segment_ids`", "(3, 67)", "[B, L]", kv_segment_ids=seg[:1].expand(3, 67)),
        bad(
            "visibility without segments",
            "`segment_visibility`",
            "`kv_segment_ids`",
            segment_visibility=segment_visibility,
        ),
        bad(
            "visibility in half words",
            "`segment_visibility`",
            "int32",
            "int64",
            kv_segment_ids=seg,
            segment_visibility=segment_visibility.int(),
        ),
        bad(
            "visibility of more queries",
            "`segment_visibility`",
            "(2, 3, 1)",
            "[B, Q, W]",
            kv_segment_ids=seg,
            segment_visibility=segment_visibility.expand(2, 3, 1),
        ),
        bad("positions on another device", "on meta", "one device", q_pos=q_pos.to("meta")),
        bad("a gradient", "gradient", "torch.no_grad()", k=k.clone().requires_grad_()),
        bad("an unknown backend", "'cutlass'", "reference, triton", error=BackendError, backend="cutlass"),
    ]


def operators(arguments: Arguments) -> list[tuple[object, tuple[object, ...]]]:
    """The operator, with the arguments that the public function passes."""
    lengths = arguments["kv_len"]
    max_kv_len = arguments["k"].shape[2] if isinstance(lengths, Tensor) else lengths
    handed = (
        *(arguments[name] for name in ("q", "k", "v")),
        lengths if isinstance(lengths, Tensor) else None,
        arguments["q_pos"],
        *(arguments.get(name) for name in ("kv_segment_ids", "segment_visibility")),
        max_kv_len,
        arguments.get("window"),
        arguments.get("scale", arguments["q"].shape[3] ** -0.5),
    )
    return [(decode_attention_forward, handed)]


def compilations(capability: int) -> Iterator[Compilation]:
    """Every tile of the table with every optional argument, and plain kernels."""
    from hf_efficient.kernels.decode_attention.triton_kernels import combine_kernel, split_kv_kernel

    sizes = {"bf16": 2, "fp16": 2, "fp32": 4}
    names = split_kv_kernel.arg_names
    rows = ("out", "partial", "q", "k", "v")
    optional = {
        "kv_len": "*i64",
        "kv_segment_ids": "*i32",
        "segment_visibility": "*i64",
        "window": "i32",
        "partial": "*fp32",
    }
    cases = (
        # Tiles of 16 rows and the largest; those of 32 need less than these.
        *(("bf16", head_dim, 4, queries, True) for head_dim in (64, 256) for queries in (1, 64)),
        ("bf16", 128, 4, 64, True),
        ("fp16", 80, 7, 1, True),
        *(("fp32", head_dim, 4, 1, True) for head_dim in (64, 128, 256)),
        ("bf16", 64, 4, 1, False),
    )
    # All devices share the tiles of 8.6, which has the least shared memory a program; two cases do for the others.
    for element, head_dim, group, queries, everything in cases if capability in (86, 90) else (cases[1], cases[-1]):
        config = launch_config(queries * group, head_dim, sizes[element])
        rest = {"kv_len": "*i64"} if not everything else optional
        constants = {
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": padded_head_dim(head_dim),
            "WORDS": 2 if everything else 0,
            "WORDS_PADDED": 2 if everything else 1,
            "SINGLE_SPLIT": not everything,
            "OVERLAP": everything and capability >= 90,
        }
        absent = {name: None for name in optional if name not in rest}
        types = {
            **{name: "i32" for name in names if name not in constants and name not in optional},
            **dict.fromkeys(("out", "q", "k", "v"), f"*{element}"),
            "q_pos": "*i64",
            "qk_scale": "fp32",
            **rest,
        }
        yield Compilation(
            label=f"split {element} head_dim {head_dim}, {config.block_m} rows, {'all' if everything else 'none'} on",
            kernel=split_kv_kernel,
            types={name: types[name] for name in names if name in types},
            constants={**constants, **absent},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            aligned=tuple(name for name in types if name.startswith(("q_s", "k_s", "v_s")) or name in rows),
        )
    for element, head_dim in (("bf16", 64), ("fp32", 256)):
        yield Compilation(
            label=f"combine {element} head_dim {head_dim}",
            kernel=combine_kernel,
            types={"out": f"*{element}", "partial": "*fp32", "splits": "i32"},
            constants={
                "HEAD_DIM": head_dim,
                "BLOCK_SPLITS": COMBINE_TILE // padded_head_dim(head_dim),
                "BLOCK_D": padded_head_dim(head_dim),
                "OVERLAP": capability >= 90,
            },
            num_warps=4,
            aligned=("out", "partial"),
        )


def _visible(arguments: Arguments) -> Tensor:
    """bool [B, Q, C]: which slots each query sees."""
    q, k = arguments["q"], arguments["k"]
    others = {name: arguments.get(name) for name in ("window", "kv_segment_ids", "segment_visibility")}
    seen = visible_slots(k.shape[2], arguments["kv_len"], arguments["q_pos"], **others)
    return seen.expand(q.shape[0], -1, -1)


def forward_cost(arguments: Arguments) -> Cost:
    """K and V of every slot that some query sees, once for all heads of a group; queries and output."""
    q, k = arguments["q"], arguments["k"]
    seen = _visible(arguments)
    slots, pairs = int(seen.any(1).sum()), int(seen.sum())
    heads, head_dim = q.shape[1], q.shape[3]
    moved = (2 * slots * k.shape[1] * head_dim + 2 * q.numel()) * q.element_size()
    return Cost(bytes=moved, flops=4 * pairs * heads * head_dim)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | int,
    q_pos: Tensor,
    window: int | None = None,
    kv_segment_ids: Tensor | None = None,
    segment_visibility: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """What stock models do with a static cache: PyTorch's attention over all of it, under a boolean mask."""
    mask = visible_slots(k.shape[2], kv_len, q_pos, window, kv_segment_ids, segment_visibility)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


RECORD = KernelRecord(
    name="decode_attention",
    api=decode_attention,
    reference=reference_decode_attention,
    samples=samples,
    bad_inputs=bad_inputs,
    # Half precision: the softmax is rounded, and the result, 2^-9 and 2^-12 at most each.
    tolerances={
        torch.float32: Tolerance(3e-6, 0.0),
        torch.float16: Tolerance(5e-4, 0.0),
        torch.bfloat16: Tolerance(4e-3, 0.0),
    },
    operators=operators,
    compilations=compilations,
    forward_cost=forward_cost,
    peers={"sdpa": sdpa},
)
