"""The attention implementation ``hfe_decode``: our kernel after a cache, PyTorch's fastest attention elsewhere.

Registered with transformers, so any stock model takes it: ``from_pretrained(..., attn_implementation="hfe_decode")``.
Its masks never have a row per query. A plain causal mask is None; the others are small int32 tensors of rank 4, a rank
that transformers passes through unchanged:

| shape | meaning |
|---|---|
| [B, 1, 1, L] | queries after a cache: row 0 has the cache slot of each query, then the key-value length |
| [B, 1, 2, L] | the same, and row 1 the segment of each slot: -1 where no query may look, as at padding |
| [B, 1, 3, S] | a prompt without cache: row 1 as above, and padding comes first in every row |

What these cannot express (packed sequences, a model's own mask functions, other padding) gets transformers' boolean
mask and runs as `sdpa` does, and so does everything where the kernel cannot run: off CUDA, in training, in
`torch.compile`.
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
# Queries that one call of the kernel takes.
MAX_QUERIES = 64


def pack_decode_mask(queries: int, offset: int | Tensor, batch_size: int, visible: Tensor | None = None) -> Tensor:
    """The mask of `queries` tokens that follow `offset` cached tokens: int32 [B, 1, 1 or 2, L].

    Args:
        queries: number of queries Q.
        offset: slot of the first query; an integer, or a scalar tensor on the device of the mask.
        batch_size: B.
        visible: [B, key-value length], bool or integer, False where no query may look; None when there is no such slot.
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
    """The mask of a prompt without cache, int32 [B, 1, 3, S]; `padding_mask` [B, S] is False at padding."""
    return (padding_mask.to(torch.int32) - 1)[:, None, None].expand(-1, -1, 3, -1).contiguous()


def is_packed(mask: Any) -> bool:
    """True for a mask that this module made."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32


def is_decode_mask(mask: Any) -> bool:
    """True for a mask that `pack_decode_mask` made."""
    return is_packed(mask) and mask.shape[2] < 3


def query_slots(mask: Tensor, queries: int) -> Tensor:
    """Cache slots of the queries of a decode mask, int32 [Q], the same in every sequence."""
    return mask[0, 0, 0, :queries]


def _unpack(mask: Tensor, queries: int, kv_length: int, window: int | None) -> Tensor:
    """The boolean mask [B, 1, Q, kv_length] that a packed one stands for."""
    j = torch.arange(kv_length, device=mask.device)
    i = torch.arange(queries, device=mask.device)[None] if mask.shape[2] == 3 else mask[:, 0, 0, :queries]
    visible = j <= i[..., None]
    if window is not None:
        visible = visible & (j > i[..., None] - window)
    if mask.shape[2] > 1:
        visible = visible & (mask[:, 0, 1, None, :kv_length] >= 0)
    return visible[:, None].expand(mask.shape[0], -1, -1, -1)


def _is_left_padded(padding_mask: Tensor) -> bool:
    """True when padding comes before the real tokens in every row of [B, S]; waits for the device."""
    return bool((padding_mask[:, 1:] >= padding_mask[:, :-1]).all())


def _evaluate(
    mask_function: Callable, queries: range, keys: range, batch_size: int, offset: int | Tensor, device: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """A mask function at some queries and keys, with index tensors as transformers passes them.

    Args:
        queries: Q consecutive queries of the call.
        keys: K consecutive key positions.
        offset: position of the call's first query.

    Returns:
        Bool, expands to [B, Q, K]; the positions of the queries [Q, 1]; those of the keys [K].
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
    """Mask of the implementation ``hfe_decode``; arguments as for transformers' `sdpa_mask`, result as above."""
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
        # Attention in chunks has a `local_size` too; of two neighbouring queries one sees less than with a window.
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
    """Causal attention of left-padded prompts without a mask: [B, H, S, D] -> [B, S, Hq, D].

    Each row is rotated along the sequence until its real tokens come first; padding then comes later, where no real
    token looks.
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
    """Attention of the implementation ``hfe_decode``: query [B, Hq, Q, D] -> [B, Q, Hq, D], no weights.

    Args:
        module: the attention module, as in transformers.
        query: [B, Hq, Q, D].
        key, value: [B, Hkv, L, D], the queries' own tokens included.
        attention_mask: None, a packed mask of this module, or a mask for `sdpa`.
        dropout, scaling, sliding_window: as in transformers.

    Raises:
        HFEError: the model asks for soft-capped logits or attention sinks.
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
