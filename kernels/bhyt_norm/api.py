"""Public function of the operation bhyt_norm."""

from __future__ import annotations

from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.kernels.bhyt_norm.configs import MAX_WIDTH
from hf_efficient.kernels.bhyt_norm.reference import bhyt_norm as reference_bhyt_norm
from hf_efficient.kernels.bhyt_norm.reference import compute_dtype
from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.kernels.validate import FLOATS, check_dtype, check_not_empty, check_rank, check_shape, check_tensors

_USUAL = {"eps": 1e-6, "kappa": 10.0}


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bounded hyperbolic tangent in place of RMSNorm, with the residual addition before it.

    With ``s = x + residual``, rounded to the dtype of `residual`, and its mean square ``v`` over the last dimension::

        normed = weight * out_scale * tanh(bound / kappa * s / sqrt(v' + eps))

    At an exact site ``v' = v = mean(s^2)``. At a site whose mean square is estimated from an earlier one, `variance`,
    no sum over the row is taken: with ``slope, intercept = affine`` (1, 1 if None) and ``c, constant = branch``::

        v' = max(slope * variance + intercept * term, variance / 1000)
        term = c * (first_bound / kappa)^2 + constant      with `branch`
        term = 1                                           with `affine` alone

    and ``v' = variance`` with neither. Computed in float32 (float64 where an argument has it) and rounded once; where
    `normed` is of half precision, tanh is the device's instruction, with an error of at most 2^-11.

    Differentiable in `x`, `residual`, `weight`, `bound`, `variance` and `affine`, and through the returned ``v``. The
    gradients of the parameters are summed in a fixed order: two runs agree bit for bit. The backward pass saves
    the sum, which is the residual stream anyway, and ``v``.

    Args:
        x: [..., D], D up to 16,384; float16, bfloat16, float32 or float64; any strides.
        weight: [D], one of the same dtypes.
        bound: [1], the lambda of the source; of any sign.
        eps: added to the mean square, positive.
        kappa: coverage constant of Chebyshev's inequality, positive.
        residual: [..., D], in the dtype of `x` or a wider one; None for no addition.
        variance: [...], float32 (float64 beside float64), the mean square of an earlier site; None for an exact one.
        affine: [2], goes with `variance`.
        branch: [2], goes with `variance` and `first_bound`: what the branch between the sites adds. No gradient.
        first_bound: [1], the lambda of the earlier site. Gets no gradient here.
        out_scale: [1] or [D], a constant factor; None for 1. Gets no gradient.
        backend: ``"reference"``, ``"triton"``, or None: what `HFE_BACKEND` names, else Triton on CUDA and the reference
            elsewhere.

    Returns:
        ``(normed, summed, v)``: [..., D] in the dtype of `x`; [..., D] in the dtype of `residual`, and `x` itself where
        there is none; [...], `variance` itself where it is given.

    Raises:
        HFEError: wrong shape, dtype, device or layout, or an eps or kappa that is not positive.
        BackendError: the named backend cannot run here.

    Source: BHyT, arXiv:2601.09719; without the mean, as its released code has it. `branch` is its baseline estimate,
        with `affine` its variants; `affine` alone, a fitted line, and `out_scale` are ours.

    Example:
        >>> import torch
        >>> normed, summed, v = bhyt_norm(torch.tensor([[3.0, -4.0]]), torch.ones(2), torch.tensor([10.0]), 1e-6)
        >>> normed, v
        (tensor([[ 0.6903, -0.8115]]), tensor([12.5000]))
    """
    optional = {
        "residual": residual,
        "variance": variance,
        "affine": affine,
        "branch": branch,
        "first_bound": first_bound,
        "out_scale": out_scale,
    }
    given = {"x": x, "weight": weight, "bound": bound}
    given |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_tensors("bhyt_norm", given)
    for name, tensor in given.items():
        check_dtype("bhyt_norm", name, tensor, FLOATS)
    check_rank("bhyt_norm", "x", x, 1, None, "[..., D]")
    check_not_empty("bhyt_norm", "x", x, dimension=-1)
    width = x.shape[-1]
    if width > MAX_WIDTH:
        raise HFEError(
            f"bhyt_norm: `x` has rows of {width} elements, and {MAX_WIDTH} are the most", "split the rows beforehand"
        )
    check_shape("bhyt_norm", "weight", weight, (width,), "[D] for `x` [..., D]")
    check_shape("bhyt_norm", "bound", bound, (1,), "[1]")
    for name, value in (("eps", eps), ("kappa", kappa)):
        if not value > 0:
            raise HFEError(f"bhyt_norm: {name}={value} must be positive", f"the usual {name} is {_USUAL[name]}")
    if residual is not None:
        check_shape("bhyt_norm", "residual", residual, tuple(x.shape), "that of `x`")
        if residual.dtype != x.dtype and residual.dtype.itemsize <= x.dtype.itemsize:
            check_dtype("bhyt_norm", "residual", residual, (x.dtype,))
    for name in ("affine", "branch"):
        if name in given:
            check_shape("bhyt_norm", name, given[name], (2,), "[2]")
            if variance is None:
                raise HFEError(
                    f"bhyt_norm: `{name}` is given without `variance`",
                    "pass the mean square that the estimate starts from",
                )
    if (branch is None) != (first_bound is None):
        raise HFEError("bhyt_norm: `branch` and `first_bound` go together", "pass both or neither")
    if variance is not None:
        check_shape("bhyt_norm", "variance", variance, tuple(x.shape[:-1]), "[...] for `x` [..., D]")
        check_dtype("bhyt_norm", "variance", variance, (compute_dtype(x, weight, bound, residual),))
    if first_bound is not None:
        check_shape("bhyt_norm", "first_bound", first_bound, (1,), "[1]")
    if out_scale is not None and out_scale.shape != (1,):
        check_shape("bhyt_norm", "out_scale", out_scale, (width,), "[1], or [D] for `x` [..., D]")

    if select_backend("bhyt_norm", backend, x.device) == "reference":
        normed, summed, v = reference_bhyt_norm(x, weight, bound, eps, kappa=kappa, **optional)
        return normed.contiguous(), summed if residual is None else summed.contiguous(), v
    from hf_efficient.kernels.bhyt_norm.op import bhyt_norm_rows

    # Always of rank 2, so that another number of leading dimensions does not recompile.
    normed, summed, v = bhyt_norm_rows(
        x.reshape(-1, width),
        None if residual is None else residual.reshape(-1, width),
        weight,
        bound,
        None if variance is None else variance.reshape(-1),
        affine,
        branch,
        first_bound,
        out_scale,
        float(eps),
        float(kappa),
    )
    return normed.view(x.shape), summed.view(x.shape), v.view(x.shape[:-1])
