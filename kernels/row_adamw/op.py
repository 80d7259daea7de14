"""row_adamw over the Triton kernel, as an operator for tracing that changes parameter and state in place."""

from __future__ import annotations

from torch import Tensor

from hf_efficient.kernels.operators import define_operator


def _launch(
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
) -> None:
    from hf_efficient.kernels.row_adamw.triton_kernels import launch

    launch(
        param, exp_avg, exp_avg_sq, steps, log_decays, ids, grad, scale, lr, beta1, beta2, eps, log_decay
    )  # fmt: skip


# one step for rows `ids` [u] with gradients [u, F]
row_adamw_step = define_operator(
    "row_adamw", _launch, lambda *_: None, mutates=("param", "exp_avg", "exp_avg_sq", "steps", "log_decays")
)
