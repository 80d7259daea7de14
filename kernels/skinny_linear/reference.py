"""skinny_linear in plain PyTorch: the definition of the operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_efficient.kernels.precision import without_autocast


def skinny_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Linear layers of one x, concatenated or as a gated pair, plus a residual; rounded once, to the dtype of x."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with without_autocast(x.device.type):
        parts = [
            F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
            for weight, bias in zip(weights, biases or [None] * len(weights), strict=True)
        ]
    out = F.silu(parts[0]) * parts[1] if gated else torch.cat(parts, dim=-1)
    return (out if residual is None else out + residual.to(wide)).to(x.dtype)
