"""add_rms_norm in plain PyTorch: the definition of the operation."""

from __future__ import annotations

import torch
from torch import Tensor


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``weight * rms_normalised(x + residual)`` and that sum; rounded where the stock families round."""
    summed = x if residual is None else x + residual
    wide = summed.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype), summed
