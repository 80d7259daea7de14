"""Public function of the operation skinny_linear."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.kernels.skinny_linear.configs import MAX_ROWS
from hf_efficient.kernels.skinny_linear.reference import skinny_linear as reference_skinny_linear
from hf_efficient.kernels.validate import (
    check_dtype,
    check_no_gradient,
    check_not_empty,
    check_rank,
    check_rows_contiguous,
    check_shape,
    check_tensors,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def skinny_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Linear layers on the few rows of a decoding step: weights are read once, at memory bandwidth, in one launch.

    Side by side: ``out = concat_i(x W_i^T + b_i) + residual``. Gated: ``out = silu(x W_0^T + b_0) * (x W_1^T + b_1)``.
    Computed in float32 and rounded once. For inference only.

    Args:
        x: [..., K], at most 64 rows in all; float16, bfloat16 or float32.
        weights: one to three tensors [N_i, K], as `torch.nn.Linear` keeps them, in the dtype of `x`; rows contiguous.
            They are not packed into one.
        biases: for each weight a tensor [N_i] in the same dtype, or None; None for no bias at all.
        residual: [..., sum N_i], in the dtype of `x`, added before rounding; not with `gated`.
        gated: exactly two weights of one shape are the gate and the up projection of a gated feed-forward.
        backend: ``"reference"``, ``"triton"``, or None: what `HFE_BACKEND` names, else Triton on CUDA and the reference
            elsewhere.

    Returns:
        [..., sum N_i], or [..., N_0] when gated; contiguous, in the dtype of `x`. Deterministic for one number
        of rows; for another one, other kernels may add in another order.

    Raises:
        HFEError: wrong shape, dtype, device or layout, more than 64 rows, or a tensor that requires a gradient.
        BackendError: the named backend cannot run here.

    Source: our own (`README.md` beside this file).

    Example:
        >>> import torch
        >>> skinny_linear(torch.tensor([[1.0, 2.0]]), [torch.eye(2), torch.ones(1, 2)])
        tensor([[1., 2., 3.]])
    """
    if biases is None:
        biases = [None] * len(weights)
    _check(x, weights, biases, residual, gated)
    if select_backend("skinny_linear", backend, x.device) == "reference":
        return reference_skinny_linear(x, weights, biases, residual=residual, gated=gated)
    from hf_efficient.kernels.skinny_linear.op import skinny_linear_rows

    leading = x.shape[:-1]
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if residual is not None and residual.dim() != 2:
        residual = residual.reshape(flat.shape[0], -1)
    out = skinny_linear_rows(flat, weights, biases, residual, gated)
    return out if x.dim() == 2 else out.view(*leading, out.shape[-1])


def _check(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], residual: Tensor | None, gated: bool
) -> None:
    """Raise HFEError for arguments that the operation does not take."""
    count = len(weights)
    if not 1 <= count <= 3 or (gated and count != 2):
        wanted = "exactly 2 weights when gated" if gated else "1 to 3 weights"
        raise HFEError(f"skinny_linear: `weights` holds {count} tensors", f"pass {wanted}")
    if len(biases) != count:
        raise HFEError(
            f"skinny_linear: `biases` holds {len(biases)} entries for {count} weights", "pass one, or None, for each"
        )
    named = {"x": x}
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        named[f"weights[{i}]"] = weight
        if bias is not None:
            named[f"biases[{i}]"] = bias
    if residual is not None:
        named["residual"] = residual
    check_tensors("skinny_linear", named)
    check_no_gradient("skinny_linear", named)
    check_dtype("skinny_linear", "x", x, _DTYPES)
    same = (x.dtype,)
    for name, tensor in named.items():
        check_dtype("skinny_linear", name, tensor, same)
    check_rank("skinny_linear", "x", x, 1, None, "[..., K]")
    check_not_empty("skinny_linear", "x", x, dimension=-1)
    depth = x.shape[-1]
    rows = x.numel() // depth
    if rows > MAX_ROWS:
        raise HFEError(
            f"skinny_linear: `x` has {rows} rows, and {MAX_ROWS} are the most",
            "use torch.nn.functional.linear, which is faster for many rows",
        )
    width = 0
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        name = f"weights[{i}]"
        check_rank("skinny_linear", name, weight, 2, 2, "[N, K]")
        check_shape("skinny_linear", name, weight, (weight.shape[0], depth), "[N, K] for `x` [..., K]")
        check_not_empty("skinny_linear", name, weight, dimension=0)
        check_rows_contiguous("skinny_linear", name, weight)
        if bias is not None:
            check_shape("skinny_linear", f"biases[{i}]", bias, (weight.shape[0],), f"[N] for `{name}` [N, K]")
        width += weight.shape[0]
    if gated:
        check_shape("skinny_linear", "weights[1]", weights[1], tuple(weights[0].shape), "that of `weights[0]`")
        if residual is not None:
            raise HFEError(
                "skinny_linear: `residual` is given with gated=True", "add it to the down projection instead"
            )
    if residual is not None:
        check_shape("skinny_linear", "residual", residual, (*x.shape[:-1], width), "[..., sum N] for `x` [..., K]")
