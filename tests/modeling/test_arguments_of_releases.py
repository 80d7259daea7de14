"""A forward accepts the cache under its name of every supported transformers release, and raises for similar names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask

from hf_efficient.errors import HFEError
from hf_efficient.modeling.decoder import cache_compat
from hf_efficient.modeling.decoder.cache_compat import CACHE_ARGUMENT, CACHE_ARGUMENTS, cache_of_arguments
from hf_efficient.modeling.decoder.modeling_decoder import DecoderModel

RELEASE = tuple(int(number) for number in transformers.__version__.split(".")[:2])
# Names that releases had, and some that one might have.
UNKNOWN = (
    "attn_mask",
    "block_sequence_ids",
    "cache_params",
    "cache_position",
    "causal_mask",
    "head_mask",
    "kv_cache",
    "layer_past",
    "mems",
    "past",
    "past_key_value",
    "position_id",
    "positions",
)
KNOWN: dict[str, Any] = {
    "cu_seq_lens_q": torch.tensor([0, 9], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 9], dtype=torch.int32),
    "max_length_q": 9,
    "max_length_k": 9,
    "num_items_in_batch": 9,
    "output_attentions": False,
    "output_hidden_states": False,
    "token_type_ids": torch.zeros(1, 9, dtype=torch.long),
}


def step_by_step(model: PreTrainedModel, ids: Tensor, cache: Cache, name: str) -> Tensor:
    """Logits [B, S, V] of ids that come in three pieces."""
    with torch.no_grad():
        return torch.cat([model(piece, **{name: cache}).logits for piece in ids.split([4, 1, ids.shape[1] - 5], 1)], 1)


def test_the_name_is_the_installed_release_s() -> None:
    assert ("cache" if RELEASE >= (5, 24) else "past_key_values") == CACHE_ARGUMENT
    assert CACHE_ARGUMENT in inspect.signature(create_causal_mask).parameters


@pytest.mark.parametrize("name", CACHE_ARGUMENTS)
def test_each_name_of_the_cache_continues_the_text(
    model_type: str, name: str, tiny_model: Callable, token_ids: Callable
) -> None:
    model, ids = tiny_model(model_type), token_ids(2, 9)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        torch.testing.assert_close(step_by_step(model, ids, cache, name), whole, rtol=1e-4, atol=1e-4)
        assert int(cache.get_seq_length()) == 9
        again = model.model(ids[:, :1], **{name: cache})
        assert getattr(again, CACHE_ARGUMENT) is cache and int(cache.get_seq_length()) == 10


@pytest.mark.parametrize("name", CACHE_ARGUMENTS)
def test_generate_continues_from_a_cache_under_each_name(
    model_type: str, name: str, tiny_model: Callable, token_ids: Callable
) -> None:
    model, ids = tiny_model(model_type), token_ids(1, 7)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **settings, use_cache=False)
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], **{name: cache})
    found = model.generate(ids, **{name: cache}, **settings, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    assert getattr(found, CACHE_ARGUMENT) is cache and int(cache.get_seq_length()) == 12


def test_one_cache_under_both_names_is_one_and_two_are_an_error(
    model_type: str, tiny_model: Callable, token_ids: Callable
) -> None:
    model, ids = tiny_model(model_type), token_ids(1, 5)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, cache=cache)
    assert cache.get_seq_length() == 5
    with pytest.raises(HFEError, match="both past_key_values and cache"):
        model(ids, past_key_values=cache, cache=DynamicCache(config=model.config))


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_name_that_no_release_has_is_an_error(
    model_type: str, name: str, tiny_model: Callable, token_ids: Callable
) -> None:
    """For the causal model and the base model; a value of None is accepted."""
    model, ids = tiny_model(model_type), token_ids(1, 5)
    for called in (model, model.model):
        with pytest.raises(HFEError, match=rf"was given {name}.*transformers 5\.17 to 5\.24"):
            called(ids, **{name: torch.zeros(1, 5)})
        called(ids, **{name: None})


# transformers 5.24 accepts `cache_params` as the cache, with a warning.
@pytest.mark.parametrize("name", [name for name in UNKNOWN if name not in ("cache_params", "cache_position")])
def test_generate_refuses_it_too(model_type: str, name: str, tiny_model: Callable, token_ids: Callable) -> None:
    with pytest.raises(ValueError, match=name):
        tiny_model(model_type).generate(token_ids(1, 5), max_new_tokens=2, **{name: torch.zeros(1, 5)})


def test_layers_and_attention_take_both_names_and_refuse_others(tiny_model: Callable, token_ids: Callable) -> None:
    model: DecoderModel = tiny_model("hfe_decoder").model
    hidden = model.embed_tokens(token_ids(1, 5))
    rotary = model.rotary_emb(hidden, torch.arange(5)[None])
    for module, given in (
        (model.layers[0], {"attention_mask": None, "position_embeddings": rotary}),
        (model.layers[0].self_attn, {"attention_mask": None, "position_embeddings": rotary}),
    ):
        for name in CACHE_ARGUMENTS:
            cache = DynamicCache(config=model.config)
            module(hidden, **given, **{name: cache})
            assert cache.get_seq_length() == 5
        with pytest.raises(HFEError, match="was given past_key_value,"):
            module(hidden, **given, past_key_value=DynamicCache(config=model.config))


def test_what_has_another_meaning_is_taken(model_type: str, tiny_model: Callable, token_ids: Callable) -> None:
    model, ids = tiny_model(model_type), token_ids(1, 9)
    with torch.no_grad():
        assert torch.equal(model(ids, **KNOWN).logits, model(ids).logits)


def test_devices_are_placed_without_touching_the_cache(model_type: str, tiny_model: Callable) -> None:
    """A cache that accelerate moved to the device of each layer would be a copy."""
    assert set(CACHE_ARGUMENTS) <= set(tiny_model(model_type)._skip_keys_device_placement)
    assert set(CACHE_ARGUMENTS) <= set(tiny_model(model_type).config.keys_to_ignore_at_inference)


def test_checkpointing_drops_the_cache_that_it_would_fill_twice(tiny_model: Callable, token_ids: Callable) -> None:
    """transformers drops it under its own name only."""
    model, ids = tiny_model("hfe_decoder").train(), token_ids(1, 6)
    model.gradient_checkpointing_enable()
    cache = DynamicCache(config=model.config)
    for name in CACHE_ARGUMENTS:
        model(ids, labels=ids, **{name: cache}).loss.backward()
        assert cache.get_seq_length() == 0


def test_no_name_is_read_past_the_one_place() -> None:
    """What a call is given is read under both names."""
    marker = object()
    for name in CACHE_ARGUMENTS:
        assert cache_of_arguments({"use_cache": True, name: marker}) is marker
    assert cache_of_arguments({"cache": None, "past_key_values": marker}) is marker
    assert cache_of_arguments({}) is None


def test_a_paged_cache_of_older_releases_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_compat, "CACHE_ARGUMENT", "past_key_values")
    paged = object()
    assert cache_compat.rename_cache({"cache": paged, "use_cache": True})["cache"] is paged
