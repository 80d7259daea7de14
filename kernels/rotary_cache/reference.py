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


def _write(cache: Tensor, new: Tensor, columns: Tensor) -> None:
    """``cache[b, :, columns[b, i]] = new[b, i]`` wherever there is such a column, without looking at the data."""
    width = cache.shape[2]
    # Whatever has no place goes to one more column, which is thrown away.
    places = torch.where((columns >= 0) & (columns < width), columns, width).long()
    longer = torch.cat((cache, cache.new_empty((*cache.shape[:2], 1, cache.shape[3]))), dim=2)
    new = new.transpose(1, 2)
    cache.copy_(longer.scatter(2, places[:, None, :, None].expand(new.shape), new)[:, :, :width])


def rotary_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor | None = None,
    value_cache: Tensor | None = None,
    columns: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    length: Tensor | None = None,
) -> Tensor:
    """Rotated q [B, Hq, Q, D]; rotated k, v and the length are written to their places."""
    batch, queries = q.shape[:2]
    if columns is None:
        columns = torch.arange(queries, device=q.device)
    places = columns.expand(batch, queries)
    if key_cache is not None:
        _write(key_cache, _rotated(k if k_weight is None else _normalised(k, k_weight, eps), cos, sin), places)
    if value_cache is not None:
        _write(value_cache, v, places)
    if length is not None and places.numel() > 0:
        length.copy_(places[-1, -1] + 1)
    return _rotated(q if q_weight is None else _normalised(q, q_weight, eps), cos, sin).transpose(1, 2)
