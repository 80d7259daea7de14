"""row_adamw in plain PyTorch: the definition of the operation."""

from __future__ import annotations

import torch
from torch import Tensor


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
) -> Tensor:
    """One AdamW step of rows `ids` of `param`, each with its own step count, and the decay of the steps it missed."""
    wide, (beta1, beta2), ids = exp_avg.dtype, betas, ids.long()
    g = grad.to(wide) if scale is None else grad.to(wide) * scale
    step = steps.index_select(0, ids) + 1
    # Per-row scalars in float64, which costs nothing: `1 - beta ** t` would lose half its digits in float32.
    t = step.double()
    decay = (log_decay - log_decays.index_select(0, ids)).exp().to(wide)
    step_size = (lr / (1 - beta1**t)).to(wide)
    bias_correction2_sqrt = (1 - beta2**t).sqrt().to(wide)
    m = exp_avg.index_select(0, ids)
    m = m + (1 - beta1) * (g - m)
    v = exp_avg_sq.index_select(0, ids) * beta2 + (1 - beta2) * g * g
    p = param.index_select(0, ids).to(wide) * decay[:, None]
    p = p - step_size[:, None] * m / (v.sqrt() / bias_correction2_sqrt[:, None] + eps)
    for target, rows in (
        (param, p.to(param.dtype)),
        (exp_avg, m),
        (exp_avg_sq, v),
        (steps, step),
        (log_decays, torch.full_like(t, log_decay)),
    ):
        target.index_copy_(0, ids, rows)
    return param
