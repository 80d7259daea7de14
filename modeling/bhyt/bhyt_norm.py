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

# What a layer's input norm passes to its post-attention norm: the mean square of each of its rows, [...], and its
# lambda [1].
Statistic = tuple[Tensor, Tensor]


class BhytNorm(nn.Module):
    """Bounded hyperbolic tangent in place of RMSNorm, with the residual addition before it.

    For ``s = x + residual``, with the mean square v of each row over the last dimension::

        normed = weight * out_scale * tanh(lam / kappa * s / sqrt(v + eps))

    By Chebyshev's inequality at most one channel in kappa^2 of a row has an absolute value above kappa times the root
    mean square, so at most this share has an argument of tanh above `lam`. How v is computed is named by the attribute
    `self.estimate`: ``exact``, ``approx`` or ``affine``. A post-attention norm has the value of
    `config.bhyt_estimate(layer_idx)`, every other norm is exact. With ``v_in, lam_in`` of the layer's input norm::

        exact:   v = mean(s^2)
        approx:  v = slope * v_in + intercept * (branch[0] * (lam_in / kappa)^2 + branch[1])
        affine:  v = slope * v_in + intercept

    where ``slope, intercept = self.affine``, a parameter, or 1, 1 without it. The results of `approx` and `affine` are
    raised to at least ``v_in / 1000``.

    | tensor | kind | shape | created if | meaning |
    |---|---|---|---|---|
    | `weight` | parameter | [hidden_size] | always | gamma |
    | `lam` | parameter | [1] | always | lambda |
    | `affine` | float32 parameter | [2] | `estimate` is `affine`, or `approx` with `bhyt_learnable_estimate` | slope |
    | | | | | and intercept |
    | `branch` | float32 buffer | [2] | `estimate` is `approx` | what attention adds, see `branch_variance.py` |
    | `out_scale` | float32 buffer | [hidden_size] | `bhyt_output_scale` | fixed scale of each channel |

    A tensor that is not created is None. The parameter `lam` is trained if `bhyt_learnable_lambda` is set, else frozen.
    The parameter `affine` is trained if `estimate` is `approx`, where it is created only with
    `bhyt_learnable_estimate`; with the estimate `affine` it is frozen. `branch` is NaN until it is computed from the
    weights. A user who sets the attribute `efficient` to False gets the stock RMSNorm with the same `weight`, to
    compare.

    Args:
        config: the model's configuration.
        position: ``input`` (`input_layernorm`), ``post`` (`post_attention_layernorm`) or ``final`` (the model's norm).
        layer_idx: index of the layer; None for the final norm.

    Source: arXiv:2601.09719.
    """

    # Makes `add_and_norm` of the decoder call this norm as ``norm(x, residual, statistic)``.
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
        has_affine = self.learnable_estimate or self.estimate == "affine"
        self.register_parameter("affine", nn.Parameter(torch.empty(2, dtype=torch.float32)) if has_affine else None)
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
        """Set the initial values of arXiv:2601.09719, in place.

        `weight` and `out_scale` are 1 and `lam` is the configured lambda. `branch` is NaN, which marks that it has not
        been computed yet: `refresh_branch_variance` of the model computes it from the weights.
        """
        init.ones_(self.weight)
        init.constant_(self.lam, self.initial_lambda)
        # (1, 1) makes the estimate `approx` the same as without the parameter; (1, 0) makes the estimate `affine` the
        # mean square of the input norm.
        if self.affine is not None:
            init.copy_(self.affine, self.affine.new_tensor([1.0, float(self.estimate == "approx")]))
        if self.out_scale is not None:
            init.ones_(self.out_scale)
        if self.branch is not None:
            init.constant_(self.branch, float("nan"))

    def freeze_constants(self) -> None:
        """Set `requires_grad` to False for the parameters `lam` and `affine` where they are not to be trained.

        With the estimate `affine` the configuration never trains `affine`. Call this after loading, which replaces the
        parameters.
        """
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
        """Return the norm of ``x + residual``, the sum, and the statistic for the layer's post-attention norm.

        Args:
            x: [..., hidden_size].
            residual: [..., hidden_size] in the dtype of `x` or a wider one; None to add nothing.
            statistic: the third result of the layer's input norm; read only if `estimate` is `approx` or `affine`.

        Returns:
            ``(normed, summed, statistic)``: [..., hidden_size] in the dtype of `x`; [..., hidden_size] in the dtype of
            `residual`, `x` itself without one; and ``(mean square [...], lam [1])``, lam detached, or None if
            `efficient` is False. The mean square is float32 (float64 for float64) and that of an exact norm; another
            norm returns the one of `statistic`.

        Raises:
            HFEError: `estimate` is not `exact`, and `statistic` is None.
        """
        if not self.efficient:
            summed = x if residual is None else residual + x
            return rms_norm(summed, self.weight, self.stock_eps), summed, None
        input_mean_square = input_lam = None
        if self.estimate != "exact":
            if statistic is None:
                raise HFEError(
                    f"the post-attention norm of layer {self.layer_idx} ({self.estimate}) was called without the mean "
                    "square of the layer's input norm",
                    "switch `efficient` of both norms of a layer together; a replacement of the input norm must return "
                    "a statistic too",
                )
            input_mean_square, input_lam = statistic
        normed, summed, mean_square = bhyt_norm(
            x,
            self.weight,
            self.lam,
            self.eps,
            kappa=self.kappa,
            residual=residual,
            variance=input_mean_square,
            affine=self.affine,
            branch=self.branch,
            first_bound=None if self.branch is None else input_lam,
            out_scale=self.out_scale,
        )
        return normed, summed, (mean_square, self.lam.detach())

    def tanh_scale(self, statistic: Statistic | None, returned: Statistic) -> Tensor:
        """Return ``lam / kappa / sqrt(v + eps)``, the factor [...] of each row inside the tanh of an earlier call.

        It is computed with the present `lam`, `affine` and `branch`, which must be those of that call.

        Args:
            statistic: the argument `statistic` of that call; not read if `self.estimate` is `exact`.
            returned: the statistic that the call returned; the call must have been made with `efficient` True.
        """
        mean_square = returned[0]
        if self.estimate != "exact" and statistic is not None:
            input_lam = None if self.branch is None else statistic[1]
            mean_square = estimate(mean_square, self.kappa, self.affine, self.branch, input_lam)
        return self.lam.to(mean_square.dtype) / self.kappa * torch.rsqrt(mean_square + self.eps)

    def float32_tensors(self) -> dict[str, Tensor]:
        """The tensors that stay in float32 whatever the model's dtype, by attribute name."""
        tensors = {"affine": self.affine, "branch": self.branch, "out_scale": self.out_scale}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As in PyTorch, but ``.to(torch.bfloat16)`` does not round the tensors that stay in float32."""
        originals = {name: tensor.data for name, tensor in self.float32_tensors().items()}
        super()._apply(fn, recurse)
        for name, original in originals.items():
            tensor = getattr(self, name)
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = original.to(tensor.device)
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, {self.position}, {self.estimate}, kappa={self.kappa}, eps={self.eps}"
