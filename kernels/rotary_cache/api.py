"""Public function of the operation rotary_cache."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.kernels.rotary_cache.reference import rotary_cache as reference_rotary_cache
from hf_efficient.kernels.validate import (
    INTEGERS,
    check_dtype,
    check_no_gradient,
    check_not_empty,
    check_rank,
    check_rows_contiguous,
    check_shape,
    check_tensors,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def rotary_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor | None = None,
    value_cache: Tensor | None = None,
    cache_position: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    length: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rotates q and k by their positions and writes k and v into a key-value cache, in one launch.

    With halves x1, x2 of a head: ``rotated = (x1, x2) * cos + (-x2, x1) * sin``, computed in float32 and rounded once
    (the stock families round each product in half precision). Where a weight is given, each head is RMS-normalised
    first, rounded as the stock families do. Then ``key_cache[b, :, cache_position[b, i]] = rotated k[b, i]``, and
    likewise for v. For inference only.

    Args:
        q: [B, Q, Hq, D], D even; float16, bfloat16 or float32; usually a view into one packed projection. Here and in
            k, v and the caches the last dimension must be contiguous, other strides are free.
        k, v: [B, Q, Hkv, D], in the dtype of `q`, as are all tensors but `cache_position` and `length`.
        cos, sin: [B, Q, D] or [1, Q, D].
        key_cache, value_cache: [B, Hkv, C, D], changed in place. None: k is not rotated, v is not written. For a cache
            that grows, pass new tensors with C = Q and no `cache_position`.
        cache_position: [Q], [1, Q] or [B, Q], int32 or int64: the cache slot of each token, different slots for
            different tokens of a sequence. A token whose slot is outside [0, C) is not written. None: token i goes to
            slot i.
        q_weight, k_weight: [D], weights of the normalisations of q and k; None for none.
        eps: added to the mean square in both.
        length: integer tensor without dimensions, set to the slot of the last token of the last sequence, plus one.
        backend: ``"reference"``, ``"triton"``, or None: what `HFE_BACKEND` names, else Triton on CUDA and the reference
            elsewhere.

    Returns:
        Rotated q [B, Hq, Q, D], a transposed view of a new contiguous [B, Q, Hq, D].

    Raises:
        HFEError: wrong shape, dtype, device or layout, or a tensor that requires a gradient.
        BackendError: the named backend cannot run here.

    Source: RoFormer, arXiv:2104.09864, section 3.2.2, with the halves of the Llama family as pairs.

    Example:
        >>> import torch
        >>> q, k, v = torch.ones(3, 1, 1, 1, 2)
        >>> cos, sin, keys = torch.zeros(1, 1, 2), torch.ones(1, 1, 2), torch.zeros(1, 1, 3, 2)
        >>> rotary_cache(q, k, v, cos, sin, keys, cache_position=torch.tensor([1])), keys
        (tensor([[[[-1.,  1.]]]]), tensor([[[[ 0.,  0.],
                  [-1.,  1.],
                  [ 0.,  0.]]]]))
    """
    _check(q, k, v, cos, sin, key_cache, value_cache, cache_position, q_weight, k_weight, length)
    if select_backend("rotary_cache", backend, q.device) == "reference":
        return reference_rotary_cache(
            q, k, v, cos, sin, key_cache, value_cache, cache_position,
            q_weight=q_weight, k_weight=k_weight, eps=eps, length=length,
        )  # fmt: skip
    from hf_efficient.kernels.rotary_cache.op import rotary_cache_write

    rotated = rotary_cache_write(
        q, k, v, cos, sin, key_cache, value_cache, cache_position, q_weight, k_weight, eps, length
    )  # fmt: skip
    return rotated.transpose(1, 2)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    cache_position: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    length: Tensor | None,
) -> None:
    """Raise HFEError for arguments that the operation does not take."""
    op = "rotary_cache"
    floats = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin}
    optional = {"key_cache": key_cache, "value_cache": value_cache, "q_weight": q_weight, "k_weight": k_weight}
    floats.update((name, tensor) for name, tensor in optional.items() if tensor is not None)
    integers = {name: t for name, t in (("cache_position", cache_position), ("length", length)) if t is not None}
    check_tensors(op, {**floats, **integers})
    check_no_gradient(op, floats)
    check_dtype(op, "q", q, _DTYPES)
    for name, tensor in floats.items():
        check_dtype(op, name, tensor, (q.dtype,))
    for name, tensor in integers.items():
        check_dtype(op, name, tensor, INTEGERS)
    check_rank(op, "q", q, 4, 4, "[B, Q, Hq, D]")
    check_rank(op, "k", k, 4, 4, "[B, Q, Hkv, D]")
    batch, queries, _, width = q.shape
    heads = k.shape[2]
    check_not_empty(op, "q", q, dimension=3)
    if width % 2:
        raise HFEError(f"{op}: the heads of `q` have {width} elements", "rotation takes pairs: use an even number")
    for name, tensor in (("k", k), ("v", v)):
        check_shape(op, name, tensor, (batch, queries, heads, width), "[B, Q, Hkv, D] for `q` [B, Q, Hq, D]")
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_rank(op, name, tensor, 3, 3, "[B, Q, D] or [1, Q, D]")
        rows = 1 if tensor.shape[0] == 1 else batch
        check_shape(op, name, tensor, (rows, queries, width), "[B, Q, D] or [1, Q, D] for `q` [B, Q, Hq, D]")
    check_shape(op, "sin", sin, tuple(cos.shape), "that of `cos`")
    caches = [(name, tensor) for name, tensor in (("key_cache", key_cache), ("value_cache", value_cache))]
    given = key_cache if key_cache is not None else value_cache
    for name, cache in caches:
        if cache is not None and given is not None:
            check_rank(op, name, cache, 4, 4, "[B, Hkv, C, D]")
            layout = "[B, Hkv, C, D] for `k` [B, Q, Hkv, D], with one C"
            check_shape(op, name, cache, (batch, heads, given.shape[2], width), layout)
            check_rows_contiguous(op, name, cache)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_rows_contiguous(op, name, tensor)
    if cache_position is not None:
        check_rank(op, "cache_position", cache_position, 1, 2, "[Q], [1, Q] or [B, Q]")
        leading = cache_position.shape[:-1] if cache_position.shape[:-1] in ((), (1,)) else (batch,)
        check_shape(
            op, "cache_position", cache_position, (*leading, queries), "[Q], [1, Q] or [B, Q] for `q` [B, Q, Hq, D]"
        )
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_shape(op, name, weight, (width,), "[D] for `q` [B, Q, Hq, D]")
    if length is not None:
        check_shape(op, "length", length, (), "that of a number, ()")
