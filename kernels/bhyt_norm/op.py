"""The custom operators of bhyt_norm, and its autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_efficient.kernels.bhyt_norm.reference import compute_dtype
from hf_efficient.kernels.operators import define_operator


def _load_forward() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    from hf_efficient.kernels.bhyt_norm.triton_kernels import launch_forward

    return launch_forward


def _load_backward() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    from hf_efficient.kernels.bhyt_norm.triton_kernels import launch_backward

    return launch_backward


def _fake_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bound: Tensor,
    variance: Tensor | None,
    affine: Tensor | None,
    branch: Tensor | None,
    first_bound: Tensor | None,
    out_scale: Tensor | None,
    eps: float,
    kappa: float,
) -> tuple[Tensor, Tensor, Tensor]:
    summed = x.new_empty(0) if residual is None else residual.new_empty(x.shape)
    wide = compute_dtype(x, weight, bound, residual, variance)
    found = x.new_empty(x.shape[0] if variance is None else 0, dtype=wide)
    return torch.empty_like(x, memory_format=torch.contiguous_format), summed, found


def _fake_backward(
    dnormed: Tensor,
    dsummed: Tensor | None,
    dvariance: Tensor | None,
    summed: Tensor,
    variance: Tensor,
    weight: Tensor,
    bound: Tensor,
    affine: Tensor | None,
    branch: Tensor | None,
    first_bound: Tensor | None,
    out_scale: Tensor | None,
    eps: float,
    kappa: float,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(summed, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        torch.empty_like(bound),
        variance.new_empty(0 if exact else summed.shape[0]),
        variance.new_empty(0) if affine is None else torch.empty_like(affine),
    )


# Normalised rows [T, D]; the sum [T, D], empty without a residual; mean squares [T], empty where they are given.
bhyt_norm_forward = define_operator("bhyt_norm", _load_forward, _fake_forward)
# Gradients of the sum, of weight and bound, of given mean squares and of affine.
bhyt_norm_backward = define_operator("bhyt_norm_backward", _load_backward, _fake_backward)


class _BhytNorm(torch.autograd.Function):
    """Differentiable in x, residual, weight, bound, variance and affine; saves the sum, mean squares, parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bound: Tensor,
        variance: Tensor | None,
        affine: Tensor | None,
        branch: Tensor | None,
        first_bound: Tensor | None,
        out_scale: Tensor | None,
        eps: float,
        kappa: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed, summed, found = bhyt_norm_forward(
            x, residual, weight, bound, variance, affine, branch, first_bound, out_scale, eps, kappa
        )
        # Without a residual, x is returned as the sum: the gradient of the residual stream then comes back here, where
        # it is added in the same kernel.
        summed = x if residual is None else summed
        mean_squares = found if variance is None else variance
        ctx.save_for_backward(summed, mean_squares, weight, bound, affine, branch, first_bound, out_scale)
        ctx.eps, ctx.kappa, ctx.exact = eps, kappa, variance is None
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return normed, summed, mean_squares

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dnormed: Tensor | None, dsummed: Tensor | None, dvariance: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        summed, variance, *parameters = ctx.saved_tensors
        if dnormed is None:
            dnormed = torch.zeros_like(summed, dtype=ctx.dtypes[0])
        dx, dweight, dbound, dgiven, daffine = bhyt_norm_backward(
            dnormed,
            dsummed,
            dvariance if ctx.exact else None,
            summed,
            variance,
            *parameters,
            ctx.eps,
            ctx.kappa,
            ctx.exact,
        )
        if ctx.exact:
            dgiven = None
        elif dvariance is not None:  # a given variance is also returned unchanged
            dgiven = dgiven + dvariance
        dresidual = None if ctx.dtypes[1] is None else dx
        daffine = None if parameters[2] is None else daffine
        return dx.to(ctx.dtypes[0]), dresidual, dweight, dbound, dgiven, daffine, None, None, None, None, None


def bhyt_norm_rows(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bound: Tensor,
    variance: Tensor | None,
    affine: Tensor | None,
    branch: Tensor | None,
    first_bound: Tensor | None,
    out_scale: Tensor | None,
    eps: float,
    kappa: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operation for x [T, D] and variance [T], differentiable."""
    arguments = (x, residual, weight, bound, variance, affine, branch, first_bound, out_scale, eps, kappa)
    differentiable = (x, residual, weight, bound, variance, affine)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable):
        return _BhytNorm.apply(*arguments)
    normed, summed, found = bhyt_norm_forward(*arguments)
    return normed, x if residual is None else summed, found if variance is None else variance
