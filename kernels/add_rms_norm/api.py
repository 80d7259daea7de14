"""Public function of the operation add_rms_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.kernels.add_rms_norm.configs import MAX_WIDTH
from hf_efficient.kernels.add_rms_norm.reference import add_rms_norm as reference_add_rms_norm
from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.kernels.validate import (
    check_dtype,
    check_no_gradient,
    check_not_empty,
    check_rank,
    check_shape,
    check_tensors,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def add_rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Residual addition and RMSNorm in one kernel.

    ``summed = x + residual``, rounded to the dtype of `x`, and ``normed = weight * round(summed * r)`` with
    ``r = 1 / sqrt(mean(summed^2) + eps)`` over the last dimension. Computed in float32 and rounded where the stock
    families round: after the normalisation, and after the weight. For inference only.

    Args:
        x: [..., D], D up to 65,536; float16, bfloat16 or float32; any strides.
        weight: [D], in the dtype of `x`.
        eps: added to the mean square, positive or zero.
        residual: as `x`; None for RMSNorm alone.
        backend: ``"reference"``, ``"triton"``, or None: what `HFE_BACKEND` names, else Triton on CUDA and the reference
            elsewhere.

    Returns:
        ``(normed, summed)``, each [..., D] in the dtype of `x`, contiguous. Without a residual, `summed` is `x` itself.

    Raises:
        HFEError: wrong shape, dtype or device, or a tensor that requires a gradient.
        BackendError: the named backend cannot run here.

    Source: RMSNorm, arXiv:1910.07467, equation 4; rounded as in the Llama family.

    Example:
        >>> import torch
        >>> normed, summed = add_rms_norm(torch.tensor([[1.0, 3.0]]), torch.ones(2), 0.0, torch.tensor([[2.0, 1.0]]))
        >>> summed, normed.square().mean()
        (tensor([[3., 4.]]), tensor(1.))
    """
    named = {"x": x, "weight": weight} if residual is None else {"x": x, "weight": weight, "residual": residual}
    check_tensors("add_rms_norm", named)
    check_no_gradient("add_rms_norm", named)
    check_dtype("add_rms_norm", "x", x, _DTYPES)
    check_dtype("add_rms_norm", "weight", weight, (x.dtype,))
    check_rank("add_rms_norm", "x", x, 1, None, "[..., D]")
    check_not_empty("add_rms_norm", "x", x, dimension=-1)
    width = x.shape[-1]
    if width > MAX_WIDTH:
        raise HFEError(
            f"add_rms_norm: `x` has rows of {width} elements, and {MAX_WIDTH} are the most", "use the module instead"
        )
    check_shape("add_rms_norm", "weight", weight, (width,), "[D] for `x` [..., D]")
    if residual is not None:
        check_dtype("add_rms_norm", "residual", residual, (x.dtype,))
        check_shape("add_rms_norm", "residual", residual, tuple(x.shape), "that of `x`")

    if select_backend("add_rms_norm", backend, x.device) == "reference":
        normed, summed = reference_add_rms_norm(x, weight, eps, residual)
        return normed.contiguous(), summed if residual is None else summed.contiguous()
    from hf_efficient.kernels.add_rms_norm.op import add_rms_norm_rows, rms_norm_rows

    flat = x if x.dim() == 2 else x.reshape(-1, width)
    if residual is None:
        return rms_norm_rows(flat, weight, eps).view(x.shape), x
    normed, summed = add_rms_norm_rows(flat, residual.reshape(flat.shape), weight, eps)
    return normed.view(x.shape), summed.view(x.shape)
