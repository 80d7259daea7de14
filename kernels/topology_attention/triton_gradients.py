"""Triton kernels of topology_attention's gradients and the function that launches them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_efficient.kernels.topology_attention.configs import LaunchConfig, capability_of, launch_config
from hf_efficient.kernels.topology_attention.triton_kernels import (
    HAVE_TRITON,
    SharedLaunch,
    load_tile,
    segments_of,
    shared_launch,
    tiles,
    visible,
)
from hf_efficient.kernels.topology_blocks.block_lists import BLOCK

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # without it there are no kernels here
    pass

if HAVE_TRITON:

    @triton.jit
    def load_row(source, row, start, blocks, COUNT: tl.constexpr, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr):
        """Numbers [start, start + COUNT) of a row of one number for each token, [COUNT]; rows are whole blocks long."""
        if DESCRIPTORS:
            return source.load([row, start]).reshape(COUNT)
        else:
            return tl.load(source + row.to(tl.int64) * blocks * BLOCK + start + tl.arange(0, COUNT))

    @triton.jit(do_not_specialize=["length", "blocks", "segments"])
    def query_gradient_kernel(
        dq,
        delta,
        q,
        k,
        v,
        out,
        dout,
        lse,
        segment_ids,
        segment_visibility,
        counts,
        lists,
        present,
        length,
        blocks,
        segments,
        heads,
        scale,
        score_scale,
        dq_stride_b,
        dq_stride_h,
        dq_stride_s,
        q_stride_b,
        q_stride_h,
        q_stride_s,
        k_stride_b,
        k_stride_h,
        k_stride_s,
        v_stride_b,
        v_stride_h,
        v_stride_s,
        dout_stride_b,
        dout_stride_h,
        dout_stride_s,
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
        """dq of a tile of queries, and what the other kernel needs of each: delta = sum over D of out * dout."""
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        head = tl.program_id(1) % heads
        batch = tl.program_id(1) // heads
        row = (batch * (segment_stride > 0)).to(tl.int64)
        kv_head = head // GROUP
        start = tile * BLOCK_QUERIES
        block = start // BLOCK
        PARTS: tl.constexpr = BLOCK // BLOCK_KEYS
        query = start + tl.arange(0, BLOCK_QUERIES)
        inside = query < length
        dim = tl.arange(0, BLOCK_WIDTH)
        tile_mask = inside[:, None] & (dim < WIDTH)[None, :]

        counts += row * 4 * blocks + block
        lists += (row * 4 * blocks + block) * blocks
        q_tile = load_tile(
            q, batch, head, start, length, q_stride_b, q_stride_h, q_stride_s,
            BLOCK_QUERIES, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
        )  # fmt: skip
        dout_tile = load_tile(
            dout, batch, head, start, length, dout_stride_b, dout_stride_h, dout_stride_s,
            BLOCK_QUERIES, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
        )  # fmt: skip
        out_row = (batch.to(tl.int64) * length + query) * heads + head
        out_tile = tl.load(out + out_row[:, None] * WIDTH + dim[None, :], mask=tile_mask, other=0.0)
        row_delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), axis=1)
        at_row = tl.program_id(1).to(tl.int64) * blocks * BLOCK + query
        tl.store(delta + at_row, row_delta)
        row_lse = tl.load(lse + at_row)
        gradient = tl.zeros([BLOCK_QUERIES, BLOCK_WIDTH], dtype=tl.float32)

        count = tl.load(counts) * PARTS
        key_block = tl.load(lists)
        for at in tl.range(0, count, num_stages=STAGES):
            first = key_block * BLOCK + (at % PARTS) * BLOCK_KEYS
            key_block = tl.load(lists + tl.minimum((at + 1) // PARTS, blocks - 1))
            k_tile = load_tile(
                k, batch, kv_head, first, length, k_stride_b, k_stride_h, k_stride_s,
                BLOCK_KEYS, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
            )  # fmt: skip
            v_tile = load_tile(
                v, batch, kv_head, first, length, v_stride_b, v_stride_h, v_stride_s,
                BLOCK_KEYS, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
            )  # fmt: skip
            score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            dweight = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
            weight = tl.exp2(score * score_scale - row_lse[:, None])
            dscore = weight * (dweight - row_delta[:, None])
            gradient = tl.dot(dscore.to(k_tile.dtype), k_tile, gradient, input_precision="ieee")

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
            known = (key_segment >= 0)[:, None]
            k_tile = load_tile(
                k, batch, kv_head, first, length, k_stride_b, k_stride_h, k_stride_s,
                BLOCK_KEYS, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
            )  # fmt: skip
            v_tile = load_tile(
                v, batch, kv_head, first, length, v_stride_b, v_stride_h, v_stride_s,
                BLOCK_KEYS, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
            )  # fmt: skip
            k_tile = tl.where(known, k_tile, 0.0)
            v_tile = tl.where(known, v_tile, 0.0)
            score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            dweight = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
            weight = tl.where(seen, tl.exp2(score * score_scale - row_lse[:, None]), 0.0)
            dscore = tl.where(seen, weight * (dweight - row_delta[:, None]), 0.0)
            gradient = tl.dot(dscore.to(k_tile.dtype), k_tile, gradient, input_precision="ieee")

        at_dq = dq + batch.to(tl.int64) * dq_stride_b + head.to(tl.int64) * dq_stride_h
        at_dq += query.to(tl.int64)[:, None] * dq_stride_s + dim[None, :]
        tl.store(at_dq, (gradient * scale).to(dq.dtype.element_ty), mask=tile_mask)

    @triton.jit(do_not_specialize=["length", "blocks", "segments"])
    def key_gradient_kernel(
        dk,
        dv,
        delta,
        q,
        k,
        v,
        dout,
        lse,
        segment_ids,
        segment_visibility,
        counts,
        lists,
        present,
        length,
        blocks,
        segments,
        kv_heads,
        scale,
        score_scale,
        dk_stride_b,
        dk_stride_h,
        dk_stride_s,
        dv_stride_b,
        dv_stride_h,
        dv_stride_s,
        q_stride_b,
        q_stride_h,
        q_stride_s,
        k_stride_b,
        k_stride_h,
        k_stride_s,
        v_stride_b,
        v_stride_h,
        v_stride_s,
        dout_stride_b,
        dout_stride_h,
        dout_stride_s,
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
        """dk and dv of a tile of keys, over the queries of all heads that share them. The first keys are seen most."""
        tile = tl.program_id(0)
        kv_head = tl.program_id(1) % kv_heads
        batch = tl.program_id(1) // kv_heads
        row = (batch * (segment_stride > 0)).to(tl.int64)
        start = tile * BLOCK_KEYS
        block = start // BLOCK
        PARTS: tl.constexpr = BLOCK // BLOCK_QUERIES
        key = start + tl.arange(0, BLOCK_KEYS)
        dim = tl.arange(0, BLOCK_WIDTH)

        # The lists of queries come after the two of keys.
        counts += (row * 4 + 2) * blocks + block
        lists += ((row * 4 + 2) * blocks + block) * blocks
        segment_ids += row * segment_stride
        segment_visibility += row * segment_visibility_stride
        present += (row * blocks + block) * WORDS
        key_segment = segments_of(segment_ids, key, length, segments)
        k_tile = load_tile(
            k, batch, kv_head, start, length, k_stride_b, k_stride_h, k_stride_s,
            BLOCK_KEYS, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
        )  # fmt: skip
        v_tile = load_tile(
            v, batch, kv_head, start, length, v_stride_b, v_stride_h, v_stride_s,
            BLOCK_KEYS, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
        )  # fmt: skip
        k_gradient = tl.zeros([BLOCK_KEYS, BLOCK_WIDTH], dtype=tl.float32)
        v_gradient = tl.zeros([BLOCK_KEYS, BLOCK_WIDTH], dtype=tl.float32)

        full_count = tl.load(counts) * PARTS
        partial_count = tl.load(counts + blocks) * PARTS
        partial_lists = lists + blocks.to(tl.int64) * blocks
        for member in range(GROUP):
            head = kv_head * GROUP + member
            row_of_head = batch * kv_heads * GROUP + head
            query_block = tl.load(lists)
            for at in tl.range(0, full_count, num_stages=STAGES):
                first = query_block * BLOCK + (at % PARTS) * BLOCK_QUERIES
                query_block = tl.load(lists + tl.minimum((at + 1) // PARTS, blocks - 1))
                q_tile = load_tile(
                    q, batch, head, first, length, q_stride_b, q_stride_h, q_stride_s,
                    BLOCK_QUERIES, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
                )  # fmt: skip
                dout_tile = load_tile(
                    dout, batch, head, first, length, dout_stride_b, dout_stride_h, dout_stride_s,
                    BLOCK_QUERIES, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
                )  # fmt: skip
                # Queries past the end have gradients of zero, and a weight that is a number.
                row_lse = load_row(lse, row_of_head, first, blocks, BLOCK_QUERIES, BLOCK, DESCRIPTORS)
                row_delta = load_row(delta, row_of_head, first, blocks, BLOCK_QUERIES, BLOCK, DESCRIPTORS)
                score = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                dweight = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
                weight = tl.exp2(score * score_scale - row_lse[None, :])
                v_gradient = tl.dot(weight.to(dout_tile.dtype), dout_tile, v_gradient, input_precision="ieee")
                dscore = weight * (dweight - row_delta[None, :])
                k_gradient = tl.dot(dscore.to(q_tile.dtype), q_tile, k_gradient, input_precision="ieee")

            for at in tl.range(0, partial_count, num_stages=1):
                first = tl.load(partial_lists + at // PARTS) * BLOCK + (at % PARTS) * BLOCK_QUERIES
                query = first + tl.arange(0, BLOCK_QUERIES)
                query_segment = segments_of(segment_ids, query, length, segments)
                seen = visible(query, key, query_segment, key_segment, segment_visibility, present, WORDS, True)
                q_tile = load_tile(
                    q, batch, head, first, length, q_stride_b, q_stride_h, q_stride_s,
                    BLOCK_QUERIES, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
                )  # fmt: skip
                dout_tile = load_tile(
                    dout, batch, head, first, length, dout_stride_b, dout_stride_h, dout_stride_s,
                    BLOCK_QUERIES, WIDTH, BLOCK_WIDTH, DESCRIPTORS,
                )  # fmt: skip
                known = (query_segment >= 0)[:, None]
                q_tile = tl.where(known, q_tile, 0.0)
                dout_tile = tl.where(known, dout_tile, 0.0)
                row_lse = load_row(lse, row_of_head, first, blocks, BLOCK_QUERIES, BLOCK, DESCRIPTORS)
                row_delta = load_row(delta, row_of_head, first, blocks, BLOCK_QUERIES, BLOCK, DESCRIPTORS)
                score = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                dweight = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
                weight = tl.where(seen, tl.exp2(score * score_scale - row_lse[None, :]), 0.0)
                v_gradient = tl.dot(weight.to(dout_tile.dtype), dout_tile, v_gradient, input_precision="ieee")
                dscore = tl.where(seen, weight * (dweight - row_delta[None, :]), 0.0)
                k_gradient = tl.dot(dscore.to(q_tile.dtype), q_tile, k_gradient, input_precision="ieee")

        tile_mask = (key < length)[:, None] & (dim < WIDTH)[None, :]
        at_dk = dk + batch.to(tl.int64) * dk_stride_b + kv_head.to(tl.int64) * dk_stride_h
        at_dk += key.to(tl.int64)[:, None] * dk_stride_s + dim[None, :]
        tl.store(at_dk, (k_gradient * scale).to(dk.dtype.element_ty), mask=tile_mask)
        at_dv = dv + batch.to(tl.int64) * dv_stride_b + kv_head.to(tl.int64) * dv_stride_h
        at_dv += key.to(tl.int64)[:, None] * dv_stride_s + dim[None, :]
        tl.store(at_dv, v_gradient.to(dv.dtype.element_ty), mask=tile_mask)


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_ids: Tensor,
    segment_visibility: Tensor,
    counts: Tensor,
    lists: Tensor,
    present: Tensor,
    scale: float,
    query_config: LaunchConfig | None = None,
    key_config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their layouts, for the gradient `dout` [B, S, Hq, D] of the output."""
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    if out.numel() == 0:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    dout = dout.transpose(1, 2)
    rest = (counts, lists, present, length, lists.shape[2], segment_visibility.shape[1])
    scales = (scale, scale * math.log2(math.e))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])

    config = query_config or launch_config("query_gradient", width, q.element_size(), capability_of(q.device))
    shared = shared_launch(config, segment_ids, segment_visibility, q, k, v, dout)
    query_gradient_kernel[(lists.shape[2] * (BLOCK // config.block_queries), batch * heads)](
        dq,
        delta,
        tiles(q, config.block_queries, shared),
        tiles(k, config.block_keys, shared),
        tiles(v, config.block_keys, shared),
        out,
        tiles(dout, config.block_queries, shared),
        lse,
        *shared.topology,
        *rest,
        heads,
        *scales,
        *dq.stride()[:3],
        *strides,
        *shared.strides,
        **shared.constants,
    )
    config = key_config or launch_config("key_gradient", width, q.element_size(), capability_of(q.device))
    shared = shared_launch(config, segment_ids, segment_visibility, q, k, v, dout)
    key_gradient_kernel[(triton.cdiv(length, config.block_keys), batch * kv_heads)](
        dk,
        dv,
        _rows(delta, config.block_queries, shared),
        tiles(q, config.block_queries, shared),
        tiles(k, config.block_keys, shared),
        tiles(v, config.block_keys, shared),
        tiles(dout, config.block_queries, shared),
        _rows(lse, config.block_queries, shared),
        *shared.topology,
        *rest,
        kv_heads,
        *scales,
        *dk.stride()[:3],
        *dv.stride()[:3],
        *strides,
        *shared.strides,
        **shared.constants,
    )
    return dq, dk, dv


def _rows(x: Tensor, count: int, shared: SharedLaunch) -> Any:
    """`x` [B, H, NB * BLOCK] as a kernel takes it that loads `count` numbers of a row at a time."""
    if not shared.constants["DESCRIPTORS"]:
        return x
    return TensorDescriptor.from_tensor(x.flatten(0, 1), [1, count])
