"""add_rms_norm over the Triton kernel: operators for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.kernels.operators import define_operator


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from hf_efficient.kernels.add_rms_norm.triton_kernels import launch_norm

    return launch_norm(x, weight, eps)


def _add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from hf_efficient.kernels.add_rms_norm.triton_kernels import launch_add_norm

    return launch_add_norm(x, residual, weight, eps)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# Two operators, since one that returned its own argument as the sum would alias it, which operators may not.
# normalised x [rows, D]
rms_norm_rows = define_operator("rms_norm", _norm, lambda x, weight, eps: _like(x))
# normalised x + residual [rows, D], and that sum
add_rms_norm_rows = define_operator("add_rms_norm", _add_norm, lambda x, residual, weight, eps: (_like(x), _like(x)))
