"""Triton kernel of row_adamw and its launcher. Arguments are checked by `api.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_efficient.kernels.row_adamw.configs import LaunchConfig, launch_config
from hf_efficient.kernels.triton_language import HAVE_TRITON, tl, triton

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
        one_minus_beta1: tl.float64,
        one_minus_beta2: tl.float64,
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
        COMPUTE_DTYPE: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
    ):
        """AdamW (arXiv:1711.05101, algorithm 2) of one row, with m = exp_avg and v = exp_avg_sq.

        One program per row, so that it can update the row's step count without a second launch.
        """
        position = tl.program_id(0).to(tl.int64)
        row = tl.load(ids + position).to(tl.int64)
        if (row >= 0) & (row < rows):
            step = tl.load(steps + row) + 1
            log_decay_now = tl.full((), log_decay, tl.float64)
            decay = tl.exp(log_decay_now - tl.load(log_decays + row)).to(COMPUTE_DTYPE)
            t = step.to(tl.float64)
            # beta ** t as exp(t * log(beta)); step_size = lr / bias_correction1.
            step_size = (lr / (1.0 - tl.exp(t * log_beta1))).to(COMPUTE_DTYPE)
            bias_correction2_sqrt = tl.sqrt(1.0 - tl.exp(t * log_beta2)).to(COMPUTE_DTYPE)
            # The coefficients in the compute dtype: c1 = 1 - beta1, b2 = beta2, c2 = 1 - beta2.
            c1, b2 = tl.full((), one_minus_beta1, COMPUTE_DTYPE), tl.full((), beta2, COMPUTE_DTYPE)
            c2, epsilon = tl.full((), one_minus_beta2, COMPUTE_DTYPE), tl.full((), eps, COMPUTE_DTYPE)
            grad_scale = tl.full((), 1.0, COMPUTE_DTYPE)
            if scale is not None:
                grad_scale = tl.load(scale).to(COMPUTE_DTYPE)
            # All threads read the row's step and decay, one writes them: wait until all have read.
            tl.debug_barrier()
            tl.store(steps + row, step)
            tl.store(log_decays + row, log_decay_now)
            param += row * param_stride
            exp_avg += row * exp_avg_stride
            exp_avg_sq += row * exp_avg_sq_stride
            grad += position * grad_stride
            for start in range(0, width, BLOCK_WIDTH):
                offs = start + tl.arange(0, BLOCK_WIDTH)
                inside = offs < width
                g = tl.load(grad + offs, mask=inside, other=0.0).to(COMPUTE_DTYPE) * grad_scale
                m = tl.load(exp_avg + offs, mask=inside, other=0.0)
                v = tl.load(exp_avg_sq + offs, mask=inside, other=0.0)
                p = tl.load(param + offs, mask=inside, other=0.0).to(COMPUTE_DTYPE)
                m += c1 * (g - m)
                v = v * b2 + c2 * g * g
                p = p * decay - step_size * m / (tl.sqrt(v) / bias_correction2_sqrt + epsilon)
                tl.store(exp_avg + offs, m, mask=inside)
                tl.store(exp_avg_sq + offs, v, mask=inside)
                tl.store(param + offs, p.to(param.dtype.element_ty), mask=inside)


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
    """Updates rows `ids` [u] of parameter, moments, steps and decays in place."""
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
        COMPUTE_DTYPE=_TRITON_DTYPE[exp_avg.dtype],
        BLOCK_WIDTH=config.block_width,
        num_warps=config.num_warps,
    )


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -math.inf
