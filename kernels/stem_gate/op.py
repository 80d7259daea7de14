"""The custom operators of stem_gate, and its autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_efficient.kernels.operators import define_operator


def _load_forward() -> Callable[..., Tensor]:
    from hf_efficient.kernels.stem_gate.triton_kernels import launch_forward

    return launch_forward


def _load_backward() -> Callable[..., tuple[Tensor, Tensor]]:
    from hf_efficient.kernels.stem_gate.triton_kernels import launch_backward

    return launch_backward


def _load_backward_gate() -> Callable[..., Tensor]:
    from hf_efficient.kernels.stem_gate.triton_kernels import launch_backward_gate

    return launch_backward_gate


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_forward(gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    return _empty_like(gate)


def _fake_backward(dout: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like(gate), _empty_like(table)


def _fake_backward_gate(dout: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    return _empty_like(gate)


# silu(gate) * table[ids] for gate [T, F], table [R, F], ids [T].
stem_gate_forward = define_operator("stem_gate", _load_forward, _fake_forward)
# Gradients of gate and of table.
stem_gate_backward = define_operator("stem_gate_backward", _load_backward, _fake_backward)
# Gradient of gate alone, for a frozen table: no sort, and no buffer of the table's size.
stem_gate_backward_gate = define_operator("stem_gate_backward_gate", _load_backward_gate, _fake_backward_gate)


class _StemGate(torch.autograd.Function):
    """Differentiable ``silu(gate) * table[ids]`` for gate [T, F], table [R, F], ids [T]; saves only these three."""

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
    """``silu(gate) * table[ids]`` for gate [T, F], table [R, F], ids [T], differentiable."""
    if torch.is_grad_enabled() and (gate.requires_grad or table.requires_grad):
        return _StemGate.apply(gate, table, ids)
    # Without gradients, skip autograd's bookkeeping: it costs more than a small kernel.
    return stem_gate_forward(gate, table, ids)
