"""The custom operator of row_adamw, which changes parameter and optimizer state in place."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hf_efficient.kernels.operators import define_operator


def _load_launcher() -> Callable[..., None]:
    from hf_efficient.kernels.row_adamw.triton_kernels import launch

    return launch


def _fake(
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
    """Returns nothing: parameter and state are changed in place."""


# One AdamW step of the rows `ids` [u] with gradients [u, F].
row_adamw_step = define_operator(
    "row_adamw", _load_launcher, _fake, mutates=("param", "exp_avg", "exp_avg_sq", "steps", "log_decays")
)
