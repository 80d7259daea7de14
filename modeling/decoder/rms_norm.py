"""Root-mean-square normalisation of the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.kernels.add_rms_norm.api import add_rms_norm
from hf_efficient.modeling.decoder.fused_steps import has_plain_weight, is_bare, may_fuse


class DecoderRMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension; statistics in fp32, output in x's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``weight * x / sqrt(mean(x^2) + eps)``: [..., width] -> [..., width]."""
        if may_fuse_norm(self, hidden_states):
            return add_rms_norm(hidden_states, self.weight, self.variance_epsilon)[0]
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` in plain PyTorch: [..., width] -> [..., width]."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    # Rounded to the input dtype before the weight is applied, as the stock families do.
    return weight * wide.to(x.dtype)


def may_fuse_norm(norm: nn.Module, x: Tensor) -> bool:
    """True when a kernel may read the weight of `norm` instead of calling it on `x`."""
    return is_bare(norm, (DecoderRMSNorm,)) and may_fuse(x) and has_plain_weight(norm, x)


def norm_attribute(norm: Any, name: str) -> Any:
    """An attribute of `norm`, or of the norm that an adapter wraps; None when neither has it."""
    found = getattr(norm, name, None)
    return getattr(getattr(norm, "base_layer", None), name, None) if found is None else found


def add_and_norm(
    norm: Any, x: Tensor, residual: Tensor | None = None, statistic: Any = None
) -> tuple[Tensor, Tensor, Any]:
    """Add the residual and normalise.

    A norm with the attribute `adds_residual` is called as ``norm(x, residual, statistic)`` and returns all three
    results. `DecoderRMSNorm` returns no statistic; where `may_fuse_norm` holds, one kernel adds and normalises.

    Args:
        norm: the norm, perhaps inside an adapter.
        x: [..., width].
        residual: [..., width], added to `x`; None for no addition.
        statistic: what the layer's previous norm returned.

    Returns:
        ``norm(x + residual)`` and ``x + residual``, [..., width] each; and the statistic for the layer's next norm.
    """
    if type(norm) is not DecoderRMSNorm and norm_attribute(norm, "adds_residual"):
        return norm(x, residual, statistic)
    if residual is None:
        return norm(x), x, None
    if may_fuse_norm(norm, x):
        return (*add_rms_norm(x, norm.weight, norm.variance_epsilon, residual), None)
    summed = residual + x
    return norm(summed), summed, None
