"""Public function of the operation topology_attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_efficient.errors import BackendError, HFEError
from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.kernels.topology_attention.reference import topology_attention as reference_topology_attention
from hf_efficient.kernels.topology_blocks.api import check_segments, topology_blocks
from hf_efficient.kernels.topology_blocks.block_lists import BLOCK, BlockLists
from hf_efficient.kernels.validate import (
    FLOATS,
    check_dtype,
    check_rank,
    check_shape,
    check_tensors,
    rows_contiguous,
)

OP = "topology_attention"
MAX_HEAD_DIM = 256


def topology_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor,
    segment_visibility: Tensor,
    *,
    blocks: BlockLists | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention under a topology: ``softmax(scale * q kᵀ over the keys that a query sees) v`` for each query.

    Query i sees key j if j <= i, neither is a hole, and the segment of j is visible from that of i: bit
    ``segment_ids[b, j]`` of ``segment_visibility[b, segment_ids[b, i]]`` is set. A query that sees nothing gets zeros.
    Softmax and sums are in float32 (float64 where q has it); the Triton kernel rounds the softmax to the dtype of `v`,
    and in the backward pass the gradients of the scores to that of `q`, before it multiplies.

    Blocks of 128 keys that no query of a block of 128 queries sees are skipped; those that all of them see need no
    mask. Two runs agree bit for bit, gradients included: no atomics.

    Args:
        q: [B, Hq, S, D], float16, bfloat16 or float32 (float64 for the reference); D <= 256.
        k, v: [B, Hkv, S, D], the dtype of `q`. Hq is a multiple of Hkv; query head h reads key-value head
            h // (Hq / Hkv).
        segment_ids: [B, S] or [1, S], int32: segment of each token, negative for padding and other holes.
        segment_visibility: [B, N, W] or [1, N, W], int64: bitmap of the segments that each segment sees, itself
            among them; bit s is bit s % 64 of word s // 64.
        blocks: `topology_blocks(segment_ids, segment_visibility)`; None computes it. One result serves every layer
            of a model.
        scale: factor of the scores, positive; ``D ** -0.5`` by default.
        backend: ``"reference"``, ``"triton"``, or None: what `HFE_BACKEND` names, else Triton on CUDA and the reference
            elsewhere. The reference needs memory for [B, Hq, S, S] scores.

    Returns:
        [B, Hq, S, D] in the dtype of `q`: the transposed view of a contiguous [B, S, Hq, D], the order in which an
        output projection reads it.

    Raises:
        HFEError: wrong shape, dtype or device.
        BackendError: the named backend cannot run here, or not in float64.

    Source: Multiverse, arXiv:2506.09991, and MedVerse, arXiv:2602.07529 (masks); FlashAttention-2, arXiv:2307.08691
    (online softmax, backward pass by recomputation); the kernels are our own (`README.md` beside this file).

    Example:
        >>> import torch
        >>> x = torch.eye(4).view(1, 1, 4, 4)
        >>> segments = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
        >>> siblings = torch.tensor([[[0b0001], [0b0011], [0b0101], [0b1111]]])  # 1 and 2 do not see each other
        >>> topology_attention(torch.zeros_like(x), x, x, segments, siblings)[0, 0]
        tensor([[1.0000, 0.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000, 0.0000],
                [0.5000, 0.0000, 0.5000, 0.0000],
                [0.2500, 0.2500, 0.2500, 0.2500]])
    """
    _check(q, k, v, segment_ids, segment_visibility, blocks, scale)
    if scale is None:
        scale = q.shape[3] ** -0.5
    if select_backend(OP, backend, q.device) == "reference":
        return reference_topology_attention(q, k, v, segment_ids, segment_visibility, scale=scale)
    if q.dtype == torch.float64:
        raise BackendError(f"{OP}: the Triton kernel does not compute in float64", "pass backend='reference'")
    from hf_efficient.kernels.topology_attention.op import attend

    if blocks is None:
        blocks = topology_blocks(segment_ids, segment_visibility, backend="triton")
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    return attend(q, k, v, segment_ids, segment_visibility, blocks, scale).transpose(1, 2)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor,
    segment_visibility: Tensor,
    blocks: BlockLists | None,
    scale: float | None,
) -> None:
    """Raise HFEError for arguments that the operation does not take."""
    tensors = {"q": q, "k": k, "v": v, "segment_ids": segment_ids, "segment_visibility": segment_visibility}
    check_tensors(OP, tensors)
    check_dtype(OP, "q", q, FLOATS)
    check_rank(OP, "q", q, 4, 4, "[B, Hq, S, D]")
    check_rank(OP, "k", k, 4, 4, "[B, Hkv, S, D]")
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    check_shape(OP, "k", k, (batch, kv_heads, length, head_dim), "[B, Hkv, S, D] with the B, S and D of `q`")
    check_shape(OP, "v", v, (batch, kv_heads, length, head_dim), "that of `k`")
    for name, value in (("k", k), ("v", v)):
        check_dtype(OP, name, value, (q.dtype,))
    if kv_heads == 0 or heads % kv_heads:
        raise HFEError(
            f"{OP}: `q` has {heads} heads and `k` has {kv_heads}", "the number in `q` must be a multiple of that in `k`"
        )
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise HFEError(f"{OP}: head_dim is {head_dim}", f"1 to {MAX_HEAD_DIM} are supported; use torch's attention")
    check_segments(OP, segment_ids, segment_visibility)
    if segment_ids.shape[0] not in (1, batch) or segment_ids.shape[1] != length:
        raise HFEError(
            f"{OP}: `segment_ids` has shape {tuple(segment_ids.shape)} for `q` of shape {tuple(q.shape)}",
            "its shape must be [B, S] or [1, S]",
        )
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise HFEError(f"{OP}: `scale` is {scale}", "pass a positive number, or None for D ** -0.5")
    if blocks is not None:
        rows, count = segment_ids.shape[0], -(-length // BLOCK)
        check_tensors(OP, {"q": q, "blocks.counts": blocks.counts})
        check_shape(OP, "blocks.lists", blocks.lists, (rows, 4, count, count), "that of topology_blocks for these ids")
        check_shape(
            OP, "blocks.present", blocks.present, (rows, count, segment_visibility.shape[2]), "[B, NB, W] for these ids"
        )
