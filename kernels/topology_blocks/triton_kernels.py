"""Triton kernels of topology_blocks and the function that launches them. Arguments are checked by `api.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.kernels.topology_blocks.block_lists import BLOCK, BlockLists
from hf_efficient.kernels.topology_blocks.configs import CLASSIFY_WARPS, CLASSIFY_WIDTH, SUMMARISE_WARPS
from hf_efficient.kernels.triton_language import HAVE_TRITON, tl, triton

if HAVE_TRITON:

    @triton.jit
    def _either(a, b):
        return a | b

    @triton.jit
    def _both(a, b):
        return a & b

    @triton.jit(do_not_specialize=["length", "blocks", "segments", "words"])
    def summarise_kernel(
        present,
        seen,
        segment_ids,
        segment_visibility,
        length,
        blocks,
        segments,
        words,
        segment_stride,
        segment_visibility_stride,
        BLOCK: tl.constexpr,
    ):
        """Bitmaps of a block's segments, of those that some and that every query of it sees; whether it has a hole."""
        block = tl.program_id(0)
        row = tl.program_id(1).to(tl.int64)
        token = block * BLOCK + tl.arange(0, BLOCK)
        inside = token < length
        segment = tl.load(segment_ids + row * segment_stride + token, mask=inside, other=-1)
        known = (segment >= 0) & (segment < segments)
        at = segment_visibility + row * segment_visibility_stride + segment.to(tl.int64) * words
        bit = tl.full([BLOCK], 1, tl.int64) << (segment & 63).to(tl.int64)
        present += (row * blocks + block) * words
        seen += (row * blocks + block) * (2 * words + 1)
        for word in range(words):
            own = tl.where((segment >> 6) == word, bit, 0)
            tl.store(present + word, tl.reduce(own, 0, _either))
            bitmap = tl.load(at + word, mask=known, other=0)
            tl.store(seen + word, tl.reduce(bitmap, 0, _either))
            # Queries past the length do not count.
            tl.store(seen + words + word, tl.reduce(tl.where(inside, bitmap, -1), 0, _both))
        tl.store(seen + 2 * words, tl.max((segment < 0).to(tl.int64), axis=0))

    @triton.jit(do_not_specialize=["blocks", "words"])
    def classify_kernel(counts, lists, present, seen, blocks, words, BLOCK_COUNT: tl.constexpr):
        """The full and the partial list of one block: of its keys (direction 0) or of its queries (direction 1)."""
        block = tl.program_id(0)
        direction = tl.program_id(1)
        row = tl.program_id(2).to(tl.int64)
        present += row * blocks * words
        seen += row * blocks * (2 * words + 1)
        counts += row * 4 * blocks + block
        lists += (row * 4 * blocks + block) * blocks
        full_kind = (2 * direction).to(tl.int64)
        full_list = lists + full_kind * blocks * blocks
        partial_list = full_list + blocks.to(tl.int64) * blocks
        full_count = tl.full([], 0, tl.int32)
        partial_count = tl.full([], 0, tl.int32)
        for start in range(0, blocks, BLOCK_COUNT):
            other = start + tl.arange(0, BLOCK_COUNT)
            inside = other < blocks
            query = tl.where(direction == 0, block, other)
            key = tl.where(direction == 0, other, block)
            query_at = seen + query * (2 * words + 1)
            key_at = present + key * words
            meets = tl.zeros([BLOCK_COUNT], tl.int1)
            covered = tl.load(seen + key * (2 * words + 1) + 2 * words, mask=inside, other=1) == 0
            for word in range(words):
                keys = tl.load(key_at + word, mask=inside, other=0)
                some = tl.load(query_at + word, mask=inside, other=0)
                every = tl.load(query_at + words + word, mask=inside, other=0)
                meets |= (keys & some) != 0
                covered &= (keys & ~every) == 0
            meets &= inside & (key <= query)
            full = (meets & covered & (key < query)).to(tl.int32)
            partial = meets.to(tl.int32) - full
            full_at = full_count + tl.cumsum(full, 0) - full
            partial_at = partial_count + tl.cumsum(partial, 0) - partial
            tl.store(full_list + full_at, other, mask=full != 0)
            tl.store(partial_list + partial_at, other, mask=partial != 0)
            full_count += tl.sum(full, axis=0)
            partial_count += tl.sum(partial, axis=0)
        tl.store(counts + full_kind * blocks, full_count)
        tl.store(counts + (full_kind + 1) * blocks, partial_count)
        for start in range(0, blocks, BLOCK_COUNT):
            other = start + tl.arange(0, BLOCK_COUNT)
            inside = other < blocks
            tl.store(full_list + other, 0, mask=inside & (other >= full_count))
            tl.store(partial_list + other, 0, mask=inside & (other >= partial_count))


def launch(segment_ids: Tensor, segment_visibility: Tensor) -> BlockLists:
    """Block lists of segment_ids [B, S], int32, and segment_visibility [B or 1, N, W], int64."""
    rows, length = segment_ids.shape
    segments, words = segment_visibility.shape[1:]
    blocks = triton.cdiv(length, BLOCK)
    device = segment_ids.device
    present = torch.empty((rows, blocks, words), dtype=torch.int64, device=device)
    counts = torch.empty((rows, 4, blocks), dtype=torch.int32, device=device)
    lists = torch.empty((rows, 4, blocks, blocks), dtype=torch.int32, device=device)
    if counts.numel() == 0:
        return BlockLists(counts, lists, present)
    seen = torch.empty((rows, blocks, 2 * words + 1), dtype=torch.int64, device=device)
    segment_ids, segment_visibility = segment_ids.contiguous(), segment_visibility.contiguous()
    summarise_kernel[(blocks, rows)](
        present,
        seen,
        segment_ids,
        segment_visibility,
        length,
        blocks,
        segments,
        words,
        length,
        0 if segment_visibility.shape[0] == 1 else segments * words,
        BLOCK=BLOCK,
        num_warps=SUMMARISE_WARPS,
    )
    classify_kernel[(blocks, 2, rows)](
        counts,
        lists,
        present,
        seen,
        blocks,
        words,
        BLOCK_COUNT=CLASSIFY_WIDTH,
        num_warps=CLASSIFY_WARPS,
    )
    return BlockLists(counts, lists, present)
