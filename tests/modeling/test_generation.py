"""Generation of every registered causal language model: all modes agree with running the model without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PrefixTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, pipeline

from hf_efficient.errors import HFEError
from hf_efficient.modeling.decoder.cache_compat import CACHE_ARGUMENT

PROMPT, NEW = 7, 10


@torch.no_grad()
def greedy_without_cache(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The definition: append the most likely token of a whole forward pass."""
    for _ in range(NEW):
        ids = torch.cat((ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids


def generate(model: PreTrainedModel, ids: Tensor, **settings: Any) -> Tensor:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "disable_compile": True} | settings
    torch.manual_seed(4)
    return model.generate(ids, **settings)


# Before 5.23 transformers could not crop a cache whose later layers were never filled; stock Qwen2 failed as we do.
early_exit = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="needs transformers 5.23")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="dynamic-cache"),
        pytest.param({"use_cache": False}, id="no-cache"),
        pytest.param({"cache_implementation": "static"}, id="static-cache"),
        pytest.param({"prompt_lookup_num_tokens": 3}, id="prompt-lookup"),
        pytest.param({"assistant_early_exit": 1}, id="early-exit", marks=early_exit),
    ],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy_modes_agree(
    model_type: str, settings: dict[str, Any], attention: str, tiny_model: Callable, token_ids: Callable
) -> None:
    model = tiny_model(model_type)
    model.set_attn_implementation(attention)
    one_prompt = "prompt_lookup_num_tokens" in settings or "assistant_early_exit" in settings
    ids = token_ids(1 if one_prompt else 2, PROMPT)
    assert torch.equal(generate(model, ids, **settings), greedy_without_cache(model, ids))


def test_prefix_tuning_acts_or_is_refused(model_type: str, tiny_model: Callable, token_ids: Callable) -> None:
    """PEFT 0.21 passes its prefix beside the `cache` of transformers 5.24, where stock models ignore the prefix."""
    model = tiny_model(model_type)
    adapted = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    for parameter in adapted.prompt_encoder.parameters():
        nn.init.normal_(parameter)
    ids = token_ids(1, PROMPT)
    expected = ids
    with torch.no_grad():
        for _ in range(NEW):
            logits = adapted(input_ids=expected, attention_mask=torch.ones_like(expected)).logits
            expected = torch.cat((expected, logits[:, -1:].argmax(-1)), 1)
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    try:
        found = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    except HFEError as error:
        assert CACHE_ARGUMENT == "cache" and "prefix tuning" in str(error)
    else:
        assert torch.equal(found, expected)


def test_assisted_generation_agrees(model_type: str, tiny_model: Callable, token_ids: Callable) -> None:
    model, assistant, ids = tiny_model(model_type), tiny_model("hfe_decoder"), token_ids(1, PROMPT)
    assert torch.equal(generate(model, ids, assistant_model=assistant), greedy_without_cache(model, ids))


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True, "top_k": 20}], ids=["beams", "sampling"])
@pytest.mark.parametrize("cache", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"])
def test_beams_and_samples_do_not_depend_on_the_cache(
    model_type: str, settings: dict[str, Any], cache: dict[str, Any], tiny_model: Callable, token_ids: Callable
) -> None:
    model, ids = tiny_model(model_type), token_ids(2, PROMPT)
    assert torch.equal(generate(model, ids, **settings, **cache), generate(model, ids, **settings))


def test_left_padded_batch_generates_what_each_prompt_does_alone(
    model_type: str, tiny_model: Callable, token_ids: Callable
) -> None:
    model, long = tiny_model(model_type), token_ids(1, PROMPT)
    short = long[:, 3:]
    batch = torch.cat((long, torch.cat((torch.zeros(1, 3, dtype=torch.long), short), 1)))
    found = generate(model, batch, attention_mask=(batch != 0).long())
    assert torch.equal(found[:1, PROMPT:], generate(model, long)[:, PROMPT:])
    assert torch.equal(found[1:, PROMPT:], generate(model, short)[:, PROMPT - 3 :])


def test_generation_continues_from_a_cache(model_type: str, tiny_model: Callable, token_ids: Callable) -> None:
    model, ids = tiny_model(model_type), token_ids(2, PROMPT)
    part = generate(model, ids, max_new_tokens=4, return_dict_in_generate=True)
    # Without a mask transformers would treat a generated token with the id of padding as padding.
    given = {"past_key_values": part.past_key_values, "attention_mask": torch.ones_like(part.sequences)}
    rest = generate(model, part.sequences, **given, max_new_tokens=NEW - 4)
    assert torch.equal(rest, generate(model, ids))


def test_generation_with_a_compiled_forward(model_type: str, tiny_model: Callable, token_ids: Callable) -> None:
    model, ids = tiny_model(model_type), token_ids(2, PROMPT)
    expected = generate(model, ids)
    torch._dynamo.reset()  # what other tests have compiled counts against the limit of this one
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(generate(model, ids, cache_implementation="static"), expected)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One word for each id of the tiny models."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")


def test_text_generation_pipeline(model_type: str, tiny_model: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(model_type)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = writer(["w5 w6 w7", "w8"], max_new_tokens=4, do_sample=False, batch_size=2, return_full_text=False)
    alone = generate(model, torch.tensor([[5, 6, 7]]), max_new_tokens=4, eos_token_id=2)[0, 3:]
    assert texts[0][0]["generated_text"].split() == tokenizer.decode(alone, skip_special_tokens=True).split()
    assert texts[1][0]["generated_text"]


def test_feature_extraction_pipeline(model_type: str, tiny_model: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
    features = pipeline("feature-extraction", model=tiny_model(model_type).model, tokenizer=tokenizer, device="cpu")
    assert torch.tensor(features("w5 w6 w7")).shape == (1, 3, 32)
