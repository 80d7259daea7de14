"""Layers of the Wan transformer that compute in float32 whatever the dtype of the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MonarchWanRMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in float32; the result has the dtype of `x`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., width] of any floating dtype; the shape and the dtype stay."""
        return nn.functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class MonarchWanLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` in float32; the result is float32, so that a modulation after it is not rounded before."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., width] of any floating dtype; float32 of the same shape."""
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class Float32Linear(nn.Linear):
    """`nn.Linear` that computes in float32 and returns float32, also when its weight was cast to another dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias`` in float32; `x` [..., in_features] of any floating dtype."""
        with torch.autocast(x.device.type, enabled=False):  # it would round to its own dtype
            return nn.functional.linear(x.float(), self.weight.float(), self.bias.float())


__all__ = ["Float32Linear", "MonarchWanLayerNorm", "MonarchWanRMSNorm"]
