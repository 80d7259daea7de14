"""Without a patch our decoder is the stock model: Llama, Mistral, Qwen2 and Qwen3, in every way of running it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_efficient.conversion.reading.source import open_source

TOLERANCE = 1e-5
one_of_each = pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2-tied", "qwen3-window"])


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_equal_the_stock_model(
    family: str, attention: str, stock_and_ours: Callable, token_ids: Callable
) -> None:
    stock, ours = stock_and_ours(family)
    stock.set_attn_implementation(attention)
    ours.set_attn_implementation(attention)
    ids = token_ids(2, 19)
    assert largest_difference(logits(stock, input_ids=ids), logits(ours, input_ids=ids)) <= TOLERANCE


@one_of_each
def test_flex_attention_equals_the_stock_model(family: str, stock_and_ours: Callable, token_ids: Callable) -> None:
    stock, ours = stock_and_ours(family)
    ids = token_ids(1, 16)
    expected = logits(stock, input_ids=ids)
    ours.set_attn_implementation("flex_attention")
    # Compiling the flexible kernel for the CPU takes a minute and changes nothing.
    with torch.compiler.set_stance("force_eager"):
        assert largest_difference(expected, logits(ours, input_ids=ids)) <= TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens_equal_the_stock_model(
    family: str, cache: str, stock_and_ours: Callable, token_ids: Callable
) -> None:
    stock, ours = stock_and_ours(family)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    settings |= {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    ids = token_ids(2, 7)
    assert torch.equal(stock.generate(ids, **settings), ours.generate(ids, **settings))


def test_left_padded_batch_equals_the_stock_model(family: str, stock_and_ours: Callable, token_ids: Callable) -> None:
    stock, ours = stock_and_ours(family)
    ids, mask = token_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(stock.generate(ids, **settings), ours.generate(ids, **settings))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    difference = (logits(stock, **inputs) - logits(ours, **inputs)).abs()
    assert difference[mask.bool()].max() <= TOLERANCE


@one_of_each
def test_loss_and_gradients_equal_the_stock_model(family: str, stock_and_ours: Callable, token_ids: Callable) -> None:
    stock, ours = stock_and_ours(family)
    ids = token_ids(2, 11)
    labels = ids.clone()
    labels[:, :3] = -100
    losses = [model(input_ids=ids, labels=labels).loss for model in (stock, ours)]
    assert abs(losses[0] - losses[1]) <= TOLERANCE
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad for name, p in stock.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


@one_of_each
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_embeddings_equal_the_stock_model(
    family: str, rope: dict[str, Any], stock_and_ours: Callable, token_ids: Callable
) -> None:
    """Beyond the trained length, and back within it: the dynamic type must return to its first frequencies."""
    stock, ours = stock_and_ours(family, rope_parameters={"rope_theta": 1e4} | rope)
    for length in (10, 100, 10):
        ids = token_ids(1, length)
        assert largest_difference(logits(stock, input_ids=ids), logits(ours, input_ids=ids)) <= TOLERANCE


@one_of_each
def test_packed_sequences_equal_the_stock_model(family: str, stock_and_ours: Callable, token_ids: Callable) -> None:
    stock, ours = stock_and_ours(family)
    positions = torch.cat((torch.arange(6), torch.arange(8)))[None]
    inputs = {"input_ids": token_ids(1, 14), "position_ids": positions, "use_cache": False}
    assert largest_difference(logits(stock, **inputs), logits(ours, **inputs)) <= TOLERANCE


@one_of_each
def test_hidden_states_and_attentions_equal_the_stock_model(
    family: str, stock_and_ours: Callable, token_ids: Callable
) -> None:
    stock, ours = stock_and_ours(family)
    ids = token_ids(2, 9)
    stock.set_attn_implementation("eager")
    ours.set_attn_implementation("eager")
    expected, found = (
        model(input_ids=ids, output_hidden_states=True, output_attentions=True) for model in (stock, ours)
    )
    for kind in ("hidden_states", "attentions"):
        pairs = zip(getattr(expected, kind), getattr(found, kind), strict=True)
        assert max(largest_difference(a, b) for a, b in pairs) <= TOLERANCE


@one_of_each
def test_beams_and_samples_equal_the_stock_model(family: str, stock_and_ours: Callable, token_ids: Callable) -> None:
    stock, ours = stock_and_ours(family)
    ids = token_ids(2, 7)
    for settings in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 20}):
        outputs = []
        for model in (stock, ours):
            torch.manual_seed(3)
            outputs.append(model.generate(ids, max_new_tokens=6, eos_token_id=None, **settings))
        assert torch.equal(*outputs)


@one_of_each
def test_early_exit_of_assisted_generation_runs_as_many_layers_as_stock(
    family: str, stock_and_ours: Callable, token_ids: Callable
) -> None:
    stock, ours = stock_and_ours(family)
    ids = token_ids(1, 7)
    for model in (stock, ours):
        model.config.num_hidden_layers = 1
    assert largest_difference(logits(stock, input_ids=ids), logits(ours, input_ids=ids)) <= TOLERANCE


@pytest.mark.real_model
def test_the_real_model_keeps_its_logits_and_its_words(smollm_gguf: Path) -> None:
    source = open_source(str(smollm_gguf))
    tensors = {name: source.reader.read(name) for name in source.reader.names()}
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = source.tokenizer()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    outputs = []
    for config in (source.stock_config, source.config):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        model.load_state_dict(tensors, strict=False)
        outputs.append((logits(model, input_ids=ids), model.generate(ids, max_new_tokens=12, do_sample=False)))
    (expected, words), (found, our_words) = outputs
    assert largest_difference(expected, found) <= TOLERANCE * expected.abs().max()
    assert torch.equal(words, our_words)
    assert "Paris" in tokenizer.decode(our_words[0, ids.shape[1] :])
