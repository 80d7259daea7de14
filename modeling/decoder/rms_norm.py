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
        if may_fuse_norm(self, hidden_states):
            return add_rms_norm(hidden_states, self.weight, self.variance_epsilon)[0]
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        # Rounded to the input dtype before the weight is applied, as the stock families do.
        return self.weight * x.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def may_fuse_norm(norm: nn.Module, x: Tensor) -> bool:
    """True when a kernel may read the weight of `norm` in place of calling it on `x`."""
    return is_bare(norm, (DecoderRMSNorm,)) and may_fuse(x) and has_plain_weight(norm, x)


def add_and_norm(norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """``norm(residual + x)``, and that sum; one kernel where `norm` is this module's own class."""
    if may_fuse_norm(norm, x):
        return add_rms_norm(x, norm.weight, norm.variance_epsilon, residual)
    summed = residual + x
    return norm(summed), summed
