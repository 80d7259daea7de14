"""topology_attention over the Triton kernels: operators for tracing, and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_efficient.kernels.operators import define_operator
from hf_efficient.kernels.topology_blocks.block_lists import BLOCK, BlockLists


def _forward(
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
    from hf_efficient.kernels.topology_attention.triton_kernels import launch_forward

    return launch_forward(q, k, v, segment_ids, segment_visibility, counts, lists, present, scale)


def _fake_forward(q, k, v, segment_ids, segment_visibility, counts, lists, present, scale):
    batch, heads, length, width = q.shape
    rows = lists.shape[2] * BLOCK
    return q.new_empty((batch, length, heads, width)), q.new_empty((batch, heads, rows), dtype=torch.float32)


def _backward(
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
    from hf_efficient.kernels.topology_attention.triton_gradients import launch_backward

    return launch_backward(dout, q, k, v, out, lse, segment_ids, segment_visibility, counts, lists, present, scale)


def _fake_backward(dout, q, k, v, out, lse, segment_ids, segment_visibility, counts, lists, present, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


# Output [B, S, Hq, D], and the logarithm to base 2 of each query's sum of exponentials [B, Hq, NB * BLOCK].
topology_attention_forward = define_operator("topology_attention", _forward, _fake_forward)
# Gradients of q, k and v.
topology_attention_backward = define_operator("topology_attention_backward", _backward, _fake_backward)


class _TopologyAttention(torch.autograd.Function):
    """Differentiable in q, k and v; keeps these, the output and one number for each query and head."""

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
    """Output [B, S, Hq, D], contiguous, differentiable where a gradient is wanted."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _TopologyAttention.apply(q, k, v, segment_ids, segment_visibility, *blocks, scale)
    # Autograd's bookkeeping costs more than a small kernel.
    return topology_attention_forward(q, k, v, segment_ids, segment_visibility, *blocks, scale)[0]
