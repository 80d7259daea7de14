"""bhyt_norm in plain PyTorch: the definition of the operation."""

from __future__ import annotations

import torch
from torch import Tensor

# An estimated mean square is clamped to at least this share of the one that it is estimated from.
LEAST_SHARE = 1e-3


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that the operation computes in: float32, or float64 where an argument has it."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def estimate(
    variance: Tensor, kappa: float, affine: Tensor | None, branch: Tensor | None, first_bound: Tensor | None
) -> Tensor:
    """Mean square of a site estimated from that of an earlier site, both [...]; see `api.py` for the formula."""
    if affine is None and branch is None:
        return variance
    slope, intercept = (1.0, 1.0) if affine is None else affine.to(variance.dtype).unbind()
    if branch is not None and first_bound is not None:
        share, constant = branch.to(variance.dtype).unbind()
        intercept = intercept * (share * (first_bound.to(variance.dtype)[0] / kappa) ** 2 + constant)
    return torch.maximum(slope * variance + intercept, LEAST_SHARE * variance)


def bhyt_norm(
    x: Tensor,
    weight: Tensor,
    bound: Tensor,
    eps: float,
    *,
    kappa: float = 10.0,
    residual: Tensor | None = None,
    variance: Tensor | None = None,
    affine: Tensor | None = None,
    branch: Tensor | None = None,
    first_bound: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``weight * out_scale * tanh(bound / kappa * s / sqrt(v + eps))`` for s = x + residual, s itself, and v."""
    wide = compute_dtype(x, weight, bound, residual, variance)
    summed = x if residual is None else (x.to(wide) + residual.to(wide)).to(residual.dtype)
    s = summed.to(wide)
    if variance is None:
        variance = mean_square = s.square().mean(-1)
    else:
        # No gradient for these two: the source treats both as constants.
        branch, first_bound = (None if t is None else t.detach() for t in (branch, first_bound))
        mean_square = estimate(variance.to(wide), kappa, affine, branch, first_bound)
    scale = bound.to(wide)[0] / kappa * torch.rsqrt(mean_square + eps)
    normed = weight.to(wide) * torch.tanh(scale[..., None] * s)
    if out_scale is not None:
        normed = normed * out_scale.detach().to(wide)
    return normed.to(x.dtype), summed, variance
