"""Public function of the operation monarch_attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_efficient.environment import backend_override, check_data
from hf_efficient.errors import BackendError, HFEError
from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.kernels.monarch_attention.layout import GridLayout, SequenceLayout
from hf_efficient.kernels.monarch_attention.reference import monarch_attention as reference_monarch_attention
from hf_efficient.kernels.validate import FLOATS, check_dtype, check_rank, check_shape, check_tensors, rows_contiguous
from hf_efficient.logging import warn_once

OP = "monarch_attention"
MAX_HEAD_DIM = 256  # of the Triton kernels


def monarch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout | GridLayout,
    *,
    num_iters: int = 1,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    causal_frames: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention with Monarch matrices: an approximation of softmax attention without causal mask, in less time.

    The layout arranges queries and keys in tiles of `rows` x `columns`. The weight of key (f, k, l) -- key tile, row,
    column -- for query (a, i, j) is ``L[a, j, i, f, k] * R[a, f, k, j, l]``: a query picks a row of keys, then a key in
    it, and the queries of a column share the second choice. With r[a, f, k, j] = q[a, k, j] at first, an iteration is

        R = softmax over l of (scale * r[a, f, k, j] · k[f, k, l])
        L = softmax over (f, k) of (sum_l R * scale * q[a, i, j] · k[f, k, l] + entropy of R)
        r[a, f, k, j] = sum_i L q[a, i, j] / sum_i L

    The two softmaxes maximise the same objective as softmax attention, over one factor at a time. The weights of a
    query are positive and sum to 1; a tile with one row or one column gives softmax attention itself. The first
    iteration brings most of the accuracy, the second some, further ones little. It is accurate where a query's
    attention is spread, or follows position, and not where a few keys far apart hold most of it.

    Softmaxes and sums are in float32 (float64 where `q` has it). Two runs agree bit for bit.

    Args:
        q: [B, H, Nq, D], float16, bfloat16 or float32 (float64 for the reference); any strides.
        k, v: [B, H, Nk, D], the dtype of `q`.
        layout: how the tokens are arranged. `SequenceLayout` needs Nq = Nk >= `block_size`. `GridLayout` needs whole
            frames, in a number that `f_tied` divides; Nk may differ from Nq, as with a cache of earlier frames.
        num_iters: iterations, at least 1.
        scale: factor of the scores, positive; ``D ** -0.5`` by default.
        key_mask: bool [B, Nk], True for tokens to attend to; with `SequenceLayout` only. A masked token counts as
            padding: whatever it holds changes no other token's output, and its own output is zero. More masked tokens
            on the side of the layout's padding leave the output of the others as it is. The output of a sequence
            without any unmasked token is zero.
        causal_frames: frames of a chunk; with `GridLayout` and Nq = Nk only. The frames of a chunk attend to each other
            and to all earlier chunks. Divides the number of frames; `f_tied` divides it.
        backend: ``"reference"``, ``"triton"``, or None: what `HFE_BACKEND` names, else Triton on CUDA and the
            reference elsewhere. The Triton kernels have D <= 256, float16 to float32, and one iteration where a
            gradient is needed or `causal_frames` is given; where no backend is asked for, other calls on CUDA run on
            the reference, with a warning.

    Returns:
        [B, H, Nq, D] in the dtype of `q`: the transposed view of a contiguous [B, Nq, H, D], the order in which an
        output projection reads it.

    Raises:
        HFEError: wrong shape, dtype, device or value, or a layout that does not fit the tokens. With ``HFE_CHECK=1``,
            also NaN or infinity in a token that is not masked.
        BackendError: the requested backend cannot run here, or not this call.

    Source: MonarchAttention, arXiv:2505.18698 (sequences), and Monarch-RT, arXiv:2602.12271 (tiles of a video grid,
    causal chunks); written from their formulas. The second step in the form that does not divide by a small sum, and
    blocks without a valid key, are treated as `reference.py` says; the kernels are our own (`README.md` beside this
    file).

    Example:
        >>> import torch
        >>> from hf_efficient.kernels.monarch_attention.layout import SequenceLayout
        >>> keys = torch.eye(4).view(1, 1, 4, 4)
        >>> queries = torch.zeros_like(keys)  # no preference: the mean of the values
        >>> monarch_attention(queries, keys, keys, SequenceLayout(block_size=2))[0, 0, 0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
        >>> two_valid = torch.tensor([[True, True, False, False]])
        >>> monarch_attention(queries, keys, keys, SequenceLayout(block_size=2), key_mask=two_valid)[0, 0]
        tensor([[0.5000, 0.5000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000]])
    """
    _check(q, k, v, layout, num_iters, scale, key_mask, causal_frames)
    _check_finite({"q": q, "k": k, "v": v}, key_mask)
    if scale is None:
        scale = q.shape[3] ** -0.5
    chosen = select_backend(OP, backend, q.device)
    problem = _unsupported(q, k, v, num_iters, causal_frames) if chosen == "triton" else ""
    if problem:
        chosen = _reference_instead(backend, *problem)
    if chosen == "reference":
        return reference_monarch_attention(
            q, k, v, layout, num_iters=num_iters, scale=scale, key_mask=key_mask, causal_frames=causal_frames
        )
    from hf_efficient.kernels.monarch_attention.op import attend

    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    return attend(q, k, v, layout, num_iters, scale, key_mask, causal_frames).transpose(1, 2)


def _unsupported(
    q: Tensor, k: Tensor, v: Tensor, num_iters: int, causal_frames: int | None
) -> tuple[str, str] | tuple[()]:
    """What the Triton kernels cannot do in this call, and the remedy; empty when they can do it."""
    if q.dtype == torch.float64:
        return "the Triton kernels do not compute in float64", "pass float32"
    if q.shape[3] > MAX_HEAD_DIM:
        return f"head_dim is {q.shape[3]}, and the Triton kernels support at most {MAX_HEAD_DIM}", "use smaller heads"
    if num_iters > 1 and causal_frames is not None:
        return f"the Triton kernels have one iteration for causal chunks, not {num_iters}", "pass num_iters=1"
    if num_iters > 1 and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return (
            f"the Triton kernels have a backward pass for one iteration, not for {num_iters}",
            "pass num_iters=1, or call it under torch.no_grad()",
        )
    return ()


@torch.compiler.assume_constant_result  # reads the environment and logs, which cannot be traced
def _reference_instead(requested: str | None, problem: str, remedy: str) -> str:
    """The reference backend, with a warning; raises BackendError where Triton was asked for."""
    if requested is None and backend_override() is None:
        warn_once(f"{OP} runs on the reference backend, which is slower: {problem}; {remedy} for the kernels")
        return "reference"
    raise BackendError(f"{OP}: {problem}", f"{remedy}, or use backend='reference'")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout | GridLayout,
    num_iters: int,
    scale: float | None,
    key_mask: Tensor | None,
    causal_frames: int | None,
) -> None:
    """Raise HFEError for arguments that the operation does not take."""
    check_tensors(OP, {"q": q, "k": k, "v": v} | ({} if key_mask is None else {"key_mask": key_mask}))
    check_dtype(OP, "q", q, FLOATS)
    check_rank(OP, "q", q, 4, 4, "[B, H, Nq, D]")
    check_rank(OP, "k", k, 4, 4, "[B, H, Nk, D]")
    batch, heads, num_queries, head_dim = q.shape
    num_keys = k.shape[2]
    check_shape(OP, "k", k, (batch, heads, num_keys, head_dim), "[B, H, Nk, D] with the B, H and D of `q`")
    check_shape(OP, "v", v, (batch, heads, num_keys, head_dim), "that of `k`")
    for name, value in (("k", k), ("v", v)):
        check_dtype(OP, name, value, (q.dtype,))
    if head_dim == 0:
        raise HFEError(f"{OP}: `q` has shape {tuple(q.shape)}", "its last dimension must not be empty")
    if isinstance(num_iters, bool) or not isinstance(num_iters, int) or num_iters < 1:
        raise HFEError(f"{OP}: `num_iters` is {num_iters!r}", "pass an integer of at least 1")
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise HFEError(f"{OP}: `scale` is {scale}", "pass a positive number, or None for D ** -0.5")
    if isinstance(layout, SequenceLayout):
        _check_sequence(layout, batch, num_queries, num_keys, key_mask, causal_frames)
    elif isinstance(layout, GridLayout):
        _check_grid(layout, num_queries, num_keys, key_mask, causal_frames)
    else:
        raise HFEError(f"{OP}: `layout` is of type {type(layout).__name__}", "pass a SequenceLayout or a GridLayout")


def _check_finite(tensors: dict[str, Tensor], key_mask: Tensor | None) -> None:
    """Raise HFEError for NaN or infinity in a token that is not masked; with HFE_CHECK=1 only, as it synchronises."""
    if torch.compiler.is_compiling() or not check_data():
        return
    for name, tensor in tensors.items():
        if type(tensor) is not Tensor or tensor.is_meta:
            continue  # a traced tensor has no values
        wrong = ~tensor.isfinite()
        if key_mask is not None:
            wrong &= key_mask[:, None, :, None]
        if wrong.any():
            position = wrong.nonzero()[0].tolist()
            raise HFEError(
                f"{OP}: `{name}` holds {tensor[tuple(position)].item()} at position {position}, and must be finite",
                "look for the first layer whose output is not, or mask the token",
            )


def _check_sequence(
    layout: SequenceLayout,
    batch: int,
    num_queries: int,
    num_keys: int,
    key_mask: Tensor | None,
    causal_frames: int | None,
) -> None:
    """Raise HFEError unless the other arguments fit a sequence."""
    if num_queries != num_keys:
        raise HFEError(
            f"{OP}: there are {num_queries} queries and {num_keys} keys, and SequenceLayout is for self-attention",
            "pass as many keys as queries, or use softmax attention",
        )
    if 0 < num_queries < layout.block_size:
        raise HFEError(
            f"{OP}: `block_size` is {layout.block_size}, and there are {num_queries} tokens",
            "use smaller blocks, or softmax attention for sequences this short",
        )
    if key_mask is not None:
        check_dtype(OP, "key_mask", key_mask, (torch.bool,))
        check_shape(OP, "key_mask", key_mask, (batch, num_keys), "[B, Nk]: one row for each sequence")
    if causal_frames is not None:
        raise HFEError(f"{OP}: `causal_frames` is {causal_frames}, and SequenceLayout has no frames", "pass None")


def _check_grid(
    layout: GridLayout, num_queries: int, num_keys: int, key_mask: Tensor | None, causal_frames: int | None
) -> None:
    """Raise HFEError unless the other arguments fit a video grid."""
    frames, key_frames = layout.num_frames(num_queries), layout.num_frames(num_keys)
    if key_mask is not None:
        raise HFEError(f"{OP}: `key_mask` is given with a GridLayout, which has no masked tokens", "pass None")
    if causal_frames is None:
        return
    if isinstance(causal_frames, bool) or not isinstance(causal_frames, int) or causal_frames < 1:
        raise HFEError(f"{OP}: `causal_frames` is {causal_frames!r}", "pass an integer of at least 1, or None")
    if frames != key_frames:
        raise HFEError(
            f"{OP}: `causal_frames` is given with {frames} frames of queries and {key_frames} of keys",
            "pass None for the newest chunk against a cache, which attends to all of it",
        )
    if causal_frames % layout.f_tied:
        raise HFEError(
            f"{OP}: `f_tied` is {layout.f_tied}, and a causal chunk has {causal_frames} frames", "it must divide them"
        )
    if frames % causal_frames:
        raise HFEError(
            f"{OP}: `causal_frames` is {causal_frames}, and there are {frames} frames", "it must divide them"
        )
