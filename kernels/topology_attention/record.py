"""The record of topology_attention for tests and benchmarks; see `contract.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_efficient.errors import BackendError, HFEError
from hf_efficient.kernels.contract import Arguments, BadInput, Compilation, Cost, KernelRecord, Sample, Tolerance
from hf_efficient.kernels.decode_attention.configs import padded_head_dim
from hf_efficient.kernels.topology_attention.api import topology_attention
from hf_efficient.kernels.topology_attention.configs import launch_config
from hf_efficient.kernels.topology_attention.op import topology_attention_backward, topology_attention_forward
from hf_efficient.kernels.topology_attention.reference import topology_attention as reference_topology_attention
from hf_efficient.kernels.topology_attention.reference import visible_pairs
from hf_efficient.kernels.topology_blocks.api import topology_blocks
from hf_efficient.kernels.topology_blocks.block_lists import BLOCK, BlockLists
from hf_efficient.kernels.topology_blocks.record import bitmaps, fan
from hf_efficient.kernels.validate import rows_contiguous


def _draw(
    device: torch.device, dtype: torch.dtype, topology: Arguments, heads: int = 2, kv_heads: int = 1, head_dim: int = 16
) -> Arguments:
    # Drawn on the CPU, so that every device sees the same numbers.
    generator = torch.Generator().manual_seed(1)
    batch, length = topology["segment_ids"].shape

    def normal(count: int) -> Tensor:
        # The layout of a model's projections.
        return torch.randn((batch, length, count, head_dim), generator=generator).to(device, dtype).transpose(1, 2)

    return {"q": 2 * normal(heads), "k": normal(kv_heads), "v": normal(kv_heads), **topology}


def _nested(device: torch.device) -> Arguments:
    """Two rows: a path with a block of its own, and a graph of steps; padding after, and before, with holes between."""
    lengths = [[30, 40, 20, 25, 15, 33, 27, 10], [-25, 50, 31, 44, 20, 20, 10, 0]]
    parents = [[[], [0], [1], [1], [2, 3], [0], [4, 5], []], [[], [0], [0], [1], [1, 2], [3, 4], [0], []]]
    segments, segment_visibility = torch.full((2, 210), -1, dtype=torch.int32), torch.zeros(2, 8, 8, dtype=torch.bool)
    for row in range(2):
        at = max(0, -lengths[row][0])
        for segment, length in enumerate(map(abs, lengths[row][:-1])):
            segments[row, at : at + length] = segment
            at += length
            segment_visibility[row, segment, segment] = True
            for parent in parents[row][segment]:
                segment_visibility[row, segment] |= segment_visibility[row, parent]
    segments[1, 130] = -1
    return {
        "segment_ids": segments.to(device),
        "segment_visibility": torch.stack([bitmaps(a) for a in segment_visibility]).to(device),
    }


def samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    """Small calls that together reach every branch of the kernels."""

    def draw(topology: Arguments | None = None, **sizes: int) -> Arguments:
        return _draw(device, dtype, topology or fan(2, 37, 41, device), **sizes)

    blocks = fan(2, BLOCK, BLOCK, device)
    random = torch.Generator().manual_seed(5)
    scattered = torch.randint(-1, 5, (2, 150), generator=random, dtype=torch.int32).to(device)
    members = torch.rand(5, 5, generator=random) < 0.5
    cases = {
        "prime sizes": draw(fan(2, 19, 31, device), heads=4, kv_heads=2, head_dim=24),
        "one segment": draw(fan(0, 75, 0, device)),
        "nested blocks and steps, padding on either side": draw(_nested(device)),
        "full blocks, visible and not": draw(blocks),
        "full blocks, the end of one missing": draw(
            {**blocks, "segment_ids": blocks["segment_ids"][:, :-5].contiguous()}
        ),
        "seventy paths, two words": draw(fan(70, 10, 2, device)),
        "a hundred and forty paths, three words": draw(fan(140, 5, 1, device)),
        "segments in no order": draw(
            {"segment_ids": scattered, "segment_visibility": bitmaps(members)[None].to(device)}
        ),
        "a group of seven": draw(fan(2, 20, 15, device), heads=7),
        "head_dim 96": draw(head_dim=96),
        "an odd head_dim": draw(head_dim=7),
        "head_dim 128": draw(head_dim=128),
        "head_dim 256": draw(fan(1, 20, 30, device), head_dim=256),
        "a scale of its own": draw() | {"scale": 0.02},
        "nine tokens": draw(fan(1, 3, 3, device)),
        "no token": draw({**blocks, "segment_ids": blocks["segment_ids"][:, :0]}),
        "no row": draw({**blocks, "segment_ids": blocks["segment_ids"][:0]}),
        "only holes": draw({**blocks, "segment_ids": torch.full_like(blocks["segment_ids"][:, :70], -1)}),
    }
    shared = draw(fan(2, 30, 40, device, rows=3))
    cases["one topology for all rows"] = {**shared, "segment_ids": shared["segment_ids"][:1]}
    given = fan(2, 37, 41, device)
    cases["block lists given"] = draw(given) | {"blocks": topology_blocks(**given, backend="reference")}
    cases["heads first in memory"] = {n: x.contiguous() if n in "qkv" else x for n, x in draw(head_dim=64).items()}
    wider = draw(fan(2, 37, 41, device), head_dim=48)
    cases["strided rows"] = {n: x[..., 8:40] if n in "qkv" else x for n, x in wider.items()}
    cases["a strided head_dim"] = {n: x[..., ::2] if n in "qkv" else x for n, x in wider.items()}
    single = draw()
    cases["one key head, expanded"] = single | {n: single[n].expand(-1, 2, -1, -1) for n in "kv"}
    holes = draw(_nested(device))
    hole = (holes["segment_ids"] < 0)[:, None, :, None]
    # Infinite, not NaN, so that arguments can be compared with themselves.
    cases["holes that hold infinity"] = {
        n: x.masked_fill(hole, float("inf")) if n in "qkv" else x for n, x in holes.items()
    }
    return [Sample(label, arguments) for label, arguments in cases.items()]


def bad_inputs(device: torch.device) -> list[BadInput]:
    """Calls that must raise before a kernel is launched."""
    topology = fan(2, 10, 5, device, rows=2)
    good = _draw(device, torch.float32, topology, heads=4, kv_heads=2)
    q, k, v, segments, segment_visibility = (
        good[name] for name in ("q", "k", "v", "segment_ids", "segment_visibility")
    )
    lists = topology_blocks(segments, segment_visibility, backend="reference")
    wide = torch.zeros(2, 2, 30, 272, device=device)

    def bad(label: str, *words: str, error: type[Exception] = HFEError, **changes: object) -> BadInput:
        return BadInput(label, {**good, **changes}, error, words)

    return [
        bad("no keys", "`k`", "NoneType", k=None),
        bad("queries of integers", "`q`", "int64", q=q.long()),
        bad("keys in another dtype", "`k`", "float16", "float32", k=k.half()),
        bad("queries without heads", "`q`", "(2, 30, 16)", "[B, Hq, S, D]", q=q[:, 0]),
        bad("keys of fewer tokens", "`k`", "(2, 2, 29, 16)", "(2, 2, 30, 16)", k=k[:, :, 1:]),
        bad("values of other rows", "`v`", "(1, 2, 30, 16)", "that of `k`", v=v[:1]),
        bad("heads that make no groups", "3 heads", "2", "multiple", q=q[:, :3]),
        bad("a head_dim too large", "head_dim is 272", "256", q=wide.expand(2, 2, 30, 272), k=wide, v=wide),
        bad("long segments", "`segment_ids`", "int64", "int32", segment_ids=segments.long()),
        bad("segments of fewer tokens", "`segment_ids`", "(2, 29)", "[B, S]", segment_ids=segments[:, 1:]),
        bad("segments of other rows", "`segment_ids`", "(3, 30)", segment_ids=segments[:1].expand(3, -1)),
        bad(
            "bitmaps in half words",
            "`segment_visibility`",
            "int32",
            "int64",
            segment_visibility=segment_visibility.int(),
        ),
        bad(
            "bitmaps without rows",
            "`segment_visibility`",
            "(4, 1)",
            "[B, N, W]",
            segment_visibility=segment_visibility[0],
        ),
        bad("a negative scale", "`scale` is -1", "positive", scale=-1.0),
        bad("lists of another length", "blocks.lists", "topology_blocks", blocks=BlockLists(*(x[:1] for x in lists))),
        bad("segments on another device", "on meta", "one device", segment_ids=segments.to("meta")),
        bad("an unknown backend", "'cutlass'", "reference, triton", error=BackendError, backend="cutlass"),
    ]


def operators(arguments: Arguments) -> list[tuple[object, tuple[object, ...]]]:
    """The operators, with the arguments that the public function passes."""
    q, k, v, segment_ids, segment_visibility = (
        arguments[name] for name in ("q", "k", "v", "segment_ids", "segment_visibility")
    )
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    blocks = arguments.get("blocks") or topology_blocks(segment_ids, segment_visibility, backend="reference")
    scale = arguments.get("scale", q.shape[3] ** -0.5)
    topology = (segment_ids, segment_visibility, *blocks)
    out, lse = topology_attention_forward(q, k, v, *topology, scale)
    return [
        (topology_attention_forward, (q, k, v, *topology, scale)),
        (topology_attention_backward, (torch.ones_like(out), q, k, v, out, lse, *topology, scale)),
    ]


def compilations(capability: int) -> Iterator[Compilation]:
    """Every kernel in every configuration that a device of this capability may pick, and for an odd tensor layout.

    float32, with the largest tiles, is compiled where there is least shared memory. Where the tiles are those of 8.6,
    one head_dim is enough.
    """
    from hf_efficient.kernels.topology_attention.triton_gradients import dkdv_kernel, dq_kernel
    from hf_efficient.kernels.topology_attention.triton_kernels import forward_kernel

    kernels = {
        "forward": (forward_kernel, ("q",)),
        "dq": (dq_kernel, ("q", "dout")),
        "dkdv": (dkdv_kernel, ("q", "dout")),
    }
    fixed = {"lse": "*fp32", "delta": "*fp32", "scale": "fp32", "qk_scale": "fp32"}
    fixed |= {"segment_ids": "*i32", "counts": "*i32", "lists": "*i32", "segment_visibility": "*i64", "present": "*i64"}
    tensors = ("out", "q", "k", "v", "dout", "dq", "dk", "dv")
    odd = ("fp16", 96, 2)
    plain = [("bf16", 64, 1), ("bf16", 256, 1)]
    cases = {86: [*plain, ("fp32", 256, 1)], 90: [*plain, odd]}.get(capability, [odd])
    for name, (kernel, by_queries) in kernels.items():
        for element, head_dim, words in cases:
            config = launch_config(name, head_dim, 4 if element == "fp32" else 2, divmod(capability, 10))
            padded = padded_head_dim(head_dim)
            use_tma = config.use_tma and (element, head_dim, words) != odd
            constants = {
                "GROUP": 4,
                "HEAD_DIM": head_dim,
                "WORDS": words,
                "BLOCK_D": padded,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK": BLOCK,
                "NUM_STAGES": config.num_stages,
                "USE_TMA": use_tma,
            }
            types = {}
            for argument in kernel.arg_names:
                if argument in tensors:
                    types[argument] = f"*{element}"
                elif argument not in constants:
                    types[argument] = fixed.get(argument, "i32")
                if use_tma and argument in ("q", "k", "v", "dout"):
                    rows = config.block_m if argument in by_queries else config.block_n
                    types[argument] = f"tensordesc<{element}[1, 1, {rows}, {padded}]>"
                if use_tma and name == "dkdv" and argument in ("lse", "delta"):
                    types[argument] = f"tensordesc<fp32[1, {config.block_m}]>"
            yield Compilation(
                label=f"{name} {element} head_dim {head_dim}, {'TMA' if use_tma else 'pointers'}",
                kernel=kernel,
                types=types,
                constants=constants,
                num_warps=config.num_warps,
                aligned=tuple(n for n, kind in types.items() if kind[0] == "*" or "_stride_" in n),
            )


def _sizes(arguments: Arguments) -> tuple[int, int, int, int]:
    """Bytes of q, of k and of v together, visible pairs of all heads, and the head_dim."""
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    pairs = int(visible_pairs(arguments["segment_ids"], arguments["segment_visibility"]).sum()) * q.shape[1]
    pairs *= q.shape[0] // arguments["segment_ids"].shape[0] if len(arguments["segment_ids"]) else 1
    return q.nbytes, k.nbytes + v.nbytes, pairs, q.shape[3]


def forward_cost(arguments: Arguments) -> Cost:
    """q, k and v read, the output written; two products for each visible pair."""
    q, kv, pairs, head_dim = _sizes(arguments)
    return Cost(bytes=2 * q + kv, flops=4 * pairs * head_dim)


def backward_cost(arguments: Arguments) -> Cost:
    """q, k, v, the output and its gradient read, three gradients written; five products for each visible pair."""
    q, kv, pairs, head_dim = _sizes(arguments)
    return Cost(bytes=4 * q + 2 * kv, flops=10 * pairs * head_dim)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor,
    segment_visibility: Tensor,
    blocks: BlockLists | None = None,
    scale: float | None = None,
) -> Tensor:
    """What stock models do: PyTorch's attention under a dense boolean mask."""
    mask = visible_pairs(segment_ids, segment_visibility)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


RECORD = KernelRecord(
    name="topology_attention",
    api=topology_attention,
    reference=reference_topology_attention,
    samples=samples,
    bad_inputs=bad_inputs,
    # Half precision: the softmax is rounded, and the result, 2^-9 and 2^-12 at most each; so are the gradients of the
    # scores.
    tolerances={
        torch.float32: Tolerance(2e-6, 4e-6),
        torch.float16: Tolerance(1e-3, 2e-3),
        torch.bfloat16: Tolerance(8e-3, 1e-2),
    },
    operators=operators,
    compilations=compilations,
    forward_cost=forward_cost,
    backward_cost=backward_cost,
    peers={"sdpa": sdpa},
    differentiable=("q", "k", "v"),
)
