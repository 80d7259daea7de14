"""Public function of the operation decode_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.errors import BackendError, HFEError
from hf_efficient.kernels.decode_attention.reference import decode_attention as reference_decode_attention
from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.kernels.validate import (
    FLOATS,
    INTEGERS,
    check_dtype,
    check_rank,
    check_rows_contiguous,
    check_shape,
    check_tensors,
)

OP = "decode_attention"
MAX_HEAD_DIM = 256


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | int,
    q_pos: Tensor,
    window: int | None = None,
    kv_segment_ids: Tensor | None = None,
    segment_visibility: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of a few queries to a cache: ``softmax(scale * q kᵀ over the slots it sees) v`` for each query.

    Query (b, i) sees cache slot j if all of these hold:

    - ``j < kv_len[b]``: the slots from there on are empty; they are never read, and may hold anything;
    - ``j <= q_pos[b, i]``: its own slot is the last; a negative `q_pos` marks a padded query, which sees nothing;
    - ``j > q_pos[b, i] - window``, where a window is given;
    - ``kv_segment_ids[b, j] >= 0``, where segments are given: other slots are holes, such as left padding, and may hold
      anything;
    - bit ``kv_segment_ids[b, j]`` of ``segment_visibility[b, i]`` is set, where it is given: bit s is bit s % 64 of
      word s // 64, and segments that the words do not reach are not seen.

    A query that sees nothing gets zeros. Softmax and sums are in float32 (float64 where q has it), and the result is
    rounded to the dtype of `q`; the Triton kernel also rounds the softmax to the dtype of `v` before it multiplies. Two
    runs agree bit for bit. For inference only: it has no backward pass. Made for few queries, up to about 64 for each
    batch row; for more, prefill kernels are faster.

    There is no device synchronisation, and the launch depends on shapes alone, so a CUDA graph that was captured with
    a static cache stays right as `kv_len` and `q_pos` change in place.

    Args:
        q: [B, Hq, Q, D], float16, bfloat16 or float32 (float64 for the reference); D contiguous, other strides free.
        k, v: [B, Hkv, C, D], the dtype of `q`; D contiguous, other strides free. Hq is a multiple of Hkv; D <= 256.
            C is the capacity of a static cache or the length of a dynamic one.
        kv_len: filled slots: int32 or int64, [B], [1] or [], or a number at most C. Values above C count as C.
        q_pos: [B, Q] or [1, Q], int32 or int64: the cache slot of each query.
        window: slots that a query sees, its own included (sliding window); at least 1.
        kv_segment_ids: [B, L] or [1, L], int32 or int64: segment of each slot; slots from L on are holes.
        segment_visibility: [B, Q, W] or [1, Q, W], int64: bitmap of the segments that each query sees. Needs
            `kv_segment_ids`.
        scale: factor of the scores; ``D ** -0.5`` by default.
        backend: ``"reference"``, ``"triton"``, or None: what `HFE_BACKEND` names, else Triton on CUDA and the reference
            elsewhere.

    Returns:
        [B, Hq, Q, D] in the dtype of `q`: the transposed view of a contiguous [B, Q, Hq, D], the order in which an
        output projection reads it.

    Raises:
        HFEError: wrong shape, dtype, device or layout, or a gradient would be needed.
        BackendError: the named backend cannot run here, or not in float64.

    Source: splitting the cache follows Flash-Decoding (Dao et al., 2023); the segments are those of generation in
    parallel branches; the kernel is our own (`README.md` beside this file).

    Example:
        >>> import torch
        >>> q, cache = torch.ones(1, 2, 1, 4), torch.arange(12.0).view(1, 1, 3, 4)
        >>> decode_attention(q, torch.zeros_like(cache), cache, kv_len=2, q_pos=torch.tensor([[1]]))[0, 0]
        tensor([[2., 3., 4., 5.]])
    """
    _check(q, k, v, kv_len, q_pos, window, kv_segment_ids, segment_visibility)
    head_dim = q.shape[3]
    if scale is None:
        scale = head_dim**-0.5
    if select_backend(OP, backend, q.device) == "reference":
        return reference_decode_attention(
            q, k, v, kv_len, q_pos, window, kv_segment_ids, segment_visibility, scale=scale
        )
    if q.dtype == torch.float64:
        raise BackendError(f"{OP}: the Triton kernel does not compute in float64", "pass backend='reference'")
    from hf_efficient.kernels.decode_attention.op import decode_attention_forward

    lengths, max_kv_len = (kv_len, k.shape[2]) if isinstance(kv_len, Tensor) else (None, kv_len)
    return decode_attention_forward(
        q, k, v, lengths, q_pos, kv_segment_ids, segment_visibility, max_kv_len, window, scale
    ).transpose(1, 2)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | int,
    q_pos: Tensor,
    window: int | None,
    kv_segment_ids: Tensor | None,
    segment_visibility: Tensor | None,
) -> None:
    """Raise HFEError for arguments that the operation does not take. Runs for every layer of every token."""
    tensors = {"q": q, "k": k, "v": v, "q_pos": q_pos}
    if not isinstance(kv_len, int):
        tensors["kv_len"] = kv_len
    if kv_segment_ids is not None:
        tensors["kv_segment_ids"] = kv_segment_ids
    if segment_visibility is not None:
        tensors["segment_visibility"] = segment_visibility
    check_tensors(OP, tensors)
    check_dtype(OP, "q", q, FLOATS)
    check_rank(OP, "q", q, 4, 4, "[B, Hq, Q, D]")
    check_rank(OP, "k", k, 4, 4, "[B, Hkv, C, D]")
    batch, heads, queries, head_dim = q.shape
    kv_heads, capacity = k.shape[1:3]
    check_shape(OP, "k", k, (batch, kv_heads, capacity, head_dim), "[B, Hkv, C, D] with the B and D of `q`")
    check_shape(OP, "v", v, (batch, kv_heads, capacity, head_dim), "that of `k`")
    if kv_heads == 0 or heads % kv_heads:
        raise HFEError(
            f"{OP}: `q` has {heads} heads and `k` has {kv_heads}", "the number in `q` must be a multiple of that in `k`"
        )
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise HFEError(f"{OP}: head_dim is {head_dim}", f"1 to {MAX_HEAD_DIM} are supported; use torch's attention")
    for name, value in (("k", k), ("v", v)):
        check_dtype(OP, name, value, (q.dtype,))
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_rows_contiguous(OP, name, value)
    check_dtype(OP, "q_pos", q_pos, INTEGERS)
    _check_rows(OP, "q_pos", q_pos, batch, (queries,), "[B, Q] or [1, Q]")
    if isinstance(kv_len, Tensor):
        check_dtype(OP, "kv_len", kv_len, INTEGERS)
        if kv_len.dim() > 1 or kv_len.numel() not in (1, batch):
            raise HFEError(
                f"{OP}: `kv_len` has shape {tuple(kv_len.shape)}", f"its shape must be [B] (here {batch}), [1] or []"
            )
    elif not 0 <= kv_len <= capacity:
        raise HFEError(f"{OP}: `kv_len` is {kv_len} and the cache has {capacity} slots", f"pass at most {capacity}")
    if window is not None and window < 1:
        raise HFEError(f"{OP}: `window` is {window}", "pass 1 or more, or None for no window")
    if kv_segment_ids is not None:
        check_dtype(OP, "kv_segment_ids", kv_segment_ids, INTEGERS)
        _check_rows(OP, "kv_segment_ids", kv_segment_ids, batch, None, "[B, L] or [1, L]")
    if segment_visibility is not None:
        if kv_segment_ids is None:
            raise HFEError(
                f"{OP}: `segment_visibility` is given without `kv_segment_ids`", "pass the segment of each slot too"
            )
        check_dtype(OP, "segment_visibility", segment_visibility, (torch.int64,))
        check_rank(OP, "segment_visibility", segment_visibility, 3, 3, "[B, Q, W] or [1, Q, W]")
        _check_rows(
            OP,
            "segment_visibility",
            segment_visibility,
            batch,
            (queries, segment_visibility.shape[2]),
            "[B, Q, W] or [1, Q, W]",
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise HFEError(
            f"{OP} is for inference and has no backward pass, but an argument requires a gradient",
            "call it under torch.no_grad(), or train with torch's attention (attn_implementation='sdpa')",
        )


def _check_rows(op: str, name: str, tensor: Tensor, batch: int, rest: tuple[int, ...] | None, layout: str) -> None:
    """`tensor` has one row, or one for each batch row; `rest` are its other dimensions, None for any one dimension."""
    check_rank(op, name, tensor, *((2, 2) if rest is None else (1 + len(rest), 1 + len(rest))), layout)
    if tensor.shape[0] not in (1, batch) or (rest is not None and tensor.shape[1:] != rest):
        raise HFEError(f"{op}: `{name}` has shape {tuple(tensor.shape)}", f"its shape must be {layout}")
