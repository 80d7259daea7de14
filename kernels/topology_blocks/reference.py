"""topology_blocks in plain PyTorch: the definition of the operation."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.kernels.topology_blocks.block_lists import BLOCK, BlockLists

WORD = 64  # segments that one word of a bitmap holds
_ALL = -1  # every bit of an int64 is set


def segment_bits(segment_ids: Tensor, words: int) -> Tensor:
    """Bitmap with the one bit of each token's segment: int64 [B, S, words] for [B, S]; none for holes."""
    segment = segment_ids.long()[..., None]
    bit = torch.ones_like(segment) << (segment % WORD)
    in_word = torch.div(segment, WORD, rounding_mode="floor") == torch.arange(words, device=segment_ids.device)
    return torch.where(in_word & (segment >= 0), bit, 0)


def seen_segments(segment_ids: Tensor, segment_visibility: Tensor) -> Tensor:
    """Bitmap of the segments that each token sees: int64 [B, S, W] for [B, S] and [B, N, W]; none for holes."""
    segment = segment_ids.long()
    index = segment.clamp(min=0)[..., None].expand(*segment.shape, segment_visibility.shape[2])
    seen = (
        segment_visibility.expand(segment.shape[0], -1, -1).gather(1, index)
        if segment_visibility.shape[1]
        else index * 0
    )
    return seen.masked_fill((segment < 0)[..., None], 0)


def _join(words: Tensor, union: bool) -> Tensor:
    """OR (or AND) of bitmaps over the tokens of each block: [B, NB, BLOCK, W] -> [B, NB, W]."""
    while words.shape[2] > 1:
        half = words.shape[2] // 2
        first, second = words[:, :, :half], words[:, :, half:]
        words = first | second if union else first & second
    return words[:, :, 0]


def topology_blocks(segment_ids: Tensor, segment_visibility: Tensor) -> BlockLists:
    """Block lists of segment_ids [B, S] and segment_visibility [B, N, W]; see `api.py`."""
    batch, length = segment_ids.shape
    words, blocks = segment_visibility.shape[2], -(-length // BLOCK)
    segment_visibility = segment_visibility.expand(batch, -1, -1)
    # Past the length there are no keys, and what a query there would see does not count.
    padded = torch.nn.functional.pad(segment_ids.long(), (0, blocks * BLOCK - length), value=-1)
    past_end = torch.arange(blocks * BLOCK, device=segment_ids.device) >= length

    def by_block(x: Tensor) -> Tensor:
        return x.unflatten(1, (blocks, BLOCK))

    seen = seen_segments(padded, segment_visibility)
    present = _join(by_block(segment_bits(padded, words)), union=True)
    some = _join(by_block(seen), union=True)
    every = _join(by_block(seen.masked_fill(past_end[None, :, None], _ALL)), union=False)
    holes = by_block(padded < 0).any(2)

    index = torch.arange(blocks, device=segment_ids.device)
    below = (index[:, None] >= index)[None]
    meets = ((some[:, :, None] & present[:, None]) != 0).any(-1) & below
    covered = ((present[:, None] & ~every[:, :, None]) == 0).all(-1)
    full = meets & covered & ~holes[:, None] & (index[:, None] > index)[None]
    partial = meets & ~full
    kinds = torch.stack((full, partial, full.transpose(1, 2), partial.transpose(1, 2)), dim=1)
    counts = kinds.sum(-1).int()
    # A stable sort puts the listed blocks first, in ascending order.
    lists = (~kinds).to(torch.int8).sort(dim=-1, stable=True).indices
    lists = torch.where(index < counts[..., None], lists, 0).int()
    return BlockLists(counts, lists, present)
