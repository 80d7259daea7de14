"""The norm of BHyT: ``weight * tanh(lambda / kappa * x / sqrt(mean(x^2) + eps))`` in place of an RMSNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_efficient.errors import HFEError
from hf_efficient.kernels.bhyt_norm.api import bhyt_norm
from hf_efficient.kernels.bhyt_norm.reference import estimate
from hf_efficient.modeling.bhyt.configuration_bhyt import BhytConfig
from hf_efficient.modeling.decoder.rms_norm import rms_norm

# What the input norm of a layer passes to the post-attention norm: its mean square [...] and its lambda [1].
Statistic = tuple[Tensor, Tensor]


class BhytNorm(nn.Module):
    """Bounded hyperbolic tangent in place of RMSNorm, with the residual addition before it.

    | tensor | shape | where | meaning |
    |---|---|---|---|
    | `weight` | [hidden_size] | always | gamma |
    | `lam` | [1] | always | lambda |
    | `out_scale` | [hidden_size] | `bhyt_output_scale` | constant factor beside gamma, float32 |
    | `affine` | [2] | `affine`, learnable `approx` | slope and intercept of the estimate, float32 |
    | `branch` | [2] | `approx` | what the attention is expected to add (`branch_variance.py`), float32 |

    `exact`, `approx` and `affine` are the values of `config.bhyt_estimate(layer_idx)`: how a post-attention norm gets
    its mean square. Every other norm is exact. With `efficient` set to False the stock RMSNorm runs, with the same
    `weight`.

    Args:
        config: of the model.
        position: ``input`` (`input_layernorm`), ``post`` (`post_attention_layernorm`) or ``final`` (the model's norm).
        layer_idx: index of the layer; None for the final norm.

    Source: arXiv:2601.09719.
    """

    # Called by the decoder as ``norm(x, residual, statistic)``.
    adds_residual = True
    branch: Tensor | None
    out_scale: Tensor | None
    affine: nn.Parameter | None

    def __init__(self, config: BhytConfig, position: str, layer_idx: int | None = None) -> None:
        super().__init__()
        self.efficient = True
        self.position = position
        self.layer_idx = layer_idx
        self.estimate = config.bhyt_estimate(layer_idx) if position == "post" else "exact"
        self.kappa = float(config.bhyt_kappa)
        self.eps = float(config.bhyt_eps)
        self.stock_eps = float(config.rms_norm_eps)
        self.initial_lambda = config.bhyt_lambda(position, layer_idx)
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.lam = nn.Parameter(torch.empty(1))
        self.learnable_lambda = config.bhyt_learnable_lambda
        self.learnable_estimate = self.estimate == "approx" and config.bhyt_learnable_estimate
        has_line = self.learnable_estimate or self.estimate == "affine"
        self.register_parameter("affine", nn.Parameter(torch.empty(2, dtype=torch.float32)) if has_line else None)
        shapes = {
            "branch": (2,) if self.estimate == "approx" else None,
            "out_scale": (config.hidden_size,) if config.bhyt_output_scale else None,
        }
        for name, shape in shapes.items():
            self.register_buffer(name, None if shape is None else torch.empty(shape, dtype=torch.float32))
        self.reset_parameters()
        self.freeze_constants()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the paper's initial values; `branch` is NaN until it is computed from the weights."""
        init.ones_(self.weight)
        init.constant_(self.lam, self.initial_lambda)
        if self.affine is not None:  # (1, 1) leaves an `approx` estimate unchanged; (1, 0) is the input norm's value
            init.copy_(self.affine, self.affine.new_tensor([1.0, float(self.estimate == "approx")]))
        if self.out_scale is not None:
            init.ones_(self.out_scale)
        if self.branch is not None:
            init.constant_(self.branch, float("nan"))

    def freeze_constants(self) -> None:
        """Freeze the parameters that the configuration does not train; call it after loading, which replaces them."""
        if not self.learnable_lambda:
            self.lam.requires_grad_(False)
        if self.affine is not None and not self.learnable_estimate:
            self.affine.requires_grad_(False)

    def train(self, mode: bool = True) -> Any:
        """As in PyTorch; constants stay frozen."""
        super().train(mode)
        self.freeze_constants()  # PEFT's modules_to_save sets requires_grad on every parameter of a module
        return self

    def forward(
        self, x: Tensor, residual: Tensor | None = None, statistic: Statistic | None = None
    ) -> tuple[Tensor, Tensor, Statistic | None]:
        """The norm of ``x + residual``, the sum itself, and the statistic for the layer's post-attention norm.

        Args:
            x: [..., hidden_size].
            residual: [..., hidden_size] in the dtype of `x` or a wider one, or None.
            statistic: returned by the layer's input norm; needed if this norm estimates its mean square.

        Returns:
            ``(normed, summed, statistic)``: [..., hidden_size] in the dtype of `x`; [..., hidden_size] in the dtype of
            `residual`; the mean square [...] and lambda [1], or None if `efficient` is False.

        Raises:
            HFEError: this norm estimates its mean square, and `statistic` is None.
        """
        if not self.efficient:
            summed = x if residual is None else residual + x
            return rms_norm(summed, self.weight, self.stock_eps), summed, None
        variance = first_lam = None
        if self.estimate != "exact":
            if statistic is None:
                raise HFEError(
                    f"the post-attention norm of layer {self.layer_idx} ({self.estimate}) was called without the mean "
                    "square of the layer's input norm",
                    "switch `efficient` of both norms of a layer together; a replacement of the input norm must return "
                    "a statistic too",
                )
            variance, first_lam = statistic
        normed, summed, found = bhyt_norm(
            x,
            self.weight,
            self.lam,
            self.eps,
            kappa=self.kappa,
            residual=residual,
            variance=variance,
            affine=self.affine,
            branch=self.branch,
            first_bound=None if self.branch is None else first_lam,
            out_scale=self.out_scale,
        )
        return normed, summed, (found, self.lam.detach())

    def tanh_scale(self, statistic: Statistic | None, returned: Statistic) -> Tensor:
        """The factor [...] of each row inside the tanh, from the `statistic` of a call and the one that it returned."""
        variance = returned[0]
        if self.estimate != "exact" and statistic is not None:
            first_lam = None if self.branch is None else statistic[1]
            variance = estimate(variance, self.kappa, self.affine, self.branch, first_lam)
        return self.lam.to(variance.dtype) / self.kappa * torch.rsqrt(variance + self.eps)

    def float32_tensors(self) -> dict[str, Tensor]:
        """By name, the tensors that stay in float32 whatever the model's dtype."""
        tensors = {"affine": self.affine, "branch": self.branch, "out_scale": self.out_scale}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As in PyTorch, but ``.to(torch.bfloat16)`` does not round the tensors that stay in float32."""
        exact = {name: tensor.data for name, tensor in self.float32_tensors().items()}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            tensor = getattr(self, name)
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = before.to(tensor.device)
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.position}, {self.estimate}, kappa={self.kappa}, eps={self.eps}"
