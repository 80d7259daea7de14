"""The custom operators of monarch_attention, and its autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_efficient.kernels.monarch_attention.geometry import Geometry, geometry
from hf_efficient.kernels.monarch_attention.layout import GridLayout, SequenceLayout
from hf_efficient.kernels.operators import define_operator


def _load_forward() -> Callable[..., tuple[Tensor, Tensor]]:
    from hf_efficient.kernels.monarch_attention.triton_kernels import launch_forward

    return launch_forward


def _load_backward() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    from hf_efficient.kernels.monarch_attention.triton_backward import launch_backward

    return launch_backward


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    geometry: Sequence[int],
    num_iters: int,
    scale: float,
    is_sequence: bool,
    pad_mean: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, query_tokens, head_dim = q.shape
    at = Geometry(*geometry)
    lines = at.query_tiles * at.columns if with_lse else 0
    lse = q.new_empty((batch, heads, lines, at.rows), dtype=torch.float32)
    return q.new_empty((batch, query_tokens, heads, head_dim)), lse


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    geometry: Sequence[int],
    scale: float,
    is_sequence: bool,
    pad_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


# Output [B, Nq, H, D], and the log-sum-exp to base 2 of the L-step [B, H, lines, rows].
monarch_attention_forward = define_operator("monarch_attention", _load_forward, _fake_forward)
# Gradients of q, k and v, for one iteration.
monarch_attention_backward = define_operator("monarch_attention_backward", _load_backward, _fake_backward)


class _MonarchAttention(torch.autograd.Function):
    """Differentiable in q, k and v; saves them, the output and the log-sum-exp of the L-step."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        at: Sequence[int],
        scale: float,
        is_sequence: bool,
        pad_mean: bool,
    ) -> Tensor:
        out, lse = monarch_attention_forward(q, k, v, key_mask, at, 1, scale, is_sequence, pad_mean, True)
        ctx.save_for_backward(q, k, v, out, lse, key_mask)
        ctx.arguments = at, scale, is_sequence, pad_mean
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gradients = monarch_attention_backward(dout.contiguous(), *ctx.saved_tensors, *ctx.arguments)
        return *gradients, *([None] * 5)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout | GridLayout,
    num_iters: int,
    scale: float,
    key_mask: Tensor | None,
    causal_frames: int | None,
) -> Tensor:
    """Output [B, Nq, H, D], contiguous, differentiable in q, k and v for one iteration."""
    at = list(geometry(layout, q.shape[2], k.shape[2], causal_frames))
    is_sequence = isinstance(layout, SequenceLayout)
    # Without padding and mask there is no query that a mean could stand for.
    padded = isinstance(layout, SequenceLayout) and (key_mask is not None or q.shape[2] % layout.block_size != 0)
    pad_mean = padded and isinstance(layout, SequenceLayout) and layout.pad_queries == "mean"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _MonarchAttention.apply(q, k, v, key_mask, at, scale, is_sequence, pad_mean)
    # Without gradients, skip autograd's bookkeeping: it costs more than a small kernel.
    return monarch_attention_forward(q, k, v, key_mask, at, num_iters, scale, is_sequence, pad_mean, False)[0]
