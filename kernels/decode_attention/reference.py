"""decode_attention in plain PyTorch: the definition of the operation."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.kernels.precision import without_autocast

WORD = 64  # segments that one word of a bitmap holds


def visible_slots(
    num_slots: int,
    kv_len: Tensor | int,
    q_pos: Tensor,
    window: int | None = None,
    kv_segment_ids: Tensor | None = None,
    segment_visibility: Tensor | None = None,
) -> Tensor:
    """Which of the first `num_slots` cache slots each query sees: bool [B or 1, Q, num_slots].

    The one definition of visibility: other attention operations, dense masks of models and kernel tests call it too.
    The other arguments are those of `decode_attention`.
    """
    slot = torch.arange(num_slots, device=q_pos.device)
    position = q_pos.long()[:, :, None]
    length = kv_len.reshape(-1, 1, 1) if isinstance(kv_len, Tensor) else kv_len
    seen = (slot < length) & (slot <= position)
    if window is not None:
        seen = seen & (slot > position - window)
    if kv_segment_ids is None:
        return seen
    # Slots past the end of `kv_segment_ids` are holes, like those of a negative segment.
    segment = kv_segment_ids.new_full((kv_segment_ids.shape[0], num_slots), -1).long()
    known = min(num_slots, kv_segment_ids.shape[1])
    segment[:, :known] = kv_segment_ids[:, :known]
    seen = seen & (segment >= 0)[:, None, :]
    if segment_visibility is None:
        return seen
    rows, queries, words = segment_visibility.shape
    if words == 0:
        return seen & False
    rows = max(rows, segment.shape[0])
    # One bool for each segment: gathering these takes an eighth of the memory of gathering words. The shift is
    # arithmetic and repeats bit 63; the lowest bit, the only one used, is right.
    bits = ((segment_visibility[..., None] >> torch.arange(WORD, device=q_pos.device)) & 1).bool().flatten(2)
    index = segment.clamp(0, WORD * words - 1)[:, None, :].expand(rows, queries, num_slots)
    visible = bits.expand(rows, -1, -1).gather(2, index)
    return seen & visible & (segment < WORD * words)[:, None, :]


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | int,
    q_pos: Tensor,
    window: int | None = None,
    kv_segment_ids: Tensor | None = None,
    segment_visibility: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of q [B, Hq, Q, D] to the visible slots of k, v [B, Hkv, C, D]; see `api.py`."""
    batch, heads, queries, head_dim = q.shape
    kv_heads, capacity = k.shape[1:3]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    seen = visible_slots(capacity, kv_len, q_pos, window, kv_segment_ids, segment_visibility)
    # Slots that no query sees may hold anything, NaN included, and 0 * NaN is NaN.
    unseen = ~seen.any(dim=1)[:, None, :, None]
    k, v = (x.to(wide).masked_fill(unseen, 0.0) for x in (k, v))
    grouped = q.to(wide).reshape(batch, kv_heads, heads // kv_heads, queries, head_dim)
    with without_autocast(q.device.type):
        scores = torch.einsum("bkgqd,bkcd->bkgqc", grouped, k) * (head_dim**-0.5 if scale is None else scale)
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        # A query that sees nothing gets zeros: its softmax is NaN.
        probs = scores.softmax(dim=-1).masked_fill(~seen[:, None, None], 0.0)
        attended = torch.einsum("bkgqc,bkcd->bqkgd", probs, v)
    out = torch.empty((batch, queries, heads, head_dim), dtype=q.dtype, device=q.device)
    return out.copy_(attended.reshape(out.shape)).transpose(1, 2)
