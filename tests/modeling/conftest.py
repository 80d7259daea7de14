"""Tiny models of every stock family and of every registered architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
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

from example_inputs import example_inputs
from hf_efficient.conversion.architecture import ArchitectureSpec, load
from hf_efficient.conversion.families.decoder import decoder_config
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import EfficientDecoderForCausalLM
from hf_efficient.modeling.topology.grammar.control_tokens import MEDVERSE, MULTIVERSE
from hf_efficient.registry import ARCHITECTURES, architecture_of
from tiny_shapes import SPECIAL_TOKENS, TINY

# The wide initial weights keep greedy choices of a random model far from ties.
SHAPE: dict[str, Any] = TINY | SPECIAL_TOKENS | {"initializer_range": 0.2, "rms_norm_eps": 1e-5}

# Two fields that differ between the families are set against their defaults, so that ignoring one shows.
STOCK_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True, hidden_act="gelu"),
    "mistral-window": lambda: MistralConfig(**SHAPE, head_dim=12, sliding_window=5),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen2-tied": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "qwen3-window": lambda: Qwen3Config(
        **SHAPE, head_dim=16, use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True
    ),
}


@dataclass(frozen=True)
class Parts:
    """Names of the parts of a family's models that tests look at.

    Attributes:
        base: attribute that holds the model without its head.
        embedding: module or parameter: the token embedding, or that of positions.
        linear, norm: modules: a linear layer, of the attention if it has the configured deviation, and the last norm.
        removable: a tensor of 1,536 elements that begins with the configured deviation, in a layer if there is such.
        head: module that gives the logits of the last hidden state; None if something lies between the two.
        tied: tensor that is not stored when the embeddings are tied; None without such a one.
        attentions: whether the attention weights can be returned.
        lora: target modules of an adapter.
        whole, offloaded: modules that stay on the CPU, and that a test puts on disk.
    """

    base: str
    embedding: str
    linear: str
    norm: str
    removable: str
    head: str | None
    tied: str | None
    lora: tuple[str, ...]
    whole: tuple[str, ...]
    offloaded: tuple[str, ...]
    attentions: bool = True


# Name of a family, or model type of an architecture whose parts have other names than the family's -> parts.
PARTS: dict[str, Parts] = {
    "causal decoders": Parts(
        base="model",
        embedding="model.embed_tokens",
        linear="model.layers.0.self_attn.q_proj",
        norm="model.norm",
        removable="model.layers.1.mlp.gate_proj.weight",
        head="lm_head",
        tied="lm_head.weight",
        lora=("q_proj", "v_proj", "gate_proj", "down_proj"),
        whole=("model.layers.0", "model.embed_tokens", "model.norm", "model.rotary_emb"),
        offloaded=("model.layers.1", "model.layers.2", "lm_head"),
    ),
    "bidirectional encoders": Parts(
        base="bert",
        embedding="bert.embeddings.word_embeddings",
        linear="bert.encoder.layer.0.attention.self.query",
        norm="bert.encoder.layer.2.output.LayerNorm",
        removable="bert.encoder.layer.1.intermediate.dense.weight",
        head="cls",
        tied="cls.predictions.decoder.weight",
        lora=("query", "value", "intermediate.dense"),
        whole=("bert.embeddings", "bert.encoder.layer.0", "cls"),
        offloaded=("bert.encoder.layer.1", "bert.encoder.layer.2"),
    ),
    "hfe_monarch_roberta": Parts(
        base="roberta",
        embedding="roberta.embeddings.word_embeddings",
        linear="roberta.encoder.layer.0.attention.self.query",
        norm="roberta.encoder.layer.2.output.LayerNorm",
        removable="roberta.encoder.layer.1.intermediate.dense.weight",
        head="lm_head",
        tied="lm_head.decoder.weight",
        lora=("query", "value", "intermediate.dense"),
        whole=("roberta.embeddings", "roberta.encoder.layer.0", "lm_head"),
        offloaded=("roberta.encoder.layer.1", "roberta.encoder.layer.2"),
    ),
    "image encoders": Parts(
        base="vit",
        embedding="vit.embeddings.position_embeddings",
        linear="vit.layers.0.attention.q_proj",
        norm="vit.layernorm",
        removable="vit.layers.1.mlp.fc1.weight",
        head=None,
        tied=None,
        lora=("q_proj", "v_proj", "mlp.fc1"),
        whole=("vit.embeddings", "vit.layers.0", "vit.layernorm", "classifier"),
        offloaded=("vit.layers.1", "vit.layers.2"),
    ),
    # Layers other than these begin as Xavier has it.
    "video transformers": Parts(
        base="",
        embedding="text_embedding.0.weight",
        linear="text_embedding.2",
        norm="blocks.2.norm3",
        removable="text_embedding.0.weight",
        head=None,
        tied=None,
        lora=("self_attn.q", "self_attn.v", "ffn.0"),
        whole=("patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks.0", "head"),
        offloaded=("blocks.1", "blocks.2"),
        attentions=False,
    ),
}

# Dropout would make training steps differ.
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIDEO = {"text_dim": 48, "text_len": 6, "freq_dim": 16, "in_channels": 4, "out_channels": 4}
# One line for each architecture: what its tiny model needs beyond SHAPE. A line `MODEL_TYPE+NAME` is another tiny model
# of it, which the tests of every architecture take too.
ARCHITECTURE_FIELDS: dict[str, dict[str, Any]] = {
    "hfe_decoder": {"qk_norm": True, "head_dim": 12},
    "hfe_stem": {"stem_layers": [0, 2]},
    "hfe_bhyt": {
        "bhyt_layers": [0, 2],
        "bhyt_exact_layers": [2],
        "bhyt_seq_len": 16,
        "bhyt_final": "bhyt",
        "bhyt_output_scale": True,
    },
    "hfe_multiverse": {"topology": {"token_ids": {tag: 40 + i for i, tag in enumerate(MULTIVERSE)}}},
    "hfe_medverse": {"topology": {"token_ids": {tag: 40 + i for i, tag in enumerate(MEDVERSE)}, "mode": "layers"}},
    "hfe_monarch_bert": NO_DROPOUT,
    "hfe_monarch_roberta": NO_DROPOUT,
    "hfe_monarch_vit": {"image_size": 16, "patch_size": 4, "num_labels": 5},
    "hfe_monarch_bert+monarch": NO_DROPOUT | {"monarch": {"block_size": 2}},
    "hfe_monarch_roberta+monarch": NO_DROPOUT | {"monarch": {"block_size": 3, "num_iters": 2, "pad_queries": "mean"}},
    "hfe_monarch_vit+monarch": {
        **{"image_size": 16, "patch_size": 4, "num_labels": 5},
        "monarch": {"block_size": 4, "pad": "pre", "layers": [0, 2]},
    },
    "hfe_monarch_wan": VIDEO,
    "hfe_monarch_wan+monarch": VIDEO | {"monarch": {"h_reduce": 2}},
    "hfe_monarch_wan+causal": VIDEO | {"monarch": {"h_reduce": 2}, "variant": "causal", "num_frames_per_block": 1},
}


def _architecture(variant: str) -> ArchitectureSpec:
    """The architecture of a line of `ARCHITECTURE_FIELDS`."""
    architecture = architecture_of(variant.partition("+")[0])
    assert architecture is not None
    return architecture


def _variants(*, tokens: bool = False) -> list[str]:
    """The lines of every architecture, with `tokens` only of those whose models take token ids.

    An architecture without a line is listed too, so that its tests fail.
    """
    found = []
    for architecture in ARCHITECTURES:
        lines = [line for line in ARCHITECTURE_FIELDS if line.partition("+")[0] == architecture.model_type]
        if not tokens or hasattr(architecture.config_class(), "vocab_size"):
            found += lines or [architecture.model_type]
    return found


def _randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Fill every parameter, biases and norms too, from a fixed seed, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            scale = name.endswith("weight") and "norm" in name.lower()
            parameter.copy_(1 + noise if scale or "norm" in name else noise)
    return model.eval()


def _stock_and_ours(name: str, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    stock_config = STOCK_CONFIGS[name]()
    for field, value in changes.items():
        setattr(stock_config, field, value)
    stock = _randomise(AutoModelForCausalLM.from_config(stock_config))
    ours = EfficientDecoderForCausalLM(decoder_config(stock_config)).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def _tiny_config(variant: str, **fields: Any) -> PreTrainedConfig:
    config_class = _architecture(variant).config_class
    known = {field.name for field in dataclasses.fields(config_class)}
    shape = {name: value for name, value in SHAPE.items() if name in known}
    return config_class(**(shape | ARCHITECTURE_FIELDS[variant] | fields))


def _tiny_model(variant: str, **fields: Any) -> PreTrainedModel:
    return _randomise(_auto_class(variant).from_config(_tiny_config(variant, **fields)))


def _auto_class(variant: str) -> Any:
    """The Auto class of an architecture's main head."""
    return getattr(transformers, _architecture(variant).main_auto_class)


def _token_ids(batch: int, length: int, vocab_size: int = SHAPE["vocab_size"]) -> Tensor:
    return torch.randint(3, vocab_size, (batch, length), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=STOCK_CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    """Every stock family in turn."""
    return request.param


@pytest.fixture(params=[a.model_type for a in ARCHITECTURES if "AutoModelForCausalLM" in a.auto_classes])
def model_type(request: pytest.FixtureRequest) -> str:
    """Every registered causal language model in turn."""
    return request.param


@pytest.fixture(params=_variants())
def any_model_type(request: pytest.FixtureRequest) -> str:
    """Every registered architecture in turn, and each further line of `ARCHITECTURE_FIELDS`."""
    return request.param


@pytest.fixture(params=_variants(tokens=True))
def text_model_type(request: pytest.FixtureRequest) -> str:
    """As `any_model_type`, but only those whose models take token ids."""
    return request.param


@pytest.fixture
def variant(request: pytest.FixtureRequest) -> str:
    """The line of `ARCHITECTURE_FIELDS` that the test runs with, whichever of the fixtures above gives it."""
    names = [name for name in ("any_model_type", "text_model_type", "model_type") if name in request.fixturenames]
    return request.getfixturevalue(names[0])


@pytest.fixture
def architecture(variant: str) -> ArchitectureSpec:
    """The architecture of the test's model."""
    return _architecture(variant)


@pytest.fixture
def parts(architecture: ArchitectureSpec) -> Parts:
    """Names of the parts of the architecture's models."""
    return PARTS.get(architecture.model_type) or PARTS[load(architecture.family).name]


@pytest.fixture
def inputs(architecture: ArchitectureSpec) -> dict[str, Tensor]:
    """Two inputs of the architecture's models: token ids [2, 9], images, or latents of videos."""
    return example_inputs(_tiny_config(architecture.model_type))


@pytest.fixture
def labels(inputs: dict[str, Tensor]) -> Tensor | None:
    """What the main head is trained to give for `inputs`; None for a model that computes no loss."""
    if "pixel_values" in inputs:
        return torch.tensor([1, 4])
    return inputs.get("input_ids")


@pytest.fixture
def auto_class(variant: str) -> Any:
    """The Auto class of the architecture's main head."""
    return _auto_class(variant)


@pytest.fixture(scope="session")
def stock_and_ours() -> Callable[..., tuple[PreTrainedModel, PreTrainedModel]]:
    """Makes a stock model in evaluation mode, and our decoder with the same tensors under the same names."""
    return _stock_and_ours


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., PreTrainedConfig]:
    """Makes the configuration of a registered architecture's tiny model, with fields changed."""
    return _tiny_config


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Makes the tiny model of a registered architecture, in evaluation mode, with fields changed."""
    return _tiny_model


@pytest.fixture(scope="session")
def token_ids() -> Callable[..., Tensor]:
    """Makes ids [batch, length] without the special ones."""
    return _token_ids
