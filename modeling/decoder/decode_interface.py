"""The attention implementation ``hfe_decode``: our kernel `decode_attention` for queries after a cache, else `sdpa`.

Registered with transformers, so any stock model supports it: ``from_pretrained(...,
attn_implementation="hfe_decode")``. Its masks have no [Q, L] matrix of queries and keys. A plain causal mask is None;
the others, called packed masks here, are small int32 tensors of rank 4, a rank that transformers passes on unchanged:

| name | shape | meaning |
|---|---|---|
| decode mask | [B, 1, 1, W] | Q queries after a cache: row 0 has the cache slot of each query, then the key-value |
| | | length; W > Q |
| | [B, 1, 2, W] | the same, and row 1 is the segment of each slot: -1 where no query may attend, as at padding, |
| | | else 0 |
| prompt mask | [B, 1, 3, S] | a left-padded prompt without cache: all rows are as row 1 above |

Query i attends to the slots up to its own, in a sliding-window layer to the last `sliding_window` of them, except those
of segment -1. What these masks cannot express (packed sequences, a model's own mask functions, other padding) gets
transformers' boolean mask and runs as `sdpa` does, as does everything where the kernel cannot run: off CUDA, in
training, in `torch.compile`.

Letters of the shapes: B sequences, S tokens of a prompt, Q queries, L key-value length, Hq and Hkv heads, D `head_dim`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface

from hf_efficient.errors import HFEError
from hf_efficient.kernels.decode_attention.api import MAX_HEAD_DIM, decode_attention
from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.kernels.namespace import NS

# An exported copy registers under a name of its own, so that two versions never replace each other.
DECODE_ATTENTION = "hfe_decode" if NS == "hf_efficient" else f"{NS}_decode"
# Maximum number of queries of one call of the kernel.
MAX_QUERIES = 64


def pack_decode_mask(queries: int, offset: int | Tensor, batch_size: int, visible: Tensor | None = None) -> Tensor:
    """Return the decode mask of `queries` tokens that follow `offset` cached tokens.

    Args:
        queries: number of queries Q.
        offset: slot of the first query; an integer, or a scalar integer tensor on the device of the mask.
        batch_size: B.
        visible: [B, L], bool or 0 and 1: False where no query may attend; None if there is no such slot.

    Returns:
        int32 [B, 1, 1, Q + 1], or with `visible` [B, 1, 2, max(Q + 1, L)]; on the device of `visible`, else of
        `offset`, else on the CPU.
    """
    device = visible.device if visible is not None else getattr(offset, "device", None)
    numbers = torch.arange(queries + 1, dtype=torch.int32, device=device)
    # The slots of the queries, then the key-value length once they are written.
    head = (numbers + offset).to(torch.int32).expand(batch_size, -1)
    if visible is None:
        return head[:, None, None].contiguous()
    length = max(queries + 1, visible.shape[1])
    mask = torch.zeros(batch_size, 1, 2, length, dtype=torch.int32, device=device)
    mask[:, 0, 0, : queries + 1] = head
    mask[:, 0, 1, : visible.shape[1]] = visible.to(torch.int32) - 1
    return mask


def pack_prompt_mask(padding_mask: Tensor) -> Tensor:
    """Return the prompt mask, int32 [B, 1, 3, S], of a padding mask [B, S]: bool, False at padding, which is left."""
    return (padding_mask.to(torch.int32) - 1)[:, None, None].expand(-1, -1, 3, -1).contiguous()


def is_packed(mask: Any) -> bool:
    """True for a packed mask: `pack_decode_mask` or `pack_prompt_mask` made it. transformers' masks are not int32."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32


def is_decode_mask(mask: Any) -> bool:
    """True for a decode mask, which `pack_decode_mask` made."""
    return is_packed(mask) and mask.shape[2] < 3


def query_slots(mask: Tensor, queries: int) -> Tensor:
    """Return the cache slots of the queries of a decode mask, int32 [queries]; the same in every sequence.

    `queries` must be the number of queries that the mask was made for. The result is a view of the mask.
    """
    return mask[0, 0, 0, :queries]


def _unpack(mask: Tensor, queries: int, kv_length: int, window: int | None) -> Tensor:
    """Return the boolean mask [B, 1, Q, kv_length], True where a query may attend, that a packed mask describes.

    Args:
        mask: a decode or prompt mask.
        queries: number of queries Q.
        kv_length: number of keys.
        window: tokens of the sliding window, the query's own included; None for no window.
    """
    j = torch.arange(kv_length, device=mask.device)
    i = torch.arange(queries, device=mask.device)[None] if mask.shape[2] == 3 else mask[:, 0, 0, :queries]
    visible = j <= i[..., None]
    if window is not None:
        visible = visible & (j > i[..., None] - window)
    if mask.shape[2] > 1:
        visible = visible & (mask[:, 0, 1, None, :kv_length] >= 0)
    return visible[:, None].expand(mask.shape[0], -1, -1, -1)


def _is_left_padded(padding_mask: Tensor) -> bool:
    """True if padding, False in bool [B, S], comes before the tokens in every row; synchronises with the device."""
    return bool((padding_mask[:, 1:] >= padding_mask[:, :-1]).all())


def _evaluate(
    mask_function: Callable, queries: range, keys: range, batch_size: int, offset: int | Tensor, device: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Call a mask function of transformers on index tensors of some queries and keys.

    Args:
        mask_function: ``(batch, head, query position, key position) -> bool``, of broadcasting index tensors.
        queries: Q consecutive indices of queries in the call.
        keys: K consecutive key positions.
        batch_size: B.
        offset: position of the call's first query.
        device: device of the index tensors.

    Returns:
        The result, bool, expands to [B, Q, K]; the positions of the queries [Q, 1]; those of the keys [K].
    """
    batch = torch.arange(batch_size, device=device)[:, None, None]
    q = torch.arange(queries.start, queries.stop, device=device)[:, None] + offset
    kv = torch.arange(keys.start, keys.stop, device=device)
    return mask_function(batch, torch.zeros_like(batch), q[None], kv[None, None]), q, kv


def decode_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the attention mask of ``hfe_decode``; transformers calls it with the arguments of its `sdpa_mask`.

    For more than one query it may synchronise with the device.

    Args:
        batch_size: B.
        q_length: number of queries Q of the call.
        kv_length: number of keys L.
        q_offset: position of the first query, the number of tokens before it; an integer or a scalar tensor.
        kv_offset: position of the first key.
        mask_function: whether a query may attend to a key; causal, or of a sliding window or chunks.
        attention_mask: [B, at most kv_offset + L], 0 at padding; None without padding.
        local_size: size of the sliding window or chunks; None without.
        allow_is_causal_skip: False if the caller needs a mask even where plain causal attention is the same.
        use_vmap: True if `mask_function` is combined with functions of the model or its user.
        device: device of the mask.
        config: the model's configuration.
        kwargs: passed to `sdpa_mask`.

    Returns:
        None for a causal prompt without padding; a decode or prompt mask; or the result of `sdpa_mask`, a bool mask
        [B, 1, Q, L] or None, where the kernel cannot run or these masks cannot express the mask.
    """
    transformers_mask = functools.partial(
        sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if (
        # transformers asks for vmap where the model or its user combines the mask with functions of their own.
        use_vmap
        or (local_size is None and mask_function is not causal_mask_function)
        # Packed sequences do not allow the skip; but neither does a compilable static cache, for single tokens.
        or not (allow_is_causal_skip or q_length == 1)
        or torch.compiler.is_compiling()
        or head_dim > MAX_HEAD_DIM
        or select_backend("decode_attention", None, torch.device(device)) != "triton"
    ):
        return transformers_mask(allow_is_causal_skip=allow_is_causal_skip)
    padding_mask = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding_mask is not None:
        padding_mask = padding_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    keys = range(kv_offset, kv_offset + kv_length)
    offset = q_offset - kv_offset
    if q_length == 1:
        visible = padding_mask
        if local_size is not None:  # a window, or chunks: the function itself says which slots are visible
            visible, _, _ = _evaluate(mask_function, range(1), keys, batch_size, q_offset, device)
            visible = visible[:, 0].expand(batch_size, -1)
            visible = visible if padding_mask is None else visible & padding_mask
        return pack_decode_mask(1, torch.as_tensor(offset, device=device), batch_size, visible)

    if local_size is not None:
        # Chunked attention has a `local_size` too; of two consecutive queries one attends to fewer keys than with a
        # window, so two are enough to distinguish them.
        last = range(q_length - 2, q_length)
        visible, q, kv = _evaluate(mask_function, last, keys, batch_size, q_offset, device)
        if not bool((visible == ((kv <= q) & (kv > q - local_size))).all()):
            return transformers_mask(allow_is_causal_skip=allow_is_causal_skip)
    offset = int(offset)
    length = offset + q_length
    if padding_mask is not None and bool(padding_mask[:, :length].all()):
        padding_mask = None
    if offset > 0:
        return pack_decode_mask(q_length, torch.tensor(offset, device=device), batch_size, padding_mask)
    if local_size is None or length <= local_size:  # a window smaller than the prompt needs the boolean mask
        if padding_mask is None:
            return None
        if _is_left_padded(padding_mask[:, :length]):
            return pack_prompt_mask(padding_mask[:, :length])
    return transformers_mask(allow_is_causal_skip=False)


def _attend_prompt(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention of left-padded prompts, by `sdpa` with ``is_causal=True`` and without a mask.

    Each sequence is shifted circularly to the left so that its tokens come first; the padding then follows them, where
    a causal query does not attend. The output is shifted back.

    Args:
        module: the attention module.
        query: [B, Hq, S, D].
        key, value: [B, Hkv, at least S, D]; later keys, empty slots of a static cache, are not read.
        mask: the prompt mask, int32 [B, 1, 3, S].
        kwargs: passed to `sdpa`.

    Returns:
        Output [B, S, Hq, D], undefined at padding, and None for the weights.
    """
    length = query.shape[2]
    start = (mask[:, 0, 1] >= 0).to(torch.int8).argmax(1, keepdim=True)
    positions = torch.arange(length, device=query.device)
    rotated = ((positions + start) % length)[:, None, :, None]
    original = ((positions - start) % length)[:, :, None, None]
    query, key, value = (x[:, :, :length].take_along_dim(rotated, 2) for x in (query, key, value))
    output, _ = sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)
    return output.take_along_dim(original, 1), None


def decode_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention; the function that transformers calls for ``hfe_decode``.

    The kernel runs for a decode mask, `sdpa` for other masks, for dropout and gradients, and for shapes that the kernel
    does not support.

    Args:
        module: the attention module, as in transformers.
        query: [B, Hq, Q, D].
        key, value: [B, Hkv, L, D], with the tokens of the call.
        attention_mask: result of `decode_mask`: None, a decode or prompt mask, or a mask for `sdpa`.
        dropout: probability of dropping a weight.
        scaling: factor of the scores; None for ``D ** -0.5``.
        sliding_window: tokens of the window, the query's own included; None for no window. Read with a decode mask
        only,
            since other masks contain the window.
        kwargs: passed to `sdpa` if the mask is not a packed mask; otherwise only `softcap` and `s_aux` are checked.

    Returns:
        Output [B, Q, Hq, D] and None for the weights.

    Raises:
        HFEError: the model uses soft-capped logits (`softcap`) or attention sinks (`s_aux`).
    """
    for name in ("softcap", "s_aux"):  # soft-capped logits, attention sinks
        if kwargs.get(name) is not None:
            raise HFEError(
                f"{type(module).__name__} computes attention with `{name}`, which {DECODE_ATTENTION} does not support",
                "load the model with attn_implementation='eager'",
            )
    if not is_packed(attention_mask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    queries = query.shape[2]
    if attention_mask.shape[2] == 3:
        return _attend_prompt(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
    has_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    # Some models have values narrower than keys, and heads wider than their configuration says.
    if dropout or has_gradient or key.shape != value.shape or key.shape[3] > MAX_HEAD_DIM:
        visible = _unpack(attention_mask, queries, key.shape[2], sliding_window)
        return sdpa_attention_forward(module, query, key, value, visible, dropout=dropout, scaling=scaling)

    head = attention_mask[:, 0, 0]
    segments = attention_mask[:, 0, 1] if attention_mask.shape[2] == 2 else None
    parts = [
        decode_attention(
            query[:, :, start : start + MAX_QUERIES],
            key,
            value,
            head[:, queries],
            head[:, start : min(start + MAX_QUERIES, queries)],
            window=sliding_window,
            kv_segment_ids=segments,
            scale=scaling,
        )
        for start in range(0, queries, MAX_QUERIES)
    ]
    output = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return output.transpose(1, 2), None


AttentionInterface.register(DECODE_ATTENTION, decode_attention_forward)
AttentionMaskInterface.register(DECODE_ATTENTION, decode_mask)
