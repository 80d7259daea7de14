"""Triton kernels of decode_attention, after Flash-Decoding, and their launcher. Arguments are checked by `api.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_efficient.kernels.decode_attention.configs import (
    COMBINE_TILE,
    LaunchConfig,
    launch_config,
    multiprocessor_count,
    padded_head_dim,
    split_count,
)
from hf_efficient.kernels.overlap import overlap_options
from hf_efficient.kernels.triton_language import HAVE_TRITON, tl, triton

if HAVE_TRITON:

    @triton.jit
    def _sees_segment(bitmaps, segment, WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr):
        """Bit `segment` [N] of each row of `bitmaps` [M, W], as a mask [M, N]; none where the words do not reach."""
        bit = (segment & 63).to(tl.int64)[None, :]
        seen = tl.full([bitmaps.shape[0], segment.shape[0]], 0, dtype=tl.int1)
        for i in tl.static_range(WORDS):
            word = tl.sum(tl.where(tl.arange(0, WORDS_PADDED)[None, :] == i, bitmaps, 0), axis=1)
            # The shift is arithmetic and repeats bit 63; the lowest bit, the only one used, is right.
            seen |= ((segment >> 6) == i)[None, :] & (((word[:, None] >> bit) & 1) != 0)
        return seen

    # These vary from call to call without making better code possible: of the tensors, the alignment of their address.
    _VARYING = (
        "max_kv_len",
        "segments_len",
        "queries",
        "splits",
        "kv_len",
        "q_pos",
        "kv_segment_ids",
        "segment_visibility",
    )
    _VARYING_STRIDES = ("kv_len_stride", "q_pos_stride", "kv_segment_ids_stride")

    # Flash-Decoding (split-KV): each program runs FlashAttention's online softmax over one split of the cache slots.
    # m_i is the running maximum of the scores (to base 2), l_i the running sum of exponentials, acc the unnormalised
    # output, alpha the factor that rescales l_i and acc to a new maximum.
    @triton.jit(do_not_specialize=[*_VARYING, *_VARYING_STRIDES])
    def split_kv_kernel(
        out,
        partial,
        q,
        k,
        v,
        kv_len,
        q_pos,
        kv_segment_ids,
        segment_visibility,
        max_kv_len,
        segments_len,
        queries,
        kv_heads,
        splits,
        window,
        qk_scale,
        q_stride_b,
        q_stride_h,
        q_stride_m,
        k_stride_b,
        k_stride_h,
        k_stride_n,
        v_stride_b,
        v_stride_h,
        v_stride_n,
        kv_len_stride,
        q_pos_stride,
        kv_segment_ids_stride,
        GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
        WORDS: tl.constexpr,
        WORDS_PADDED: tl.constexpr,
        SINGLE_SPLIT: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
        # The M rows are the queries of all heads of a group, query by query. The M blocks of one key-value head have
        # neighbouring program ids, so that the later ones find its keys and values in the L2 cache.
        m_blocks = tl.cdiv(queries * GROUP, BLOCK_M)
        batch_head = tl.program_id(0) // m_blocks
        batch = (batch_head // kv_heads).to(tl.int64)
        kv_head = batch_head % kv_heads
        offs_m = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        query = offs_m // GROUP
        head = kv_head * GROUP + offs_m % GROUP
        mask_m = query < queries
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d < HEAD_DIM

        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        position = tl.load(q_pos + batch * q_pos_stride + query, mask=mask_m, other=-1).to(tl.int32)
        length = max_kv_len
        if kv_len is not None:
            length = tl.minimum(tl.load(kv_len + batch * kv_len_stride).to(tl.int32), max_kv_len)
        q_ptrs = q + batch * q_stride_b + head.to(tl.int64) * q_stride_h + query.to(tl.int64) * q_stride_m
        q_tile = tl.load(q_ptrs[:, None] + offs_d[None, :], mask=mask_m[:, None] & mask_d[None, :], other=0.0)
        if segment_visibility is not None:
            word = tl.arange(0, WORDS_PADDED)
            bitmaps = tl.load(
                segment_visibility + ((batch * queries + query) * WORDS)[:, None] + word[None, :],
                mask=mask_m[:, None] & (word < WORDS)[None, :],
                other=0,
            )

        # The slots that this block of queries needs, from the lengths on the device, in equal runs of whole N blocks.
        begin = 0
        end = tl.minimum(length, tl.max(position, axis=0) + 1)
        if window is not None:
            oldest = tl.min(tl.where(position >= 0, position, max_kv_len), axis=0)
            begin = tl.maximum(oldest - window + 1, 0)
        split_len = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), BLOCK_N) * BLOCK_N
        begin += tl.program_id(1) * split_len
        end = tl.minimum(end, begin + split_len)

        k_ptrs = k + batch * k_stride_b + kv_head.to(tl.int64) * k_stride_h + offs_d[None, :]
        v_ptrs = v + batch * v_stride_b + kv_head.to(tl.int64) * v_stride_h + offs_d[None, :]
        m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for start_n in range(begin, end, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < end
            offs_n_wide = offs_n.to(tl.int64)[:, None]
            kv_mask = mask_n[:, None] & mask_d[None, :]
            k_tile = tl.load(k_ptrs + offs_n_wide * k_stride_n, mask=kv_mask, other=0.0)
            v_tile = tl.load(v_ptrs + offs_n_wide * v_stride_n, mask=kv_mask, other=0.0)
            visible = mask_n[None, :] & (offs_n[None, :] <= position[:, None])
            if window is not None:
                visible &= offs_n[None, :] > position[:, None] - window
            if kv_segment_ids is not None:
                segment = tl.load(
                    kv_segment_ids + batch * kv_segment_ids_stride + offs_n,
                    mask=mask_n & (offs_n < segments_len),
                    other=-1,
                ).to(tl.int32)
                visible &= (segment >= 0)[None, :]
                # A hole may hold NaN, and 0 * NaN is NaN.
                v_tile = tl.where((segment >= 0)[:, None], v_tile, 0.0)
                if segment_visibility is not None:
                    visible &= _sees_segment(bitmaps, segment, WORDS, WORDS_PADDED)
            qk = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * qk_scale
            qk = tl.where(visible, qk, float("-inf"))
            m_ij = tl.maximum(m_i, tl.max(qk, axis=1))
            # While a row has seen no slot its maximum is -inf, and -inf - -inf is NaN.
            m_safe = tl.where(m_ij == float("-inf"), 0.0, m_ij)
            p = tl.exp2(qk - m_safe[:, None])
            alpha = tl.exp2(m_i - m_safe)
            l_i = l_i * alpha + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
            m_i = m_ij

        l_safe = tl.where(l_i > 0.0, l_i, 1.0)
        acc = acc / l_safe[:, None]
        # Row of the output [B, Q, Hq], which is what a model's output projection reads.
        out_row = (batch * queries + query) * (kv_heads * GROUP) + head
        out_mask = mask_m[:, None] & mask_d[None, :]
        if SINGLE_SPLIT:
            tl.store(out + out_row[:, None] * HEAD_DIM + offs_d[None, :], acc.to(out.dtype.element_ty), mask=out_mask)
        else:
            partial_row = out_row * splits + tl.program_id(1)
            # A split without visible slots stores only its log-sum-exp, -inf; `combine_kernel` masks out the rest.
            out_mask &= (l_i > 0.0)[:, None]
            tl.store(partial + partial_row[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=out_mask)
            partial_rows = (tl.num_programs(0) // m_blocks).to(tl.int64) * GROUP * queries * splits
            # The log-sum-exp of each row.
            tl.store(partial + partial_rows * HEAD_DIM + partial_row, m_i + tl.log2(l_safe), mask=mask_m)

    # Flash-Decoding's second step: the splits' outputs, weighted by their log-sum-exp.
    @triton.jit(do_not_specialize=["splits"])
    def combine_kernel(
        out,
        partial,
        splits,
        HEAD_DIM: tl.constexpr,
        BLOCK_SPLITS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        # One row of the output; its splits are added in order, so that the result does not depend on scheduling.
        row = tl.program_id(0).to(tl.int64)
        partial_rows = tl.num_programs(0).to(tl.int64) * splits
        offs_d = tl.arange(0, BLOCK_D)
        m_i = tl.full([1], float("-inf"), dtype=tl.float32)
        l_i = tl.zeros([1], dtype=tl.float32)
        acc = tl.zeros([BLOCK_D], dtype=tl.float32)
        for start in range(0, splits, BLOCK_SPLITS):
            split = start + tl.arange(0, BLOCK_SPLITS)
            partial_row = row * splits + split
            lse = tl.load(partial + partial_rows * HEAD_DIM + partial_row, mask=split < splits, other=float("-inf"))
            tile = tl.load(
                partial + partial_row[:, None] * HEAD_DIM + offs_d[None, :],
                mask=(lse > float("-inf"))[:, None] & (offs_d < HEAD_DIM)[None, :],
                other=0.0,
            )
            m_ij = tl.maximum(m_i, tl.max(lse, axis=0))
            m_safe = tl.where(m_ij == float("-inf"), 0.0, m_ij)
            p = tl.exp2(lse - m_safe)
            alpha = tl.exp2(m_i - m_safe)
            l_i = l_i * alpha + tl.sum(p, axis=0)
            acc = acc * alpha + tl.sum(tile * p[:, None], axis=0)
            m_i = m_ij
        acc = acc / tl.where(l_i > 0.0, l_i, 1.0)
        tl.store(out + row * HEAD_DIM + offs_d, acc.to(out.dtype.element_ty), mask=offs_d < HEAD_DIM)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    q_pos: Tensor,
    kv_segment_ids: Tensor | None,
    segment_visibility: Tensor | None,
    max_kv_len: int,
    window: int | None,
    scale: float,
    config: LaunchConfig | None = None,
    splits: int | None = None,
) -> Tensor:
    """Output [B, Q, Hq, D], contiguous, for q [B, Hq, Q, D] and k, v [B, Hkv, C, D].

    Args:
        kv_len: [B] or of one element; None where the first `max_kv_len` slots are filled.
        max_kv_len: slots from here on are never read; at most C.
        config, splits: instead of those of the table, for measurements.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    out = torch.empty((batch, queries, heads, head_dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if q_pos.stride(1) != 1:
        q_pos = q_pos.contiguous()
    if kv_segment_ids is not None and kv_segment_ids.stride(1) != 1:
        kv_segment_ids = kv_segment_ids.contiguous()
    if segment_visibility is not None:
        segment_visibility = segment_visibility.expand(batch, -1, -1).contiguous()
    words = 0 if segment_visibility is None else segment_visibility.shape[2]
    group = heads // kv_heads
    if config is None:
        config = launch_config(queries * group, head_dim, q.element_size())
    programs = batch * kv_heads * triton.cdiv(queries * group, config.block_m)
    if splits is None:
        span = max_kv_len if window is None else min(max_kv_len, window + queries - 1)
        splits = split_count(programs, span, config.block_n, multiprocessor_count(q.device))
    rows = batch * queries * heads
    # The output of every split of every row, then every split's log-sum-exp (to base 2).
    partial = None
    if splits > 1:
        partial = torch.empty(rows * splits * (head_dim + 1), dtype=torch.float32, device=q.device)
    overlap = overlap_options(q.device, batch * queries)
    split_kv_kernel[(programs, splits)](
        out,
        partial,
        q,
        k,
        v,
        kv_len,
        q_pos,
        kv_segment_ids,
        segment_visibility,
        max_kv_len,
        0 if kv_segment_ids is None else kv_segment_ids.shape[1],
        queries,
        kv_heads,
        splits,
        window,
        scale * math.log2(math.e),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        _row_stride(kv_len),
        _row_stride(q_pos),
        _row_stride(kv_segment_ids),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=padded_head_dim(head_dim),
        WORDS=words,
        WORDS_PADDED=triton.next_power_of_2(max(words, 1)),
        SINGLE_SPLIT=splits == 1,
        **overlap,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        combine_kernel[(rows,)](
            out,
            partial,
            splits,
            HEAD_DIM=head_dim,
            BLOCK_SPLITS=COMBINE_TILE // padded_head_dim(head_dim),
            BLOCK_D=padded_head_dim(head_dim),
            **overlap,
            num_warps=4,
        )
    return out


def _row_stride(x: Tensor | None) -> int:
    """Elements from one batch row of `x` to the next: none where all rows share one."""
    return 0 if x is None or x.dim() == 0 or x.shape[0] == 1 else x.stride(0)
