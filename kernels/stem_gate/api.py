"""Public function of the operation stem_gate."""

from __future__ import annotations

from torch import Tensor

from hf_efficient.kernels.stem_gate.reference import stem_gate as _reference


def stem_gate(gate: Tensor, table: Tensor, ids: Tensor, *, backend: str | None = None) -> Tensor:
    return _reference(gate, table, ids)
