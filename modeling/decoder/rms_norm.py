"""RMSNorm of the decoder, and the residual addition before a norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.kernels.add_rms_norm.api import add_rms_norm
from hf_efficient.modeling.decoder.fused_steps import has_plain_weight, is_bare, may_fuse


class DecoderRMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, of `width` channels, as `LlamaRMSNorm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the norm of `hidden_states` [..., width], in the same shape and the dtype of `rms_norm`.

        One kernel where `may_fuse_norm` holds.
        """
        if may_fuse_norm(self, hidden_states):
            return add_rms_norm(hidden_states, self.weight, self.variance_epsilon)[0]
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``weight * x / sqrt(mean(x^2) + eps)`` in plain PyTorch.

    Args:
        x: [..., width], of any floating-point dtype; normalised in float32 and rounded to this dtype.
        weight: [width].
        eps: added to the mean square.

    Returns:
        [..., width], in the dtype that `x` and `weight` promote to.
    """
    normed = x.to(torch.float32)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    # Rounded to the input dtype before the weight is applied, as Llama and the other stock models do.
    return weight * normed.to(x.dtype)


def may_fuse_norm(norm: nn.Module, x: Tensor) -> bool:
    """True when a kernel may replace the call of `norm` on `x`: a plain `DecoderRMSNorm`; see `fused_steps.py`."""
    return is_bare(norm, (DecoderRMSNorm,)) and may_fuse(x) and has_plain_weight(norm, x)


def norm_attribute(norm: Any, name: str) -> Any:
    """Return an attribute of `norm`, or of the norm that a PEFT adapter wraps; None if neither has it."""
    value = getattr(norm, name, None)
    return getattr(getattr(norm, "base_layer", None), name, None) if value is None else value


def add_and_norm(
    norm: Any, x: Tensor, residual: Tensor | None = None, statistic: Any = None
) -> tuple[Tensor, Tensor, Any]:
    """Return ``norm(x + residual)``, the sum ``x + residual``, and a statistic for the layer's next norm.

    A norm that has a true attribute `adds_residual`, or wraps a norm that has one, is called as
    ``norm(x, residual, statistic)`` and returns all three results. For other norms the statistic is None; where
    `may_fuse_norm` holds, one kernel adds and normalises.

    Args:
        norm: the norm, possibly wrapped by an adapter.
        x: [..., width].
        residual: [..., width] in the dtype of `x`, added to it; None to add nothing.
        statistic: what the layer's input norm hands to its post-attention norm, the third result of its call; read by
            norms with `adds_residual` only. None for the first norm of a layer.

    Returns:
        ``(normed, summed, statistic)``: [..., width] each and any object; `summed` is `x` itself without a residual.
    """
    if type(norm) is not DecoderRMSNorm and norm_attribute(norm, "adds_residual"):
        return norm(x, residual, statistic)
    if residual is None:
        return norm(x), x, None
    if may_fuse_norm(norm, x):
        return (*add_rms_norm(x, norm.weight, norm.variance_epsilon, residual), None)
    summed = residual + x
    return norm(summed), summed, None
