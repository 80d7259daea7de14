"""Plans of knowledge edits: how the lengths of two entities are matched, and what a plan refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_efficient import stem_edit_plan
from hf_efficient.errors import HFEError

PROMPT = "the capital of spain is"


@pytest.mark.parametrize(
    ("source", "target", "mode", "expected", "resolved"),
    [
        ("spain", "germany", "auto", ["germany"], "one_to_one"),
        ("czech republic", "united states", "one_to_one", ["united", "states"], "one_to_one"),
        ("united states of america", "czech republic", "left_pad", ["<pad>", "<pad>", "czech", "republic"], "left_pad"),
        ("czech republic", "united states of america", "left_pad", ["of", "america"], "left_pad"),
        (
            "united states of america",
            "czech republic",
            "right_pad",
            ["czech", "republic", "<pad>", "<pad>"],
            "right_pad",
        ),
        ("czech republic", "united states of america", "right_pad", ["united", "states"], "right_pad"),
        ("united states of america", "isle of man", "copy", ["isle", "of", "man", "isle"], "copy"),
        ("czech republic", "isle of man", "copy", ["isle", "of"], "copy"),
        ("isle of man", "spain", "average", ["spain"] * 3, "average"),
        ("spain", "isle of man", "auto", ["isle of man"], "average"),
        ("isle of man", "czech republic", "auto", ["czech republic"] * 3, "average"),
    ],
)
def test_modes_match_lengths(
    tokenizer: Any, ids_of: Callable, source: str, target: str, mode: str, expected: list[str], resolved: str
) -> None:
    prompt = f"the capital of {source} is"
    plan = stem_edit_plan(tokenizer, prompt, source, target, mode)
    assert plan.replacements == tuple(ids_of(words) for words in expected)
    assert plan.mode == resolved
    assert plan.source_ids == ids_of(source) and plan.target_ids == ids_of(target)
    assert plan.positions == tuple(range(4, 4 + len(plan.source_ids)))  # after <s> the capital of


def test_subset_keeps_named_or_rare_tokens_in_their_order(tokenizer: Any, ids_of: Callable) -> None:
    arguments = (tokenizer, "the capital of czech republic is", "czech republic", "united states of america", "subset")
    assert stem_edit_plan(*arguments, keep=[3, 1]).replacements == tuple((t,) for t in ids_of("states america"))
    counts = dict(zip(ids_of("united states of america"), (2, 9, 100, 1), strict=True))
    rare = tuple((t,) for t in ids_of("united america"))
    assert stem_edit_plan(*arguments, counts=counts).replacements == rare
    assert stem_edit_plan(*arguments, counts=torch.tensor([counts.get(i, 0) for i in range(97)])).replacements == rare


def test_entity_is_the_last_occurrence(tokenizer: Any) -> None:
    plan = stem_edit_plan(tokenizer, "spain and germany and spain is", "spain", "germany")
    assert plan.positions == (5,)


def test_a_space_belongs_to_the_token_where_the_tokenizer_has_it_so() -> None:
    """Byte-level BPE: the entity's tokens in a sentence are not those of the entity alone."""
    vocabulary = {
        token: i for i, token in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠS", "ĠG", "pa"])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "S"), ("Ġ", "G"), ("p", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    plan = stem_edit_plan(fast, "in Spa we", "Spa", "Gp")
    assert fast.convert_ids_to_tokens(plan.source_ids) == ["ĠS", "pa"]
    assert fast.convert_ids_to_tokens(plan.target_ids) == ["ĠG", "p"]


@pytest.mark.parametrize(
    ("special", "expected"), [({"pad_token": None}, 2), ({"pad_token": None, "eos_token": None}, 1)]
)
def test_padding_falls_back_to_eos_then_bos(
    make_tokenizer: Callable, special: dict, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_efficient"):
        plan = stem_edit_plan(make_tokenizer(**special), "the isle of man", "isle of man", "spain", "left_pad")
    assert plan.replacements == ((expected,), (expected,), (8,))
    assert ("BOS" in caplog.text) == (expected == 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "france"}, "'france' is not in the prompt 'the capital of spain is'"),
        ({"source": ""}, "neither may be empty"),
        ({"target": ""}, "neither may be empty"),
        ({"target": "isle of man", "mode": "one_to_one"}, r"the source has 1 tokens \[8\], the target 3 \[16, 6, 17\]"),
        ({"mode": "median"}, "mode='median' is unknown.*one_to_one"),
        ({"target": "atlantis"}, r"'atlantis' has tokens \[3\], where 3 is the unknown token"),
        ({"mode": "subset", "target": "isle of man"}, "either keep or counts"),
        ({"mode": "subset", "target": "isle of man", "keep": [0], "counts": {}}, "either keep or counts"),
        ({"mode": "subset", "target": "isle of man", "keep": [3]}, r"keep=\[3\] must be 1 different indices of 0..2"),
        ({"mode": "subset", "target": "isle of man", "keep": [0, 1]}, r"keep=\[0, 1\] must be 1"),
        (
            {"mode": "subset", "target": "isle of man", "counts": [1, 2]},
            "counts has 2 entries, the target has token 16",
        ),
        ({"mode": "subset", "source": "capital of", "keep": [0]}, "at least as long.*it has 1 tokens, the source 2"),
        ({"mode": "copy", "keep": [0]}, "mode='copy' supports neither keep nor counts"),
        ({"source": "pain"}, "the token 'spain' contains more than the entity 'pain'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tokenizer: Any, changes: dict[str, Any], message: str) -> None:
    arguments = {"prompt": PROMPT, "source": "spain", "target": "germany"} | changes
    with pytest.raises(HFEError, match=message):
        stem_edit_plan(tokenizer, **arguments)


def test_padding_needs_a_token_to_pad_with(make_tokenizer: Callable) -> None:
    bare = make_tokenizer(pad_token=None, eos_token=None, bos_token=None)
    with pytest.raises(HFEError, match="no pad, EOS or BOS token"):
        stem_edit_plan(bare, "the isle of man", "isle of man", "spain", "right_pad")


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(HFEError, match="object gives no character offsets"):
        stem_edit_plan(object(), PROMPT, "spain", "germany")
