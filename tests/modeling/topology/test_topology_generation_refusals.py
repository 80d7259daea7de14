"""Arguments that parallel generation refuses, each with a one-line error that names it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
)

from hf_efficient.errors import HFEError, UsageError
from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.generation import generation_topology
from hf_efficient.modeling.topology.generation.branches import BranchPath
from hf_efficient.modeling.topology.generation.generation_topology import parallel_generate

EOS = 1
BLOCK = "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
INNER = "<Parallel><Goal><Outline>2.1: c</Outline><Outline>2.2: d</Outline></Goal>"
PATHS: dict[str, BranchPath] = {"": (), "1": ((0, "1"),), "2": ((0, "2"),), "2.1": ((0, "2"), (0, "2.1"))}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"past_key_values": DynamicCache()}, "past_key_values"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [5]}, "prefix_allowed_tokens_fn"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"cache_implementation": "offloaded"}, "cache_implementation"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_logits": True}, "output_logits"),
        ({"use_cache": False}, "use_cache"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"position_ids": torch.arange(3)[None]}, "position_ids"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds"),
        ({"encoder_repetition_penalty": 1.5}, "encoder_repetition_penalty"),
        ({"budget": "words"}, "budget"),
        ({"max_branches": 0}, "max_branches"),
        ({"mode": "tree"}, "mode"),
        ({"grammar": "prose"}, "grammar"),
    ],
)
def test_what_branches_cannot_have_is_refused_by_name(generate: Callable, options: dict[str, Any], name: str) -> None:
    with pytest.raises(UsageError, match=name):
        generate("Que", **options)


def test_an_assistant_is_refused(generate: Callable, model: Any) -> None:
    with pytest.raises(UsageError, match="assistant_model"):
        generate("Q", assistant_model=model)


def test_unknown_arguments_are_refused_by_transformers(generate: Callable) -> None:
    with pytest.raises(ValueError, match="colour"):
        generate("Q", colour="red")


def test_prompts_padded_on_the_right_are_refused(generate: Callable, tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer.encode("QQ"), [*tokenizer.encode("R"), 0]])
    with pytest.raises(TopologyError, match="left"):
        generate(ids, attention_mask=torch.tensor([[1, 1], [1, 0]]))


def test_options_of_branches_mean_nothing_to_plain_generation(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="seed"):
        model.generate(torch.tensor([[20]]), seed=3, max_new_tokens=3)


def test_a_model_without_a_tokenizer_says_so(model: Any) -> None:
    with pytest.raises(UsageError, match="tokenizer="):
        model.generate(torch.tensor([[20]]), parallel=True, max_new_tokens=3)


def test_the_tokenizer_of_the_weights_is_loaded_once(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    class Reader:
        @staticmethod
        def from_pretrained(folder: str, **_: Any) -> Any:
            read.append(folder)
            return tokenizer

    monkeypatch.setattr(generation_topology, "AutoTokenizer", Reader)
    loaded = copy.deepcopy(model)
    for folder in ("here", "here", "there"):
        loaded.config._name_or_path = folder
        loaded.generate(torch.tensor([[20]]), parallel=True, max_new_tokens=3)
    assert read == ["here", "there"]


def test_a_tokenizer_of_another_vocabulary_is_refused(model: Any, tokenizer: Any, toy_tokenizer: Callable) -> None:
    shifted = copy.deepcopy(tokenizer)
    swap = {"<Path>": shifted.token_ids["</Path>"], "</Path>": shifted.token_ids["<Path>"]}
    shifted.vocabulary.token_ids.update(swap)
    with pytest.raises(TopologyError, match="<Path>"):
        model.generate(torch.tensor([[20]]), parallel=True, tokenizer=shifted, max_new_tokens=3)


def test_a_configuration_without_control_tokens_says_so(model: Any, tokenizer: Any) -> None:
    bare = copy.deepcopy(model)
    bare.config.topology = bare.config.topology | {"token_ids": {}}
    with pytest.raises(TopologyError, match="token_ids"):
        bare.generate(torch.tensor([[20]]), parallel=True, tokenizer=tokenizer, max_new_tokens=3)


@pytest.fixture(scope="module")
def stock() -> Any:
    config = LlamaConfig(
        vocab_size=150, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def test_a_stock_model_needs_a_grammar(stock: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="grammar="):
        parallel_generate(stock, torch.tensor([[20]]), tokenizer=tokenizer, max_new_tokens=3)


def test_an_attention_without_masks_is_refused(stock: Any, tokenizer: Any) -> None:
    other = copy.deepcopy(stock)
    other.config._attn_implementation_internal = "flash_attention_2"
    ids = torch.tensor([tokenizer.encode(f"{BLOCK}")])
    with pytest.raises(HFEError, match="flash_attention_2"):
        parallel_generate(other, ids, tokenizer=tokenizer, grammar="multiverse", max_new_tokens=50)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MistralConfig(sliding_window=8), "sliding_window=8"),
        (Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1), "sliding_window=8"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "'dynamic'"),
    ],
    ids=["mistral", "qwen2", "dynamic"],
)
def test_a_stock_model_whose_attention_depends_on_more_is_refused(config: Any, words: str, tokenizer: Any) -> None:
    """A mask of every pair takes the place of its windows; frequencies that change do not fit the keys in the cache."""
    shape = {"vocab_size": 150, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    for name, value in (shape | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}).items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids = torch.tensor([tokenizer.encode(f"Q{BLOCK}")])
    with pytest.raises(HFEError, match=words):
        parallel_generate(model, ids, tokenizer=tokenizer, grammar="multiverse", max_new_tokens=50)


def test_flex_attention_cannot_generate_in_parallel(model: Any, tokenizer: Any) -> None:
    """On a CPU its kernel for few queries writes beside its memory."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("flex_attention")
    with pytest.raises(HFEError, match="flex_attention"):
        other.generate(torch.tensor([[20]]), parallel=True, tokenizer=tokenizer, max_new_tokens=3)


def test_training_with_checkpoints_fills_no_cache(model: Any, tokenizer: Any) -> None:
    other = copy.deepcopy(model).train()
    other.gradient_checkpointing_enable()
    ids = torch.tensor([tokenizer.encode(f"Q{BLOCK}")])
    with pytest.raises(HFEError, match=r"model\.eval"):
        other.generate(ids, parallel=True, tokenizer=tokenizer, max_new_tokens=50)


@pytest.mark.parametrize("name", ["max_branches", "max_depth", "min_fork_budget", "branch_max_new_tokens"])
@pytest.mark.parametrize("value", ["3", 2.5, True])
def test_limits_are_integers(generate: Callable, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        generate(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("constrain", "yes"), ("parallel", "no"), ("seed", "x"), ("seed", 1.5), ("tokenizer", "folder"), ("tokenizer", 3)],
)
def test_options_of_another_type_are_refused(generate: Callable, model: Any, name: str, value: Any) -> None:
    call = model.generate if name == "tokenizer" else generate
    given = {"inputs": torch.tensor([[20]]), "parallel": True} if name == "tokenizer" else {}
    with pytest.raises(UsageError, match=f"{name}={value!r}"):
        call(**given, **{name: value})


@pytest.mark.parametrize("separator", ["and", "<Path>", 3])
def test_a_separator_is_white_space(generate: Callable, separator: Any) -> None:
    with pytest.raises(UsageError, match="separator"):
        generate(separator=separator)


def test_an_embedding_without_rows_for_the_tags_is_refused(tokenizer: Any) -> None:
    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(TopologyError, match="10 rows"):
        parallel_generate(small, torch.tensor([[4]]), tokenizer=tokenizer, grammar="multiverse", max_new_tokens=3)
