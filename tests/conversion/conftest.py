"""Tiny stock checkpoints of every family, and a patch that computes its tensors from nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from hf_efficient.conversion.patch import NewTensor, TensorChanges
from tiny_shapes import SPECIAL_TOKENS, TINY

SHAPE: dict[str, Any] = TINY | SPECIAL_TOKENS | {"initializer_range": 0.2}
STOCK_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama-biases": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True, hidden_act="gelu", rms_norm_eps=1e-5),
    "llama-rope": lambda: LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}, head_dim=12
    ),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**SHAPE, sliding_window=5, head_dim=12),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen2-window": lambda: Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "qwen3-biases": lambda: Qwen3Config(**SHAPE, head_dim=16, attention_bias=True, tie_word_embeddings=True),
}


def random_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A stock model whose every parameter is random: fresh norms of one and biases of zero would hide a mix-up."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name else 0.0
            parameter.copy_(offset + 0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def stock_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`stock_folder(name, dtype, max_shard_size)`: a saved tiny checkpoint; made once, so it must not be changed."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(name: str = "llama", dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Path:
        key = (name, dtype, max_shard_size)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            random_model(STOCK_CONFIGS[name](), dtype).save_pretrained(made[key], max_shard_size=max_shard_size)
        return made[key]

    return make


@pytest.fixture(params=STOCK_CONFIGS)
def stock_name(request: pytest.FixtureRequest) -> str:
    """Every stock checkpoint in turn."""
    return request.param


@pytest.fixture
def ids() -> Tensor:
    """A little text for the tiny models."""
    return torch.randint(SHAPE["vocab_size"], (2, 17))


@pytest.fixture(scope="session")
def folder_hashes() -> Callable[[Path], dict[str, str]]:
    """SHA-256 of every file of a folder but the report and the card, which hold wall times."""

    def hashes(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in ("conversion_report.json", "README.md")
        }

    return hashes


@dataclass
class RandomTables:
    """Stands in for STEM: same tensors, but the rows are random, so that it needs no text.

    `before` is called with the name of each tensor before that one is made.
    """

    name: ClassVar[str] = "stem"
    needs_calibration: ClassVar[bool] = False
    measures_choice: ClassVar[bool] = False

    layers: list[int] = field(default_factory=lambda: [1, 2])

    def __post_init__(self) -> None:
        self.before: Callable[[str], None] = lambda name: None
        self.made: list[str] = []
        self.choices = 0

    def check(self, config: Any) -> None:
        pass

    def choose(self, config: Any, calibration: Any) -> dict[str, Any]:
        self.choices += 1
        return {"stem_layers": self.layers}

    def changes(self, config: Any, dtype: torch.dtype) -> TensorChanges:
        shape = (config.vocab_size, config.intermediate_size)
        added = {_table(i): NewTensor(shape, dtype, "random") for i in self.layers}
        return TensorChanges(added, [f"model.layers.{i}.mlp.up_proj.weight" for i in self.layers])

    def tensors(self, config: Any, calibration: Any) -> Iterator[tuple[str, Tensor]]:
        for index in self.layers:
            self.before(_table(index))
            self.made.append(_table(index))
            generator = torch.Generator().manual_seed(index)
            yield _table(index), torch.randn(config.vocab_size, config.intermediate_size, generator=generator)

    def report(self) -> dict[str, Any]:
        return {"tables": len(self.made)}


def _table(index: int) -> str:
    return f"model.layers.{index}.mlp.stem_embed.weight"


@pytest.fixture
def tables() -> RandomTables:
    """A patch that needs no text."""
    return RandomTables()
