"""The attention implementation ``hfe_decode``: our kernel after a cache, PyTorch's fastest attention elsewhere.

Registered with transformers, so any stock model takes it: ``from_pretrained(..., attn_implementation="hfe_decode")``.
Its masks never hold a row for each query. A plain causal one is None; the others are small int32 tensors of rank 4,
which transformers hands through unchanged as it does every mask of rank 4:

| shape | meaning |
|---|---|
| [B, 1, 1, L] | queries after a cache: row 0 holds the column of each query, then the number of filled columns |
| [B, 1, 2, L] | the same, and row 1 the segment of each column: -1 where nobody may look, as at padding |
| [B, 1, 3, S] | a prompt without cache: row 1 as above, and padding comes first in every row |

What these cannot say (packed sequences, a model's own masks, other padding) gets transformers' boolean mask,
and runs as `sdpa` does. So does everything where the kernel cannot run: off CUDA, for training, while compiling.
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
    sliding_window_overlay,
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


def pack_decode_mask(queries: int, offset: int | Tensor, batch: int, columns: Tensor | None = None) -> Tensor:
    """The mask of `queries` tokens that follow `offset` columns of a cache: [B, 1, 1 or 2, L], int32.

    Args:
        offset: column of the first query; a scalar, or a tensor on the device that the mask is to be on.
        columns: [B, C], bool or integer, false where a column is padding; None when there is none.
    """
    device = columns.device if columns is not None else getattr(offset, "device", None)
    numbers = torch.arange(queries + 1, dtype=torch.int32, device=device)
    # The columns of the queries, and the number of columns that are filled once they are written.
    head = (numbers + offset).to(torch.int32).expand(batch, -1)
    if columns is None:
        return head[:, None, None].contiguous()
    length = max(queries + 1, columns.shape[1])
    mask = torch.zeros(batch, 1, 2, length, dtype=torch.int32, device=device)
    mask[:, 0, 0, : queries + 1] = head
    mask[:, 0, 1, : columns.shape[1]] = columns.to(torch.int32) - 1
    return mask


def pack_prompt_mask(columns: Tensor) -> Tensor:
    """The mask of a prompt without cache whose padding is `columns` [B, S], bool, false at padding: [B, 1, 3, S]."""
    return (columns.to(torch.int32) - 1)[:, None, None].expand(-1, -1, 3, -1).contiguous()


def is_packed(mask: Any) -> bool:
    """True for a mask that this module made."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32


def is_decode_mask(mask: Any) -> bool:
    """True for such a mask of queries that follow a cache."""
    return is_packed(mask) and mask.shape[2] < 3


def query_slots(mask: Tensor, queries: int) -> Tensor:
    """Columns of the cache that the queries of a decode mask stand at [Q], the same in every row."""
    return mask[0, 0, 0, :queries]


def _unpack(mask: Tensor, queries: int, columns: int, window: int | None) -> Tensor:
    """The boolean mask [B, 1, Q, C] that a packed one stands for."""
    j = torch.arange(columns, device=mask.device)
    i = torch.arange(queries, device=mask.device)[None] if mask.shape[2] == 3 else mask[:, 0, 0, :queries]
    visible = j <= i[..., None]
    if window is not None:
        visible = visible & (j > i[..., None] - window)
    if mask.shape[2] > 1:
        visible = visible & (mask[:, 0, 1, None, :columns] >= 0)
    return visible[:, None].expand(mask.shape[0], -1, -1, -1)


def _padded_left(columns: Tensor) -> bool:
    """True when padding comes before the real tokens in every row [B, S]; waits for the device."""
    return bool((columns[:, 1:] >= columns[:, :-1]).all())


def _is_plain(mask_function: Callable, local_size: int | None) -> bool:
    """True for transformers' own causal mask function and its sliding-window twin, false for anything built on them."""
    if local_size is None:
        return mask_function is causal_mask_function
    cells = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    parts = next((cell for cell in cells if isinstance(cell, tuple)), ())
    window_name = sliding_window_overlay(1).__qualname__
    return len(parts) == 2 and parts[1] is causal_mask_function and parts[0].__qualname__ == window_name


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
        not _is_plain(mask_function, local_size)
        # A caller that wants a mask in any case says no here; but so does every static cache, for single tokens.
        or not (allow_is_causal_skip or q_length == 1)
        or torch.compiler.is_compiling()
        or head_dim > MAX_HEAD_DIM
        or select_backend("decode_attention", None, torch.device(device)) != "triton"
    ):
        return transformers_mask(allow_is_causal_skip=allow_is_causal_skip)
    columns = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if columns is not None:
        columns = columns[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    offset = q_offset - kv_offset
    if q_length == 1:
        offset = torch.as_tensor(offset, device=device)
        return pack_decode_mask(1, offset, batch_size, columns)

    offset = int(offset)
    seen = offset + q_length
    if columns is not None and bool(columns[:, :seen].all()):
        columns = None
    if offset > 0:
        return pack_decode_mask(q_length, torch.tensor(offset, device=device), batch_size, columns)
    if local_size is None or seen <= local_size:  # a window that is smaller than the prompt needs the boolean mask
        if columns is None:
            return None
        if _padded_left(columns[:, :seen]):
            return pack_prompt_mask(columns[:, :seen])
    return transformers_mask(allow_is_causal_skip=False)


def _attend_prompt(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention of prompts with padding, without a mask: every row is turned until its real tokens come first.

    Then no real token looks at padding, since that comes later.
    """
    length = query.shape[2]
    start = (mask[:, 0, 1] >= 0).to(torch.int8).argmax(1, keepdim=True)
    positions = torch.arange(length, device=query.device)
    turn = ((positions + start) % length)[:, None, :, None]
    back = ((positions - start) % length)[:, :, None, None]
    query, key, value = (x[:, :, :length].take_along_dim(turn, 2) for x in (query, key, value))
    output, _ = sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)
    return output.take_along_dim(back, 1), None


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

    `key` and `value` are [B, Hkv, C, D], with the queries' own columns written already.
    """
    for name in ("softcap", "s_aux"):  # soft-capped logits, attention sinks
        if kwargs.get(name) is not None:
            raise HFEError(
                f"{type(module).__name__} computes attention with `{name}`, which {DECODE_ATTENTION} does not know",
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
