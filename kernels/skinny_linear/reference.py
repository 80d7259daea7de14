"""skinny_linear in plain PyTorch: the definition of the operation."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def skinny_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """Linear maps of one x, side by side or as a gated pair, plus a residual; rounded once, to x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Autocast would take the products to half precision; some devices, like meta, do not know it.
    castable = torch.amp.is_autocast_available(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if castable else contextlib.nullcontext():
        parts = [
            F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
            for weight, bias in zip(weights, biases or [None] * len(weights), strict=True)
        ]
    out = F.silu(parts[0]) * parts[1] if gated else torch.cat(parts, dim=-1)
    return (out if residual is None else out + residual.to(wide)).to(x.dtype)
