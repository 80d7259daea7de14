"""Triton kernels of decode_attention and the function that launches them. No checks of arguments: see `api.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_efficient.kernels.decode_attention.configs import (
    MERGE_TILE,
    LaunchConfig,
    launch_config,
    multiprocessor_count,
    padded_width,
    split_count,
)
from hf_efficient.kernels.overlap import overlap_options

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False


if HAVE_TRITON:

    @triton.jit
    def _is_ancestor(bitmaps, segment, WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr):
        """Bit `segment` [N] of each row of `bitmaps` [M, W], as a mask [M, N]; none where the words do not reach."""
        bit = (segment & 63).to(tl.int64)[None, :]
        known = tl.full([bitmaps.shape[0], segment.shape[0]], 0, dtype=tl.int1)
        for at in tl.static_range(WORDS):
            word = tl.sum(tl.where(tl.arange(0, WORDS_PADDED)[None, :] == at, bitmaps, 0), axis=1)
            # The shift carries the sign of bit 63 along; the last bit is right all the same.
            known |= ((segment >> 6) == at)[None, :] & (((word[:, None] >> bit) & 1) != 0)
        return known

    # Differ from call to call, and no code is better for knowing them; of the tensors, where in memory they begin.
    _VARYING = ("columns", "segments", "queries", "splits", "kv_len", "q_pos", "kv_segment_ids", "segment_visibility")
    _VARYING_STRIDES = ("kv_len_stride", "q_pos_stride", "kv_segment_ids_stride")

    @triton.jit(do_not_specialize=[*_VARYING, *_VARYING_STRIDES])
    def attend_kernel(
        out,
        partial,
        q,
        k,
        v,
        kv_len,
        q_pos,
        kv_segment_ids,
        segment_visibility,
        columns,
        segments,
        queries,
        kv_heads,
        splits,
        window,
        score_scale,
        q_stride_b,
        q_stride_h,
        q_stride_q,
        k_stride_b,
        k_stride_h,
        k_stride_c,
        v_stride_b,
        v_stride_h,
        v_stride_c,
        kv_len_stride,
        q_pos_stride,
        kv_segment_ids_stride,
        GROUP: tl.constexpr,
        WIDTH: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
        WORDS: tl.constexpr,
        WORDS_PADDED: tl.constexpr,
        DIRECT: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
        # Rows are the queries of all heads that share a key-value head, query by query. The tiles of one head run
        # side by side, so that what one reads the others find in the cache.
        tiles = tl.cdiv(queries * GROUP, BLOCK_ROWS)
        head_of_batch = tl.program_id(0) // tiles
        batch = (head_of_batch // kv_heads).to(tl.int64)
        kv_head = head_of_batch % kv_heads
        row = (tl.program_id(0) % tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        query = row // GROUP
        head = kv_head * GROUP + row % GROUP
        inside_rows = query < queries
        dim = tl.arange(0, BLOCK_WIDTH)
        inside_width = dim < WIDTH

        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        position = tl.load(q_pos + batch * q_pos_stride + query, mask=inside_rows, other=-1).to(tl.int32)
        length = columns
        if kv_len is not None:
            length = tl.minimum(tl.load(kv_len + batch * kv_len_stride).to(tl.int32), columns)
        q_at = q + batch * q_stride_b + head.to(tl.int64) * q_stride_h + query.to(tl.int64) * q_stride_q
        q_tile = tl.load(q_at[:, None] + dim[None, :], mask=inside_rows[:, None] & inside_width[None, :], other=0.0)
        if segment_visibility is not None:
            word = tl.arange(0, WORDS_PADDED)
            bitmaps = tl.load(
                segment_visibility + ((batch * queries + query) * WORDS)[:, None] + word[None, :],
                mask=inside_rows[:, None] & (word < WORDS)[None, :],
                other=0,
            )

        # The columns that this tile needs, cut into equal parts by the lengths that there are now.
        begin = 0
        end = tl.minimum(length, tl.max(position, axis=0) + 1)
        if window is not None:
            oldest = tl.min(tl.where(position >= 0, position, columns), axis=0)
            begin = tl.maximum(oldest - window + 1, 0)
        part = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), BLOCK_COLUMNS) * BLOCK_COLUMNS
        begin += tl.program_id(1) * part
        end = tl.minimum(end, begin + part)

        k_at = k + batch * k_stride_b + kv_head.to(tl.int64) * k_stride_h + dim[None, :]
        v_at = v + batch * v_stride_b + kv_head.to(tl.int64) * v_stride_h + dim[None, :]
        highest = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
        mixed = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], dtype=tl.float32)
        for at in range(begin, end, BLOCK_COLUMNS):
            column = at + tl.arange(0, BLOCK_COLUMNS)
            inside = column < end
            far = column.to(tl.int64)[:, None]
            tile_mask = inside[:, None] & inside_width[None, :]
            k_tile = tl.load(k_at + far * k_stride_c, mask=tile_mask, other=0.0)
            v_tile = tl.load(v_at + far * v_stride_c, mask=tile_mask, other=0.0)
            seen = inside[None, :] & (column[None, :] <= position[:, None])
            if window is not None:
                seen &= column[None, :] > position[:, None] - window
            if kv_segment_ids is not None:
                segment = tl.load(
                    kv_segment_ids + batch * kv_segment_ids_stride + column, mask=inside & (column < segments), other=-1
                ).to(tl.int32)
                seen &= (segment >= 0)[None, :]
                # A hole may hold NaN, which a weight of zero would not keep out.
                v_tile = tl.where((segment >= 0)[:, None], v_tile, 0.0)
                if segment_visibility is not None:
                    seen &= _is_ancestor(bitmaps, segment, WORDS, WORDS_PADDED)
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

        divisor = tl.where(total > 0.0, total, 1.0)
        mixed = mixed / divisor[:, None]
        # Row of the output [B, Q, Hq], which is what a model's output projection reads.
        out_row = (batch * queries + query) * (kv_heads * GROUP) + head
        out_mask = inside_rows[:, None] & inside_width[None, :]
        if DIRECT:
            tl.store(out + out_row[:, None] * WIDTH + dim[None, :], mixed.to(out.dtype.element_ty), mask=out_mask)
        else:
            slot = out_row * splits + tl.program_id(1)
            # A part without columns leaves only its weight, none: the merging kernel reads nothing else of it.
            out_mask &= (total > 0.0)[:, None]
            tl.store(partial + slot[:, None] * WIDTH + dim[None, :], mixed, mask=out_mask)
            slots = (tl.num_programs(0) // tiles).to(tl.int64) * GROUP * queries * splits
            tl.store(partial + slots * WIDTH + slot, highest + tl.log2(divisor), mask=inside_rows)

    @triton.jit(do_not_specialize=["splits"])
    def merge_kernel(
        out,
        partial,
        splits,
        WIDTH: tl.constexpr,
        BLOCK_SPLITS: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        # One row of the output; its parts are taken in their order, whatever order they were made in.
        row = tl.program_id(0).to(tl.int64)
        slots = tl.num_programs(0).to(tl.int64) * splits
        dim = tl.arange(0, BLOCK_WIDTH)
        highest = tl.full([1], float("-inf"), dtype=tl.float32)
        total = tl.zeros([1], dtype=tl.float32)
        mixed = tl.zeros([BLOCK_WIDTH], dtype=tl.float32)
        for at in range(0, splits, BLOCK_SPLITS):
            split = at + tl.arange(0, BLOCK_SPLITS)
            slot = row * splits + split
            size = tl.load(partial + slots * WIDTH + slot, mask=split < splits, other=float("-inf"))
            something = size > float("-inf")
            tile = tl.load(
                partial + slot[:, None] * WIDTH + dim[None, :],
                mask=something[:, None] & (dim < WIDTH)[None, :],
                other=0.0,
            )
            new_highest = tl.maximum(highest, tl.max(size, axis=0))
            base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weight = tl.exp2(size - base)
            shrink = tl.exp2(highest - base)
            total = total * shrink + tl.sum(weight, axis=0)
            mixed = mixed * shrink + tl.sum(tile * weight[:, None], axis=0)
            highest = new_highest
        mixed = mixed / tl.where(total > 0.0, total, 1.0)
        tl.store(out + row * WIDTH + dim, mixed.to(out.dtype.element_ty), mask=dim < WIDTH)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    q_pos: Tensor,
    kv_segment_ids: Tensor | None,
    segment_visibility: Tensor | None,
    columns: int,
    window: int | None,
    scale: float,
    config: LaunchConfig | None = None,
    splits: int | None = None,
) -> Tensor:
    """Output [B, Q, Hq, D], contiguous, for q [B, Hq, Q, D] and k, v [B, Hkv, C, D].

    Args:
        kv_len: [B] or of one element; None where all `columns` are filled.
        columns: no column from here on is read, at most C.
        config, splits: other than those of the table, for measurements.
    """
    batch, heads, queries, width = q.shape
    kv_heads = k.shape[1]
    out = torch.empty((batch, queries, heads, width), dtype=q.dtype, device=q.device)
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
        config = launch_config(queries * group, width, q.element_size())
    programs = batch * kv_heads * triton.cdiv(queries * group, config.block_rows)
    if splits is None:
        span = columns if window is None else min(columns, window + queries - 1)
        splits = split_count(programs, span, config.block_columns, multiprocessor_count(q.device))
    rows = batch * queries * heads
    # The parts of every row, then the logarithm (to base 2) of the sum of exponentials of every part.
    partial = None
    if splits > 1:
        partial = torch.empty(rows * splits * (width + 1), dtype=torch.float32, device=q.device)
    overlap = overlap_options(q.device, batch * queries)
    attend_kernel[(programs, splits)](
        out,
        partial,
        q,
        k,
        v,
        kv_len,
        q_pos,
        kv_segment_ids,
        segment_visibility,
        columns,
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
        WIDTH=width,
        BLOCK_ROWS=config.block_rows,
        BLOCK_COLUMNS=config.block_columns,
        BLOCK_WIDTH=padded_width(width),
        WORDS=words,
        WORDS_PADDED=triton.next_power_of_2(max(words, 1)),
        DIRECT=splits == 1,
        **overlap,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        merge_kernel[(rows,)](
            out,
            partial,
            splits,
            WIDTH=width,
            BLOCK_SPLITS=MERGE_TILE // padded_width(width),
            BLOCK_WIDTH=padded_width(width),
            **overlap,
            num_warps=4,
        )
    return out


def _row_stride(x: Tensor | None) -> int:
    """Elements from one batch row of `x` to the next: none where all rows share one."""
    return 0 if x is None or x.dim() == 0 or x.shape[0] == 1 else x.stride(0)
