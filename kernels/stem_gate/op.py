"""stem_gate as PyTorch operators over the Triton kernels: forward, backward, shapes for tracing, autograd.

The name space is the exporter's to change, so that the code of two checkpoints can live in one process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_efficient.kernels.namespace import NS

# "cpu" is for Triton's interpreter; the dispatcher never sends CPU tensors here by itself.
_DEVICES = ("cpu", "cuda")


@torch.library.custom_op(f"{NS}::stem_gate", mutates_args=(), device_types=_DEVICES)
def stem_gate_forward(gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """``silu(gate) * table[ids]`` for gate [T, F], table [R, F], ids [T]."""
    from hf_efficient.kernels.stem_gate.triton_kernels import launch_forward

    return launch_forward(gate, table, ids)


@torch.library.custom_op(f"{NS}::stem_gate_backward", mutates_args=(), device_types=_DEVICES)
def stem_gate_backward(dout: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate [T, F] and table [R, F]."""
    from hf_efficient.kernels.stem_gate.triton_kernels import launch_backward

    return launch_backward(dout, gate, table, ids)


@torch.library.custom_op(f"{NS}::stem_gate_backward_gate", mutates_args=(), device_types=_DEVICES)
def stem_gate_backward_gate(dout: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """Gradient of gate [T, F] alone, for a frozen table: no sorting, no buffer of the table's size."""
    from hf_efficient.kernels.stem_gate.triton_kernels import launch_backward_gate

    return launch_backward_gate(dout, gate, table, ids)


@stem_gate_forward.register_fake
def _(gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@stem_gate_backward.register_fake
def _(dout: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(gate, memory_format=contiguous), torch.empty_like(table, memory_format=contiguous)


@stem_gate_backward_gate.register_fake
def _(dout: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    needs_gate, needs_table, _ = ctx.needs_input_grad
    if dout is None:
        return None, None, None
    if not needs_table:
        return stem_gate_backward_gate(dout, *ctx.saved_tensors), None, None
    dgate, dtable = stem_gate_backward(dout, *ctx.saved_tensors)
    return dgate if needs_gate else None, dtable, None


stem_gate_forward.register_autograd(_differentiate, setup_context=_save)
