"""skinny_linear over the Triton kernels, as an operator for tracing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from torch import Tensor

from hf_efficient.kernels.operators import define_operator


def _launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Optional[Tensor]],  # noqa: UP045 - the schema is read from this spelling
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    from hf_efficient.kernels.skinny_linear.triton_kernels import launch

    return launch(x, weights, biases, residual, gated)


def _fake(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], residual: Tensor | None, gated: bool
) -> Tensor:
    width = weights[0].shape[0] if gated else sum(weight.shape[0] for weight in weights)
    return x.new_empty((x.shape[0], width))


# linear maps of x [rows, K]; as many biases as weights
skinny_linear_rows = define_operator("skinny_linear", _launch, _fake)
