"""stem_gate over the Triton kernels: operators for tracing, and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_efficient.kernels.operators import define_operator


def _forward(gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    from hf_efficient.kernels.stem_gate.triton_kernels import launch_forward

    return launch_forward(gate, table, ids)


def _backward(dout: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    from hf_efficient.kernels.stem_gate.triton_kernels import launch_backward

    return launch_backward(dout, gate, table, ids)


def _backward_gate(dout: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    from hf_efficient.kernels.stem_gate.triton_kernels import launch_backward_gate

    return launch_backward_gate(dout, gate, table, ids)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# silu(gate) * table[ids] for gate [T, F], table [R, F], ids [T]
stem_gate_forward = define_operator("stem_gate", _forward, lambda gate, table, ids: _like(gate))
# gradients of gate and of table
stem_gate_backward = define_operator(
    "stem_gate_backward", _backward, lambda dout, gate, table, ids: (_like(gate), _like(table))
)
# gradient of gate alone, for a frozen table: no sorting, and no buffer of the table's size
stem_gate_backward_gate = define_operator(
    "stem_gate_backward_gate", _backward_gate, lambda dout, gate, table, ids: _like(gate)
)


class _StemGate(torch.autograd.Function):
    """Differentiable ``silu(gate) * table[ids]`` for gate [T, F], table [R, F], ids [T]; keeps just these three."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(gate, table, ids)
        return stem_gate_forward(gate, table, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs_gate, needs_table, _ = ctx.needs_input_grad
        if not needs_table:
            return stem_gate_backward_gate(dout, *ctx.saved_tensors), None, None
        dgate, dtable = stem_gate_backward(dout, *ctx.saved_tensors)
        return dgate if needs_gate else None, dtable, None


def stem_gate_rows(gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """``silu(gate) * table[ids]`` for gate [T, F], table [R, F], ids [T], differentiable where a gradient is wanted."""
    if torch.is_grad_enabled() and (gate.requires_grad or table.requires_grad):
        return _StemGate.apply(gate, table, ids)
    # Autograd's bookkeeping costs more than a small kernel: decoding does without.
    return stem_gate_forward(gate, table, ids)
