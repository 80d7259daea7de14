"""stem_gate in plain PyTorch: the definition of the operation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that the operation computes in: float32, or float64 where an argument has it."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def stem_gate(gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """``silu(gate) * table[ids]`` for gate [..., F], table [R, F], ids [...]; rounded once, to gate's dtype."""
    wide = compute_dtype(gate.dtype, table.dtype)
    if table.requires_grad and torch.is_grad_enabled():
        # The gradients of a repeated id are summed in the dtype of the indexed table, so widen before indexing.
        table = table.to(wide)
    return (F.silu(gate.to(wide)) * F.embedding(ids, table).to(wide)).to(gate.dtype)
