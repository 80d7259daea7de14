"""The custom operator of skinny_linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Optional

from torch import Tensor

from hf_efficient.kernels.operators import define_operator


def _load_launcher() -> Callable[..., Tensor]:
    from hf_efficient.kernels.skinny_linear.triton_kernels import launch

    return launch


def _fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Optional[Tensor]],  # noqa: UP045 - the only spelling that `infer_schema` accepts
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    outputs = weights[0].shape[0] if gated else sum(weight.shape[0] for weight in weights)
    return x.new_empty((x.shape[0], outputs))


# Linear layers on x [rows, K], one bias or None for each weight: [rows, N].
skinny_linear_rows = define_operator("skinny_linear", _load_launcher, _fake)
