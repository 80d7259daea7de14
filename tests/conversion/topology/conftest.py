"""Tiny stock checkpoints with a tokenizer that knows words, as those that are converted do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

# `Path` is one token and `Conclusion` several, as in real vocabularies.
WORDS = ("Path", "Plan", "Think", "Step", "the", "one")
SPECIAL = ("<unk>", "<s>", "</s>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and a few words that are one token each."""
    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for length in range(2, len(word) + 1):
            if word[:length] not in vocabulary:
                vocabulary.append(word[:length])
                merges.append((word[: length - 1], word[length - 1]))
    model = models.BPE(vocab={token: number for number, token in enumerate(vocabulary)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    )


VOCABULARY = len(word_tokenizer())
SHAPE: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
    **{"initializer_range": 0.2, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
}
LONGER = {**SHAPE, "vocab_size": VOCABULARY + 100}
STOCK: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama-tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    # As Qwen's are, the matrix is longer than the tokenizer.
    "qwen2": lambda: Qwen2Config(**LONGER),
    "qwen3-tied": lambda: Qwen3Config(**LONGER, head_dim=16, tie_word_embeddings=True),
    "mistral-window": lambda: MistralConfig(**SHAPE, sliding_window=64),
    "llama-dynamic": lambda: LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
}


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`stock(name, dtype)`: a saved tiny checkpoint with its tokenizer; made once, so it must not be changed."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(STOCK[name]()).to(dtype).save_pretrained(folder)
            word_tokenizer().save_pretrained(folder)
            made[name, dtype] = folder
        return made[name, dtype]

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little text to calibrate on and to measure."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    sentences = [f"{number} times {number} is {number * number}, the one Path of all." for number in range(300)]
    path.write_text("\n\n".join(" ".join(sentences[i : i + 8]) for i in range(0, 300, 8)))
    return path
