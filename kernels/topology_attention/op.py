"""The custom operators of topology_attention, and its autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_efficient.kernels.operators import define_operator
from hf_efficient.kernels.topology_blocks.block_lists import BLOCK, BlockLists


def _load_forward() -> Callable[..., tuple[Tensor, Tensor]]:
    from hf_efficient.kernels.topology_attention.triton_kernels import launch_forward

    return launch_forward


def _load_backward() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    from hf_efficient.kernels.topology_attention.triton_gradients import launch_backward

    return launch_backward


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor,
    segment_visibility: Tensor,
    counts: Tensor,
    lists: Tensor,
    present: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, head_dim = q.shape
    rows = lists.shape[2] * BLOCK
    return q.new_empty((batch, length, heads, head_dim)), q.new_empty((batch, heads, rows), dtype=torch.float32)


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_ids: Tensor,
    segment_visibility: Tensor,
    counts: Tensor,
    lists: Tensor,
    present: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


# Output [B, S, Hq, D], and the log-sum-exp to base 2 of each query's scores [B, Hq, NB * BLOCK].
topology_attention_forward = define_operator("topology_attention", _load_forward, _fake_forward)
# Gradients of q, k and v.
topology_attention_backward = define_operator("topology_attention_backward", _load_backward, _fake_backward)


class _TopologyAttention(torch.autograd.Function):
    """Differentiable in q, k and v; saves them, the output and the log-sum-exp of each query and head."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segment_ids: Tensor,
        segment_visibility: Tensor,
        counts: Tensor,
        lists: Tensor,
        present: Tensor,
        scale: float,
    ) -> Tensor:
        topology = (segment_ids, segment_visibility, counts, lists, present)
        out, lse = topology_attention_forward(q, k, v, *topology, scale)
        ctx.save_for_backward(q, k, v, out, lse, *topology)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gradients = topology_attention_backward(dout.contiguous(), *ctx.saved_tensors, ctx.scale)
        return *gradients, *([None] * 6)


def attend(
    q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor, segment_visibility: Tensor, blocks: BlockLists, scale: float
) -> Tensor:
    """Output [B, S, Hq, D], contiguous, differentiable in q, k and v."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _TopologyAttention.apply(q, k, v, segment_ids, segment_visibility, *blocks, scale)
    # Without gradients, skip autograd's bookkeeping: it costs more than a small kernel.
    return topology_attention_forward(q, k, v, segment_ids, segment_visibility, *blocks, scale)[0]
