"""Triton kernel of row_adamw and the function that launches it. No checks of arguments: `api.py` sees to those."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_efficient.kernels.row_adamw.configs import LaunchConfig, launch_config

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False


if HAVE_TRITON:
    _TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

    @triton.jit(do_not_specialize=["rows"])
    def row_adamw_kernel(
        param,
        exp_avg,
        exp_avg_sq,
        steps,
        log_decays,
        ids,
        grad,
        scale,
        lr: tl.float64,
        beta1: tl.float64,
        beta2: tl.float64,
        rest1: tl.float64,
        rest2: tl.float64,
        log_beta1: tl.float64,
        log_beta2: tl.float64,
        eps: tl.float64,
        log_decay: tl.float64,
        rows,
        width,
        param_stride,
        exp_avg_stride,
        exp_avg_sq_stride,
        grad_stride,
        WIDE: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
    ):
        """One program a row: only so can it count the row's steps without a second launch."""
        position = tl.program_id(0).to(tl.int64)
        row = tl.load(ids + position).to(tl.int64)
        if (row >= 0) & (row < rows):
            step = tl.load(steps + row) + 1
            total = tl.full((), log_decay, tl.float64)
            decayed = tl.exp(total - tl.load(log_decays + row)).to(WIDE)
            count = step.to(tl.float64)
            step_size = (lr / (1.0 - tl.exp(count * log_beta1))).to(WIDE)
            root = tl.sqrt(1.0 - tl.exp(count * log_beta2)).to(WIDE)
            new1, keep2 = tl.full((), rest1, WIDE), tl.full((), beta2, WIDE)
            new2, small = tl.full((), rest2, WIDE), tl.full((), eps, WIDE)
            factor = tl.full((), 1.0, WIDE)
            if scale is not None:
                factor = tl.load(scale).to(WIDE)
            # Every thread reads the numbers of the row, one writes them: not before all have read.
            tl.debug_barrier()
            tl.store(steps + row, step)
            tl.store(log_decays + row, total)
            param += row * param_stride
            exp_avg += row * exp_avg_stride
            exp_avg_sq += row * exp_avg_sq_stride
            grad += position * grad_stride
            for start in range(0, width, BLOCK_WIDTH):
                column = start + tl.arange(0, BLOCK_WIDTH)
                inside = column < width
                g = tl.load(grad + column, mask=inside, other=0.0).to(WIDE) * factor
                m = tl.load(exp_avg + column, mask=inside, other=0.0)
                v = tl.load(exp_avg_sq + column, mask=inside, other=0.0)
                p = tl.load(param + column, mask=inside, other=0.0).to(WIDE)
                m += new1 * (g - m)
                v = v * keep2 + new2 * g * g
                p = p * decayed - step_size * m / (tl.sqrt(v) / root + small)
                tl.store(exp_avg + column, m, mask=inside)
                tl.store(exp_avg_sq + column, v, mask=inside)
                tl.store(param + column, p.to(param.dtype.element_ty), mask=inside)


def launch(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    log_decays: Tensor,
    ids: Tensor,
    grad: Tensor,
    scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    log_decay: float,
    config: LaunchConfig | None = None,
) -> None:
    """Changes rows `ids` [u] of the first five in place."""
    if grad.numel() == 0:
        return
    rows, width = param.shape
    if grad.stride(-1) != 1 and width > 1:
        grad = grad.contiguous()
    if config is None:
        config = launch_config(width)
    row_adamw_kernel[(ids.shape[0],)](
        param,
        exp_avg,
        exp_avg_sq,
        steps,
        log_decays,
        ids.contiguous(),
        grad,
        scale,
        lr,
        beta1,
        beta2,
        1.0 - beta1,
        1.0 - beta2,
        _log(beta1),
        _log(beta2),
        eps,
        log_decay,
        rows,
        width,
        param.stride(0),
        exp_avg.stride(0),
        exp_avg_sq.stride(0),
        grad.stride(0),
        WIDE=_TRITON_DTYPE[exp_avg.dtype],
        BLOCK_WIDTH=config.block_width,
        num_warps=config.num_warps,
    )


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -math.inf
