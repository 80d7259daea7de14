"""Public function of the operation stem_gate."""

from __future__ import annotations

from torch import Tensor

from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.kernels.stem_gate.reference import stem_gate as reference_stem_gate
from hf_efficient.kernels.validate import (
    FLOATS,
    INTEGERS,
    check_dtype,
    check_ids,
    check_not_empty,
    check_rank,
    check_rows_contiguous,
    check_shape,
    check_tensors,
)


def stem_gate(gate: Tensor, table: Tensor, ids: Tensor, *, backend: str | None = None) -> Tensor:
    """Token-indexed gating of a STEM feed-forward: ``out[..., :] = silu(gate[..., :]) * table[ids[...], :]``.

    Computed in float32 (float64 where an argument has it) and rounded once, to the dtype of `gate`. Differentiable in
    `gate` and `table`. The table's gradient is dense, summed in float32 in the order of the positions, so that two runs
    agree bit for bit; rows whose id does not occur are exactly zero. Only `gate`, `table` and `ids` are saved
    for the backward pass.

    Args:
        gate: [..., F], float16, bfloat16, float32 or float64; any strides.
        table: [R, F], one of the same dtypes, not necessarily that of `gate`; its last dimension contiguous.
        ids: [...], int32 or int64, each in [0, R).
        backend: ``"reference"``, ``"triton"``, or None: what `HFE_BACKEND` names, else Triton on CUDA and the reference
            elsewhere.

    Returns:
        [..., F], contiguous, in the dtype of `gate`.

    Raises:
        HFEError: wrong shape, dtype, device or layout.
        TokenIdError: an id outside [0, R). Checked on the CPU, and elsewhere with `HFE_CHECK=1`; without it the
            Triton kernel gives zeros there and never reads outside the table.
        BackendError: the named backend cannot run here.

    Source: STEM, arXiv:2601.10639, section 3; the kernel is our own (`README.md` beside this file).

    Example:
        >>> import torch
        >>> stem_gate(torch.ones(2, 3), torch.eye(3), torch.tensor([0, 2])).sum(1)
        tensor([0.7311, 0.7311])
    """
    check_tensors("stem_gate", {"gate": gate, "table": table, "ids": ids})
    check_dtype("stem_gate", "gate", gate, FLOATS)
    check_dtype("stem_gate", "table", table, FLOATS)
    check_dtype("stem_gate", "ids", ids, INTEGERS)
    check_rank("stem_gate", "gate", gate, 1, None, "[..., F]")
    check_rank("stem_gate", "table", table, 2, 2, "[R, F]")
    rows, width = table.shape
    check_shape("stem_gate", "gate", gate, (*ids.shape, width), "that of `ids` followed by the width of `table`")
    check_not_empty("stem_gate", "table", table, dimension=1)
    check_rows_contiguous("stem_gate", "table", table)
    check_ids("stem_gate", ids, rows)

    if select_backend("stem_gate", backend, gate.device) == "reference":
        return reference_stem_gate(gate, table, ids)
    from hf_efficient.kernels.stem_gate.op import stem_gate_rows

    # Always of rank 2, so that another number of leading dimensions does not recompile.
    return stem_gate_rows(gate.reshape(ids.numel(), width), table, ids.reshape(-1)).view(gate.shape)
