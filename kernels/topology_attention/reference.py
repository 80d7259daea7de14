"""topology_attention in plain PyTorch: the definition of the operation."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.kernels.decode_attention.reference import visible_slots
from hf_efficient.kernels.precision import without_autocast
from hf_efficient.kernels.topology_blocks.block_lists import BlockLists
from hf_efficient.kernels.topology_blocks.reference import seen_segments


def visible_pairs(segment_ids: Tensor, segment_visibility: Tensor) -> Tensor:
    """Which keys each query sees: bool [B, S, S], queries first.

    `segment_ids` is [B, S], `segment_visibility` [B, N, W]. A query sees the keys that are not later and whose segment
    is set in the bitmap of its own segment: the rule of `visible_slots` with token i in cache slot i.
    """
    length = segment_ids.shape[1]
    q_pos = torch.arange(length, device=segment_ids.device).expand_as(segment_ids)
    return visible_slots(length, length, q_pos, None, segment_ids, seen_segments(segment_ids, segment_visibility))


def topology_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor,
    segment_visibility: Tensor,
    *,
    blocks: BlockLists | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of q [B, Hq, S, D] to the visible keys among k, v [B, Hkv, S, D]; see `api.py`."""
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    seen = visible_pairs(segment_ids, segment_visibility)[:, None, None]
    # A hole may hold NaN, and 0 * NaN is NaN.
    hole = (segment_ids < 0)[:, None, :, None]
    q, k, v = (x.to(wide).masked_fill(hole, 0.0) for x in (q, k, v))
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, length, head_dim)
    with without_autocast(q.device.type):
        scores = torch.einsum("bkgqd,bkcd->bkgqc", grouped, k) * (head_dim**-0.5 if scale is None else scale)
        # The output and the gradients of a query that sees nothing are zero: its softmax would be NaN.
        nothing = ~seen.any(-1, keepdim=True)
        probs = scores.masked_fill(~(seen | nothing), float("-inf")).softmax(-1).masked_fill(nothing, 0.0)
        attended = torch.einsum("bkgqc,bkcd->bqkgd", probs, v)
    return attended.reshape(batch, length, heads, head_dim).to(dtype).transpose(1, 2)
