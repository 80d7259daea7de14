"""Public function of the operation row_adamw."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.environment import check_data
from hf_efficient.errors import HFEError
from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.kernels.row_adamw.reference import row_adamw as reference_row_adamw
from hf_efficient.kernels.validate import (
    FLOATS,
    INTEGERS,
    check_dtype,
    check_ids,
    check_no_gradient,
    check_not_empty,
    check_rank,
    check_rows_contiguous,
    check_shape,
    check_tensors,
)


def row_adamw(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    log_decays: Tensor,
    ids: Tensor,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    log_decay: float = 0.0,
    scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of AdamW for some rows of a matrix, each row an AdamW of its own, in place and in one launch.

    For each i, with r = ids[i], g = scale * grad[i] and (β1, β2) = betas::

        t = steps[r] = steps[r] + 1
        m = exp_avg[r] = β1 m + (1 - β1) g
        v = exp_avg_sq[r] = β2 v + (1 - β2) g²
        param[r] = exp(log_decay - log_decays[r]) param[r] - lr / (1 - β1^t) * m / (sqrt(v / (1 - β2^t)) + eps)
        log_decays[r] = log_decay

    `log_decay` is the sum of log(1 - lr weight_decay) over all steps so far, this one included, so that a row makes
    up the decay of the steps that it missed. A row that takes part in every step gets what torch.optim.AdamW gives.
    Computed in float32 (float64 where the moments have it), per-row scalars in float64. A half-precision
    parameter is rounded to nearest once a step: changes of less than half a unit in its last place are lost.
    For use under `torch.no_grad()`.

    Args:
        param: [V, F], float16, bfloat16, float32 or float64. Here and in the moments the last dimension must be
            contiguous, other strides are free.
        exp_avg, exp_avg_sq: [V, F], float32; float64 for a parameter in float64.
        steps: [V], int32, the steps in which each row has taken part.
        log_decays: [V], float64, `log_decay` of each row's last step.
        ids: [u], int32 or int64, each in [0, V), **none twice** (checked with `HFE_CHECK=1`): otherwise the result
            is undefined.
        grad: [u, F], float16, bfloat16, float32 or float64; any strides.
        lr, betas, eps: as in torch.optim.AdamW.
        log_decay: see above; 0.0 for no weight decay.
        scale: float32 tensor without dimensions, a factor of the gradient, as from gradient clipping; None for 1.
        backend: ``"reference"``, ``"triton"``, or None: what `HFE_BACKEND` names, else Triton on CUDA and the reference
            elsewhere.

    Returns:
        `param`.

    Raises:
        HFEError: wrong shape, dtype, device or layout, an id that occurs twice (`HFE_CHECK=1`), or a tensor that
            requires a gradient while gradients are on.
        TokenIdError: an id outside [0, V). Checked on the CPU, and elsewhere with `HFE_CHECK=1`; without it the
            Triton kernel skips it.
        BackendError: the named backend cannot run here.

    Source: AdamW, arXiv:1711.05101, algorithm 2; the row-wise form is our own (`README.md` beside this file).

    Example:
        >>> import torch
        >>> param, m, v = torch.ones(3, 1), torch.zeros(3, 1), torch.zeros(3, 1)
        >>> steps, log_decays = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.float64)
        >>> ids, grad = torch.tensor([1]), torch.tensor([[4.0]])
        >>> row_adamw(param, m, v, steps, log_decays, ids, grad, lr=0.25, betas=(0.9, 0.999), eps=1e-8).flatten()
        tensor([1.0000, 0.7500, 1.0000])
    """
    _check(param, exp_avg, exp_avg_sq, steps, log_decays, ids, grad, scale)
    if select_backend("row_adamw", backend, param.device) == "reference":
        return reference_row_adamw(
            param, exp_avg, exp_avg_sq, steps, log_decays, ids, grad,
            lr=lr, betas=betas, eps=eps, log_decay=log_decay, scale=scale,
        )  # fmt: skip
    from hf_efficient.kernels.row_adamw.op import row_adamw_step

    row_adamw_step(param, exp_avg, exp_avg_sq, steps, log_decays, ids, grad, scale, lr, *betas, eps, log_decay)
    return param


def _check(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    log_decays: Tensor,
    ids: Tensor,
    grad: Tensor,
    scale: Tensor | None,
) -> None:
    """Raise HFEError for arguments that the operation does not take."""
    op = "row_adamw"
    matrices = {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    of_rows = {"steps": (steps, torch.int32), "log_decays": (log_decays, torch.float64)}
    rest = {"steps": steps, "log_decays": log_decays, "ids": ids, "grad": grad}
    check_tensors(op, {**matrices, **rest, **({} if scale is None else {"scale": scale})})
    check_no_gradient(op, {**matrices, "grad": grad})
    check_dtype(op, "param", param, FLOATS)
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    for name in ("exp_avg", "exp_avg_sq"):
        check_dtype(op, name, matrices[name], (wide,))
    for name, (tensor, dtype) in of_rows.items():
        check_dtype(op, name, tensor, (dtype,))
    check_dtype(op, "ids", ids, INTEGERS)
    check_dtype(op, "grad", grad, FLOATS)
    check_rank(op, "param", param, 2, 2, "[V, F]")
    check_rank(op, "ids", ids, 1, 1, "[u]")
    rows, width = param.shape
    check_not_empty(op, "param", param, dimension=1)
    for name in ("exp_avg", "exp_avg_sq"):
        check_shape(op, name, matrices[name], (rows, width), "[V, F] for `param` [V, F]")
    for name, (tensor, _) in of_rows.items():
        check_shape(op, name, tensor, (rows,), "[V] for `param` [V, F]")
        check_rows_contiguous(op, name, tensor)
    check_shape(op, "grad", grad, (ids.shape[0], width), "[u, F] for `ids` [u] and `param` [V, F]")
    for name, tensor in matrices.items():
        check_rows_contiguous(op, name, tensor)
    if scale is not None:
        check_dtype(op, "scale", scale, (torch.float32, wide))
        check_shape(op, "scale", scale, (), "that of a number, ()")
    check_ids(op, ids, rows)
    if check_data() and not torch.compiler.is_compiling() and type(ids) is Tensor and not ids.is_meta:
        ordered, _ = ids.sort()
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if twice.numel() > 0:
            raise HFEError(f"{op}: `ids` holds {int(twice[0])} twice", "add up the gradients of equal ids first")
