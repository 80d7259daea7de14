"""stem_gate in plain PyTorch: the definition of the operation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def stem_gate(gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """``silu(gate) * table[ids]`` for gate [..., F], table [R, F], ids [...]; computed in fp32 (fp64 stays), gate's dtype."""
    wide = gate.dtype if gate.dtype.itemsize >= 4 else F.silu(gate.float()).dtype
    return (F.silu(gate.to(wide)) * F.embedding(ids, table).to(wide)).to(gate.dtype)
