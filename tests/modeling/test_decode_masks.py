"""The packed masks of ``hfe_decode`` equal the masks that transformers makes, for every mask function.

The masks are made as on a device where the kernel runs, unpacked, and compared entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig, PreTrainedConfig, StaticCache
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from hf_efficient.modeling.decoder import decode_interface
from hf_efficient.modeling.decoder.cache_compat import CACHE_ARGUMENT
from hf_efficient.modeling.decoder.decode_interface import DECODE_ATTENTION, is_decode_mask, is_packed

SIZE = 6  # of the window and of the chunks
SHAPE: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
KINDS: dict[str, tuple[Callable, PreTrainedConfig, int | None]] = {
    "full": (create_causal_mask, LlamaConfig(**SHAPE), None),
    "window": (create_sliding_window_causal_mask, MistralConfig(**SHAPE, sliding_window=SIZE), SIZE),
    "chunks": (create_chunked_causal_mask, LlamaConfig(**SHAPE, attention_chunk_size=SIZE), None),
}


@pytest.fixture(autouse=True)
def _kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_interface, "select_backend", lambda *_: "triton")


def filled(cache: Any, tokens: int) -> Any:
    if tokens:
        states = torch.zeros(2, 2, tokens, 8)
        cache.update(states, states, 0)
    return cache


def both_masks(kind: str, cached: int, queries: int, cache: str, **given: Any) -> tuple[Any, Any, int]:
    """Our mask and transformers' boolean one, and the key-value length."""
    create, config, _ = KINDS[kind]
    masks = []
    for implementation in (DECODE_ATTENTION, "sdpa"):
        config._attn_implementation = implementation
        made = {
            "none": lambda: None,
            "dynamic": lambda: filled(DynamicCache(), cached),
            "sliding": lambda: filled(DynamicCache(config=KINDS["window"][1]), cached),
            "static": lambda: filled(StaticCache(config=LlamaConfig(**SHAPE), max_cache_len=40), cached),
        }[cache]()
        inputs = {"inputs_embeds": torch.zeros(2, queries, 32), "attention_mask": None} | given
        masks.append(create(config=config, **{CACHE_ARGUMENT: made}, **inputs))
    kept = min(cached, SIZE - 1) if cache == "sliding" else cached
    return masks[0], masks[1], 40 if cache == "static" else kept + queries


def entries(mask: Any, kind: str, cached: int, queries: int, kv_length: int) -> Tensor:
    """A mask as bool [B, 1, Q, K]; None is plain causal attention."""
    if is_packed(mask) and mask.shape[2] == 3:  # keys past the prompt are left out
        prompt = decode_interface._unpack(mask, queries, queries, KINDS[kind][2])
        return torch.nn.functional.pad(prompt, (0, kv_length - queries))
    if is_packed(mask):
        return decode_interface._unpack(mask, queries, kv_length, KINDS[kind][2])
    if mask is None:
        return (torch.arange(kv_length) <= cached + torch.arange(queries)[:, None]).expand(2, 1, -1, -1)
    return mask


def padding(length: int, left: tuple[int, int]) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    for row, count in enumerate(left):
        mask[row, :count] = 0
    return mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cached", "queries"), [(0, 1), (0, 4), (0, 13), (5, 1), (5, 6), (11, 1), (12, 1), (10, 9)])
@pytest.mark.parametrize("left", [(0, 0), (0, 3)], ids=["plain", "padded"])
@pytest.mark.parametrize("cache", ["none", "dynamic", "sliding", "static"])
def test_masks_equal_those_of_transformers(
    kind: str, cached: int, queries: int, left: tuple[int, int], cache: str
) -> None:
    if (cache == "none" and cached) or (cache == "sliding" and kind != "window"):
        return  # such calls do not exist
    mask = padding(cached + queries, left) if any(left) else None
    ours, theirs, kv_length = both_masks(kind, cached, queries, cache, attention_mask=mask)
    real = slice(max(max(left) - cached, 0), None)  # the outputs of padding are not read
    found, expected = (entries(m, kind, cached, queries, kv_length)[:, :, real] for m in (ours, theirs))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize(("cached", "queries"), [(0, 9), (8, 1), (8, 4)])
@pytest.mark.parametrize("combine", ["or_mask_function", "and_mask_function"])
def test_custom_mask_functions_are_honoured(kind: str, cached: int, queries: int, combine: str) -> None:
    def every_third(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx + batch_idx) % 3 == 0

    ours, theirs, kv_length = both_masks(kind, cached, queries, "dynamic", **{combine: every_third})
    assert not is_packed(ours)
    found, expected = (entries(mask, kind, cached, queries, kv_length) for mask in (ours, theirs))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["full", "window"])
def test_packed_sequences_do_not_see_each_other(kind: str) -> None:
    positions = torch.cat((torch.arange(7), torch.arange(5)))[None].expand(2, -1)
    ours, theirs, kv_length = both_masks(kind, 0, 12, "none", position_ids=positions)
    assert not is_packed(ours)
    assert torch.equal(*(entries(mask, kind, 0, 12, kv_length) for mask in (ours, theirs)))


def test_a_window_is_packed_and_chunks_of_several_queries_are_not() -> None:
    assert is_decode_mask(both_masks("window", 11, 4, "dynamic")[0])
    assert is_decode_mask(both_masks("window", 11, 1, "static")[0])
    assert not is_packed(both_masks("chunks", 11, 4, "dynamic")[0])
    assert is_decode_mask(both_masks("full", 11, 4, "dynamic")[0]) and both_masks("full", 0, 4, "none")[0] is None
