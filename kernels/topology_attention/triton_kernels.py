"""Triton kernels of topology_attention and the functions that launch them. No checks of arguments: see `api.py`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_efficient.kernels.decode_attention.configs import padded_head_dim
from hf_efficient.kernels.topology_attention.configs import LaunchConfig, capability_of, launch_config
from hf_efficient.kernels.topology_blocks.block_lists import BLOCK

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False


if HAVE_TRITON:

    @triton.jit
    def load_tile(
        source,
        batch,
        head,
        start,
        length,
        stride_b,
        stride_h,
        stride_s,
        ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
        DESCRIPTORS: tl.constexpr,
    ):
        """Rows [start, start + ROWS) of one head, [ROWS, BLOCK_WIDTH]; zeros past the end and the width."""
        if DESCRIPTORS:
            return source.load([batch, head, start, 0]).reshape(ROWS, BLOCK_WIDTH)
        else:
            row = start + tl.arange(0, ROWS)
            dim = tl.arange(0, BLOCK_WIDTH)
            at = source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
            at += row.to(tl.int64)[:, None] * stride_s + dim[None, :]
            return tl.load(at, mask=(row < length)[:, None] & (dim < WIDTH)[None, :], other=0.0)

    @triton.jit
    def visible(
        queries,
        keys,
        query_segment,
        key_segment,
        segment_visibility,
        present,
        WORDS: tl.constexpr,
        KEYS_FIRST: tl.constexpr,
    ):
        """Which keys [N] each query [M] sees: [M, N], or [N, M] with KEYS_FIRST.

        `segment_visibility` is that of the batch row, `present` the bitmap of the segments in the block of the keys.
        """
        bit = (key_segment & 63).to(tl.int64)
        seen = keys[:, None] <= queries[None, :] if KEYS_FIRST else queries[:, None] >= keys[None, :]
        descends = seen & False
        for word in range(WORDS):
            if WORDS == 1 or tl.load(present + word) != 0:
                ancestors = tl.load(
                    segment_visibility + query_segment.to(tl.int64) * WORDS + word, mask=query_segment >= 0, other=0
                )
                mine = (key_segment >> 6) == word
                if KEYS_FIRST:
                    descends |= mine[:, None] & (((ancestors[None, :] >> bit[:, None]) & 1) != 0)
                else:
                    descends |= mine[None, :] & (((ancestors[:, None] >> bit[None, :]) & 1) != 0)
        return seen & descends

    @triton.jit
    def segments_of(segment_ids, index, length, count):
        """Segments of the tokens at `index`; -1 for holes, past the end, and without a row in the bitmaps."""
        segment = tl.load(segment_ids + index, mask=index < length, other=-1)
        return tl.where(segment < count, segment, -1)

    @triton.jit(do_not_specialize=["length", "blocks", "segments"])
    def forward_kernel(
        out,
        lse,
        q,
        k,
        v,
        segment_ids,
        segment_visibility,
        counts,
        lists,
        present,
        length,
        blocks,
        segments,
        heads,
        score_scale,
        q_stride_b,
        q_stride_h,
        q_stride_s,
        k_stride_b,
        k_stride_h,
        k_stride_s,
        v_stride_b,
        v_stride_h,
        v_stride_s,
        segment_stride,
        segment_visibility_stride,
        GROUP: tl.constexpr,
        WIDTH: tl.constexpr,
        WORDS: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
        BLOCK_QUERIES: tl.constexpr,
        BLOCK_KEYS: tl.constexpr,
        BLOCK: tl.constexpr,
        STAGES: tl.constexpr,
        DESCRIPTORS: tl.constexpr,
    ):
        # The last queries see most, and come first: no long program is left for the end.
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        head = tl.program_id(1) % heads
        batch = tl.program_id(1) // heads
        row = (batch * (segment_stride > 0)).to(tl.int64)
        kv_head = head // GROUP
        start = tile * BLOCK_QUERIES
        block = start // BLOCK
        PARTS: tl.constexpr = BLOCK // BLOCK_KEYS

        counts += row * 4 * blocks + block
        lists += (row * 4 * blocks + block) * blocks
        q_tile = load_tile(
            q, batch, head, start, length, q_stride_b, q_stride_h, q_stride_s,
            BLOCK_QUERIES, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
        )  # fmt: skip
        highest = tl.full([BLOCK_QUERIES], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_QUERIES], dtype=tl.float32)
        mixed = tl.zeros([BLOCK_QUERIES, BLOCK_WIDTH], dtype=tl.float32)

        # Blocks that every query of the tile sees wholly.
        count = tl.load(counts) * PARTS
        key_block = tl.load(lists)
        for at in tl.range(0, count, num_stages=STAGES):
            first = key_block * BLOCK + (at % PARTS) * BLOCK_KEYS
            key_block = tl.load(lists + tl.minimum((at + 1) // PARTS, blocks - 1))
            k_tile = load_tile(
                k, batch, kv_head, first, length, k_stride_b, k_stride_h, k_stride_s,
                BLOCK_KEYS, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
            )  # fmt: skip
            score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            new_highest = tl.maximum(highest, tl.max(score, axis=1) * score_scale)
            weight = tl.exp2(score * score_scale - new_highest[:, None])
            shrink = tl.exp2(highest - new_highest)
            total = total * shrink + tl.sum(weight, axis=1)
            mixed = mixed * shrink[:, None]
            v_tile = load_tile(
                v, batch, kv_head, first, length, v_stride_b, v_stride_h, v_stride_s,
                BLOCK_KEYS, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
            )  # fmt: skip
            mixed = tl.dot(weight.to(v_tile.dtype), v_tile, mixed, input_precision="ieee")
            highest = new_highest

        # Blocks that need a mask: few.
        query = start + tl.arange(0, BLOCK_QUERIES)
        segment_ids += row * segment_stride
        segment_visibility += row * segment_visibility_stride
        query_segment = segments_of(segment_ids, query, length, segments)
        lists += blocks.to(tl.int64) * blocks
        for at in tl.range(0, tl.load(counts + blocks) * PARTS, num_stages=1):
            key_block = tl.load(lists + at // PARTS)
            first = key_block * BLOCK + (at % PARTS) * BLOCK_KEYS
            key = first + tl.arange(0, BLOCK_KEYS)
            key_segment = segments_of(segment_ids, key, length, segments)
            seen = visible(
                query,
                key,
                query_segment,
                key_segment,
                segment_visibility,
                present + (row * blocks + key_block) * WORDS,
                WORDS,
                False,
            )
            k_tile = load_tile(
                k, batch, kv_head, first, length, k_stride_b, k_stride_h, k_stride_s,
                BLOCK_KEYS, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
            )  # fmt: skip
            v_tile = load_tile(
                v, batch, kv_head, first, length, v_stride_b, v_stride_h, v_stride_s,
                BLOCK_KEYS, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
            )  # fmt: skip
            # A hole may hold NaN, which a weight of zero would not keep out.
            v_tile = tl.where((key_segment >= 0)[:, None], v_tile, 0.0)
            score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * score_scale
            score = tl.where(seen, score, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(score, axis=1))
            # While a row has seen nothing its maximum is -inf, and -inf - -inf is not a number.
            base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weight = tl.exp2(score - base[:, None])
            shrink = tl.exp2(highest - base)
            total = total * shrink + tl.sum(weight, axis=1)
            mixed = tl.dot(weight.to(v_tile.dtype), v_tile, mixed * shrink[:, None], input_precision="ieee")
            highest = new_highest

        inside = query < length
        divisor = tl.where(total > 0.0, total, 1.0)
        dim = tl.arange(0, BLOCK_WIDTH)
        # Row of the output [B, S, Hq], which is what a model's output projection reads.
        out_row = (batch.to(tl.int64) * length + query) * heads + head
        tl.store(
            out + out_row[:, None] * WIDTH + dim[None, :],
            (mixed / divisor[:, None]).to(out.dtype.element_ty),
            mask=inside[:, None] & (dim < WIDTH)[None, :],
        )
        # To base 2; -inf where a query sees nothing, and a number past the end, up to that of the last block.
        tl.store(
            lse + tl.program_id(1).to(tl.int64) * blocks * BLOCK + query,
            tl.where(inside, highest + tl.log2(divisor), 0.0),
        )


class SharedLaunch(NamedTuple):
    """What the three launches have in common."""

    topology: tuple[Tensor, Tensor]
    strides: tuple[int, ...]
    constants: dict[str, Any]


def shared_launch(
    config: LaunchConfig, segment_ids: Tensor, segment_visibility: Tensor, *tiled: Tensor
) -> SharedLaunch:
    """Topology, its strides and the constants of a launch; `tiled` are the tensors that it loads in tiles, `q` first
    and `k` second."""
    width = tiled[0].shape[3]
    segment_ids, segment_visibility = segment_ids.contiguous(), segment_visibility.contiguous()
    constants = {
        "GROUP": tiled[0].shape[1] // tiled[1].shape[1],
        "WIDTH": width,
        "WORDS": segment_visibility.shape[2],
        "BLOCK_WIDTH": padded_head_dim(width),
        "BLOCK_QUERIES": config.block_queries,
        "BLOCK_KEYS": config.block_keys,
        "BLOCK": BLOCK,
        "STAGES": config.num_stages,
        "DESCRIPTORS": config.descriptors and all(map(_may_describe, tiled)),
        "num_warps": config.num_warps,
    }
    # One row may stand for all.
    strides = tuple(0 if x.shape[0] == 1 else x.stride(0) for x in (segment_ids, segment_visibility))
    return SharedLaunch((segment_ids, segment_visibility), strides, constants)


def _may_describe(x: Tensor) -> bool:
    """True for what the copy engine can read: 16-byte steps, and nothing repeated."""
    return x.data_ptr() % 16 == 0 and all(
        stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3]
    )


def tiles(x: Tensor, rows: int, shared: SharedLaunch) -> Any:
    """`x` [B, H, S, D] as a kernel takes it that loads `rows` of a head at a time."""
    if not shared.constants["DESCRIPTORS"]:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, shared.constants["BLOCK_WIDTH"]])


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor,
    segment_visibility: Tensor,
    counts: Tensor,
    lists: Tensor,
    present: Tensor,
    scale: float,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, S, Hq, D], and the logarithm (to base 2) of the sum of exponentials of each query [B, Hq, NB * BLOCK].

    `config`: another than that of the table, for measurements.
    """
    batch, heads, length, width = q.shape
    out = torch.empty((batch, length, heads, width), dtype=q.dtype, device=q.device)
    blocks = lists.shape[2]
    lse = torch.empty((batch, heads, blocks * BLOCK), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    config = config or launch_config("forward", width, q.element_size(), capability_of(q.device))
    shared = shared_launch(config, segment_ids, segment_visibility, q, k, v)
    forward_kernel[(blocks * (BLOCK // config.block_queries), batch * heads)](
        out,
        lse,
        tiles(q, config.block_queries, shared),
        tiles(k, config.block_keys, shared),
        tiles(v, config.block_keys, shared),
        *shared.topology,
        counts,
        lists,
        present,
        length,
        blocks,
        segment_visibility.shape[1],
        heads,
        scale * math.log2(math.e),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *shared.strides,
        **shared.constants,
    )
    return out, lse
