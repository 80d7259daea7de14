"""Tiny STEM models, and a tokenizer with one token for each word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_efficient.modeling.stem.modeling_stem import StemConfig, StemForCausalLM
from tiny_shapes import SPECIAL_TOKENS, TINY

SHAPE: dict[str, Any] = TINY | SPECIAL_TOKENS | {"rms_norm_eps": 1e-5}
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "the", "capital", "of", "is", "spain", "germany", "united", "states"]
WORDS += ["america", "czech", "republic", "and", "isle", "man"]
IDS = {word: i for i, word in enumerate(WORDS)}


def _tiny_stem(**fields: Any) -> PreTrainedModel:
    model = StemForCausalLM(StemConfig(**(SHAPE | {"stem_layers": [1, 2]} | fields)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model.eval()


def _make_tokenizer(**special: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"} | special
    given = {name: token for name, token in names.items() if token}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **given)


@pytest.fixture(scope="session")
def tiny_stem() -> Callable[..., PreTrainedModel]:
    """Makes a STEM model with tables in layers 1 and 2, in evaluation mode, with fields changed."""
    return _tiny_stem


@pytest.fixture(scope="session")
def token_ids() -> Callable[[int, int], Tensor]:
    """Makes ids [batch, length] without the special ones."""
    return lambda *shape: torch.randint(3, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes the tokenizer of the words above, with special tokens changed or left out."""
    return _make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return _make_tokenizer()


@pytest.fixture(scope="session")
def ids_of() -> Callable[[str], tuple[int, ...]]:
    """Gives the ids of words."""
    return lambda text: tuple(IDS[word] for word in text.split())
