"""Tiny stock models whose weights lie in memory, as sources of a STEM conversion."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_efficient.conversion.families.decoder import decoder_config
from hf_efficient.conversion.measuring.calibration import Calibration
from hf_efficient.conversion.stem.patch import Stem
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import EfficientDecoderConfig

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-biased": (LlamaConfig, LlamaForCausalLM, {"mlp_bias": True, "tie_word_embeddings": True}),
    "mistral-windowed": (MistralConfig, MistralForCausalLM, {"sliding_window": 5}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


class MemoryReader:
    """A `TensorReader` over tensors in memory; it remembers what was read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.whole: list[str] = []
        self.rows: dict[str, int] = {}

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        self.whole.append(name)
        return self.tensors[name].clone()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        self.rows[name] = self.rows.get(name, 0) + stop - start
        return self.tensors[name][start:stop].clone()


@dataclass
class TinySource:
    """A stock model, and the same model as a source of a conversion."""

    stock: PreTrainedModel
    config: EfficientDecoderConfig
    reader: MemoryReader

    def calibration(self, fit: Tensor, held_out: Tensor | None = None, probe: Tensor | None = None) -> Calibration:
        held_out = fit if held_out is None else held_out
        return Calibration(self.config, self.reader, fit, held_out if probe is None else probe, held_out)

    def convert(self, patch: Stem, calibration: Calibration) -> TinySource:
        """The patched checkpoint; `stock` is still the source's model."""
        patch.check(self.config)
        config = copy.deepcopy(self.config)
        for name, value in patch.choose(self.config, calibration).items():
            setattr(config, name, value)
        changes = patch.changes(config, torch.float32)
        tensors = {name: t for name, t in self.reader.tensors.items() if name not in changes.dropped}
        tensors.update(patch.tensors(config, calibration))
        assert {name: tuple(tensors[name].shape) for name in changes.added} == {
            name: new.shape for name, new in changes.added.items()
        }
        return TinySource(self.stock, config, MemoryReader(tensors))


@pytest.fixture
def tiny_source() -> Callable[..., TinySource]:
    """Maker of a random stock model of a family; further arguments go to its configuration."""

    def make(family: str = "llama", **changes: Any) -> TinySource:
        config_class, model_class, own = FAMILIES[family]
        stock = model_class(config_class(**{**SIZES, **own, **changes})).eval()
        with torch.no_grad():
            for name, parameter in stock.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
        tensors = {name: t for name, t in stock.state_dict().items() if name != "lm_head.weight" or not tied(stock)}
        return TinySource(stock, decoder_config(stock.config), MemoryReader(tensors))

    return make


def tied(stock: PreTrainedModel) -> bool:
    return bool(stock.config.tie_word_embeddings)


@pytest.fixture(params=list(FAMILIES))
def source(request: pytest.FixtureRequest, tiny_source: Callable[..., TinySource]) -> TinySource:
    """A random stock model of each family."""
    return tiny_source(request.param)


@pytest.fixture
def distinct_text() -> Tensor:
    """One sequence in which every token occurs once [1, 60]."""
    return torch.randperm(VOCABULARY)[:60][None]


@pytest.fixture
def text() -> Tensor:
    """Sequences in which tokens repeat [6, 32], of the lower half of the vocabulary."""
    return torch.randint(VOCABULARY // 2, (6, 32))
