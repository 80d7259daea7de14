"""Triton backward kernels of topology_attention, after FlashAttention-2, and their launcher.

With P the softmax, recomputed from the log-sum-exp: dV = Pᵀ dO, dP = dO Vᵀ, delta = rowsum(dO * O),
dS = P * (dP - delta), dQ = dS K, dK = dSᵀ Q. `dq_kernel` computes delta and dQ, then `dkdv_kernel` dK and dV.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_efficient.kernels.topology_attention.configs import LaunchConfig, capability_of, launch_config
from hf_efficient.kernels.topology_attention.triton_kernels import (
    SharedLaunch,
    load_tile,
    segments_of,
    shared_launch,
    tiles,
    visible,
)
from hf_efficient.kernels.topology_blocks.block_lists import BLOCK
from hf_efficient.kernels.triton_language import HAVE_TRITON, TensorDescriptor, tl, triton

if HAVE_TRITON:

    @triton.jit
    def load_row(source, row, start, blocks, COUNT: tl.constexpr, BLOCK: tl.constexpr, USE_TMA: tl.constexpr):
        """Elements [start, start + COUNT) of a row of `source` [rows, NB * BLOCK], the lse or delta of one head."""
        if USE_TMA:
            return source.load([row, start]).reshape(COUNT)
        else:
            return tl.load(source + row.to(tl.int64) * blocks * BLOCK + start + tl.arange(0, COUNT))

    @triton.jit(do_not_specialize=["length", "blocks", "segments"])
    def dq_kernel(
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
        qk_scale,
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
        HEAD_DIM: tl.constexpr,
        WORDS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK: tl.constexpr,
        NUM_STAGES: tl.constexpr,
        USE_TMA: tl.constexpr,
    ):
        """dQ of BLOCK_M queries, and their delta, which `dkdv_kernel` reads."""
        block_m = tl.num_programs(0) - 1 - tl.program_id(0)
        head = tl.program_id(1) % heads
        batch = tl.program_id(1) // heads
        row = (batch * (segment_stride > 0)).to(tl.int64)
        kv_head = head // GROUP
        start_m = block_m * BLOCK_M
        block = start_m // BLOCK
        PARTS: tl.constexpr = BLOCK // BLOCK_N
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < length
        offs_d = tl.arange(0, BLOCK_D)
        q_mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]

        counts += row * 4 * blocks + block
        lists += (row * 4 * blocks + block) * blocks
        q_tile = load_tile(
            q, batch, head, start_m, length, q_stride_b, q_stride_h, q_stride_s,
            BLOCK_M, HEAD_DIM, BLOCK_D, USE_TMA,
        )  # fmt: skip
        do = load_tile(
            dout, batch, head, start_m, length, dout_stride_b, dout_stride_h, dout_stride_s,
            BLOCK_M, HEAD_DIM, BLOCK_D, USE_TMA,
        )  # fmt: skip
        out_row = (batch.to(tl.int64) * length + offs_m) * heads + head
        o = tl.load(out + out_row[:, None] * HEAD_DIM + offs_d[None, :], mask=q_mask, other=0.0)
        delta_i = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
        row_offset = tl.program_id(1).to(tl.int64) * blocks * BLOCK + offs_m
        tl.store(delta + row_offset, delta_i)
        lse_i = tl.load(lse + row_offset)
        dq_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

        count = tl.load(counts) * PARTS
        key_block = tl.load(lists)
        for i in tl.range(0, count, num_stages=NUM_STAGES):
            start_n = key_block * BLOCK + (i % PARTS) * BLOCK_N
            key_block = tl.load(lists + tl.minimum((i + 1) // PARTS, blocks - 1))
            k_tile = load_tile(
                k, batch, kv_head, start_n, length, k_stride_b, k_stride_h, k_stride_s,
                BLOCK_N, HEAD_DIM, BLOCK_D, USE_TMA,
            )  # fmt: skip
            v_tile = load_tile(
                v, batch, kv_head, start_n, length, v_stride_b, v_stride_h, v_stride_s,
                BLOCK_N, HEAD_DIM, BLOCK_D, USE_TMA,
            )  # fmt: skip
            qk = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            dp = tl.dot(do, tl.trans(v_tile), input_precision="ieee")
            p = tl.exp2(qk * qk_scale - lse_i[:, None])
            ds = p * (dp - delta_i[:, None])
            dq_acc = tl.dot(ds.to(k_tile.dtype), k_tile, dq_acc, input_precision="ieee")

        segment_ids += row * segment_stride
        segment_visibility += row * segment_visibility_stride
        query_segment = segments_of(segment_ids, offs_m, length, segments)
        lists += blocks.to(tl.int64) * blocks
        for i in tl.range(0, tl.load(counts + blocks) * PARTS, num_stages=1):
            key_block = tl.load(lists + i // PARTS)
            start_n = key_block * BLOCK + (i % PARTS) * BLOCK_N
            offs_n = start_n + tl.arange(0, BLOCK_N)
            key_segment = segments_of(segment_ids, offs_n, length, segments)
            seen = visible(
                offs_m,
                offs_n,
                query_segment,
                key_segment,
                segment_visibility,
                present + (row * blocks + key_block) * WORDS,
                WORDS,
                False,
            )
            not_hole = (key_segment >= 0)[:, None]
            k_tile = load_tile(
                k, batch, kv_head, start_n, length, k_stride_b, k_stride_h, k_stride_s,
                BLOCK_N, HEAD_DIM, BLOCK_D, USE_TMA,
            )  # fmt: skip
            v_tile = load_tile(
                v, batch, kv_head, start_n, length, v_stride_b, v_stride_h, v_stride_s,
                BLOCK_N, HEAD_DIM, BLOCK_D, USE_TMA,
            )  # fmt: skip
            k_tile = tl.where(not_hole, k_tile, 0.0)
            v_tile = tl.where(not_hole, v_tile, 0.0)
            qk = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            dp = tl.dot(do, tl.trans(v_tile), input_precision="ieee")
            p = tl.where(seen, tl.exp2(qk * qk_scale - lse_i[:, None]), 0.0)
            ds = tl.where(seen, p * (dp - delta_i[:, None]), 0.0)
            dq_acc = tl.dot(ds.to(k_tile.dtype), k_tile, dq_acc, input_precision="ieee")

        dq_ptrs = dq + batch.to(tl.int64) * dq_stride_b + head.to(tl.int64) * dq_stride_h
        dq_ptrs += offs_m.to(tl.int64)[:, None] * dq_stride_s + offs_d[None, :]
        tl.store(dq_ptrs, (dq_acc * scale).to(dq.dtype.element_ty), mask=q_mask)

    @triton.jit(do_not_specialize=["length", "blocks", "segments"])
    def dkdv_kernel(
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
        qk_scale,
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
        HEAD_DIM: tl.constexpr,
        WORDS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK: tl.constexpr,
        NUM_STAGES: tl.constexpr,
        USE_TMA: tl.constexpr,
    ):
        """dK and dV of BLOCK_N keys, over the queries of all heads that share them.

        The first keys are seen by most queries, so their programs start first.
        """
        block_n = tl.program_id(0)
        kv_head = tl.program_id(1) % kv_heads
        batch = tl.program_id(1) // kv_heads
        row = (batch * (segment_stride > 0)).to(tl.int64)
        start_n = block_n * BLOCK_N
        block = start_n // BLOCK
        PARTS: tl.constexpr = BLOCK // BLOCK_M
        offs_n = start_n + tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, BLOCK_D)

        # The lists of queries come after the two of keys.
        counts += (row * 4 + 2) * blocks + block
        lists += ((row * 4 + 2) * blocks + block) * blocks
        segment_ids += row * segment_stride
        segment_visibility += row * segment_visibility_stride
        present += (row * blocks + block) * WORDS
        key_segment = segments_of(segment_ids, offs_n, length, segments)
        k_tile = load_tile(
            k, batch, kv_head, start_n, length, k_stride_b, k_stride_h, k_stride_s,
            BLOCK_N, HEAD_DIM, BLOCK_D, USE_TMA,
        )  # fmt: skip
        v_tile = load_tile(
            v, batch, kv_head, start_n, length, v_stride_b, v_stride_h, v_stride_s,
            BLOCK_N, HEAD_DIM, BLOCK_D, USE_TMA,
        )  # fmt: skip
        dk_acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        dv_acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)

        full_count = tl.load(counts) * PARTS
        partial_count = tl.load(counts + blocks) * PARTS
        partial_lists = lists + blocks.to(tl.int64) * blocks
        for member in range(GROUP):
            head = kv_head * GROUP + member
            head_row = batch * kv_heads * GROUP + head
            query_block = tl.load(lists)
            for i in tl.range(0, full_count, num_stages=NUM_STAGES):
                start_m = query_block * BLOCK + (i % PARTS) * BLOCK_M
                query_block = tl.load(lists + tl.minimum((i + 1) // PARTS, blocks - 1))
                q_tile = load_tile(
                    q, batch, head, start_m, length, q_stride_b, q_stride_h, q_stride_s,
                    BLOCK_M, HEAD_DIM, BLOCK_D, USE_TMA,
                )  # fmt: skip
                do = load_tile(
                    dout, batch, head, start_m, length, dout_stride_b, dout_stride_h, dout_stride_s,
                    BLOCK_M, HEAD_DIM, BLOCK_D, USE_TMA,
                )  # fmt: skip
                # Queries past the length have a dO of zero and a finite lse, so that they add nothing.
                lse_i = load_row(lse, head_row, start_m, blocks, BLOCK_M, BLOCK, USE_TMA)
                delta_i = load_row(delta, head_row, start_m, blocks, BLOCK_M, BLOCK, USE_TMA)
                qk = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                dp = tl.dot(v_tile, tl.trans(do), input_precision="ieee")
                p = tl.exp2(qk * qk_scale - lse_i[None, :])
                dv_acc = tl.dot(p.to(do.dtype), do, dv_acc, input_precision="ieee")
                ds = p * (dp - delta_i[None, :])
                dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")

            for i in tl.range(0, partial_count, num_stages=1):
                start_m = tl.load(partial_lists + i // PARTS) * BLOCK + (i % PARTS) * BLOCK_M
                offs_m = start_m + tl.arange(0, BLOCK_M)
                query_segment = segments_of(segment_ids, offs_m, length, segments)
                seen = visible(offs_m, offs_n, query_segment, key_segment, segment_visibility, present, WORDS, True)
                q_tile = load_tile(
                    q, batch, head, start_m, length, q_stride_b, q_stride_h, q_stride_s,
                    BLOCK_M, HEAD_DIM, BLOCK_D, USE_TMA,
                )  # fmt: skip
                do = load_tile(
                    dout, batch, head, start_m, length, dout_stride_b, dout_stride_h, dout_stride_s,
                    BLOCK_M, HEAD_DIM, BLOCK_D, USE_TMA,
                )  # fmt: skip
                not_hole = (query_segment >= 0)[:, None]
                q_tile = tl.where(not_hole, q_tile, 0.0)
                do = tl.where(not_hole, do, 0.0)
                lse_i = load_row(lse, head_row, start_m, blocks, BLOCK_M, BLOCK, USE_TMA)
                delta_i = load_row(delta, head_row, start_m, blocks, BLOCK_M, BLOCK, USE_TMA)
                qk = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                dp = tl.dot(v_tile, tl.trans(do), input_precision="ieee")
                p = tl.where(seen, tl.exp2(qk * qk_scale - lse_i[None, :]), 0.0)
                dv_acc = tl.dot(p.to(do.dtype), do, dv_acc, input_precision="ieee")
                ds = tl.where(seen, p * (dp - delta_i[None, :]), 0.0)
                dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")

        kv_mask = (offs_n < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
        dk_ptrs = dk + batch.to(tl.int64) * dk_stride_b + kv_head.to(tl.int64) * dk_stride_h
        dk_ptrs += offs_n.to(tl.int64)[:, None] * dk_stride_s + offs_d[None, :]
        tl.store(dk_ptrs, (dk_acc * scale).to(dk.dtype.element_ty), mask=kv_mask)
        dv_ptrs = dv + batch.to(tl.int64) * dv_stride_b + kv_head.to(tl.int64) * dv_stride_h
        dv_ptrs += offs_n.to(tl.int64)[:, None] * dv_stride_s + offs_d[None, :]
        tl.store(dv_ptrs, dv_acc.to(dv.dtype.element_ty), mask=kv_mask)


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
    dq_config: LaunchConfig | None = None,
    dkdv_config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their layouts, for the gradient `dout` [B, S, Hq, D] of the output."""
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    if out.numel() == 0:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    dout = dout.transpose(1, 2)
    block_lists = (counts, lists, present, length, lists.shape[2], segment_visibility.shape[1])
    scales = (scale, scale * math.log2(math.e))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])

    config = dq_config or launch_config("dq", head_dim, q.element_size(), capability_of(q.device))
    shared = shared_launch(config, segment_ids, segment_visibility, q, k, v, dout)
    dq_kernel[(lists.shape[2] * (BLOCK // config.block_m), batch * heads)](
        dq,
        delta,
        tiles(q, config.block_m, shared),
        tiles(k, config.block_n, shared),
        tiles(v, config.block_n, shared),
        out,
        tiles(dout, config.block_m, shared),
        lse,
        *shared.topology,
        *block_lists,
        heads,
        *scales,
        *dq.stride()[:3],
        *strides,
        *shared.strides,
        **shared.constants,
    )
    config = dkdv_config or launch_config("dkdv", head_dim, q.element_size(), capability_of(q.device))
    shared = shared_launch(config, segment_ids, segment_visibility, q, k, v, dout)
    dkdv_kernel[(triton.cdiv(length, config.block_n), batch * kv_heads)](
        dk,
        dv,
        _row_tiles(delta, config.block_m, shared),
        tiles(q, config.block_m, shared),
        tiles(k, config.block_n, shared),
        tiles(v, config.block_n, shared),
        tiles(dout, config.block_m, shared),
        _row_tiles(lse, config.block_m, shared),
        *shared.topology,
        *block_lists,
        kv_heads,
        *scales,
        *dk.stride()[:3],
        *dv.stride()[:3],
        *strides,
        *shared.strides,
        **shared.constants,
    )
    return dq, dk, dv


def _row_tiles(x: Tensor, count: int, shared: SharedLaunch) -> Any:
    """`x` [B, H, NB * BLOCK] as `load_row` takes it, for `count` elements at a time: a pointer, or a TMA descriptor."""
    if not shared.constants["USE_TMA"]:
        return x
    return TensorDescriptor.from_tensor(x.flatten(0, 1), [1, count])
