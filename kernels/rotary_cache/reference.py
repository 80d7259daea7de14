"""rotary_cache in plain PyTorch: the definition of the operation."""

from __future__ import annotations

import torch
from torch import Tensor


def _normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS normalisation over the last dimension, rounded where the stock families round."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x * cos + (-x2, x1) * sin`` for x [B, Q, H, D] with halves x1, x2 and cos, sin [B, Q, D]; rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x1, x2 = x.to(wide).chunk(2, dim=-1)
    cos, sin = cos.to(wide).unsqueeze(2), sin.to(wide).unsqueeze(2)
    return (torch.cat((x1, x2), dim=-1) * cos + torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)


def _write(cache: Tensor, new: Tensor, cache_position: Tensor) -> None:
    """``cache[b, :, cache_position[b, i]] = new[b, i]`` for every slot in [0, C), without a device synchronisation."""
    capacity = cache.shape[2]
    # Tokens outside the cache go to one extra slot, which is dropped.
    slots = torch.where((cache_position >= 0) & (cache_position < capacity), cache_position, capacity).long()
    padded = torch.cat((cache, cache.new_empty((*cache.shape[:2], 1, cache.shape[3]))), dim=2)
    new = new.transpose(1, 2)
    cache.copy_(padded.scatter(2, slots[:, None, :, None].expand(new.shape), new)[:, :, :capacity])


def rotary_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor | None = None,
    value_cache: Tensor | None = None,
    cache_position: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    length: Tensor | None = None,
) -> Tensor:
    """Rotated q [B, Hq, Q, D]; rotated k, v and the length are written in place."""
    batch, queries = q.shape[:2]
    if cache_position is None:
        cache_position = torch.arange(queries, device=q.device)
    slots = cache_position.expand(batch, queries)
    if key_cache is not None:
        _write(key_cache, _rotated(k if k_weight is None else _normalised(k, k_weight, eps), cos, sin), slots)
    if value_cache is not None:
        _write(value_cache, v, slots)
    if length is not None and slots.numel() > 0:
        length.copy_(slots[-1, -1] + 1)
    return _rotated(q if q_weight is None else _normalised(q, q_weight, eps), cos, sin).transpose(1, 2)
