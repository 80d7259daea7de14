"""Tiny stock models of every kind that Monarch attention runs in, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT_SIZES = SIZES | {"vocab_size": 99, "max_position_embeddings": 80}
IMAGE_SIZES = SIZES | {"image_size": 24, "patch_size": 4}
BART_SIZES = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48},
    **{"decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 99, "max_position_embeddings": 80},
}
WHISPER_SIZES = BART_SIZES | {
    **{"max_source_positions": 40, "max_target_positions": 40, "num_mel_bins": 8, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
DISTILBERT_SIZES = {
    **{"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99, "max_position_embeddings": 80},
}
MODERNBERT_FIELDS = {
    **{"num_hidden_layers": 4, "global_attn_every_n_layers": 2, "local_attention": 8, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
}
DINO_SIZES = {name: value for name, value in IMAGE_SIZES.items() if name != "intermediate_size"}
# Name -> (class of the model, fields of its configuration).
TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", TEXT_SIZES),
    "roberta": ("RobertaModel", TEXT_SIZES),
    "electra": ("ElectraModel", TEXT_SIZES | {"embedding_size": 32}),
    "xlm-roberta": ("XLMRobertaModel", TEXT_SIZES),
    "esm": ("EsmModel", TEXT_SIZES | {"pad_token_id": 1, "mask_token_id": 2, "token_dropout": False}),
    "esm-rotary": (
        "EsmModel",
        TEXT_SIZES
        | {"pad_token_id": 1, "mask_token_id": 2, "token_dropout": False, "position_embedding_type": "rotary"},
    ),
    "distilbert": ("DistilBertModel", DISTILBERT_SIZES),
    "modernbert": ("ModernBertModel", TEXT_SIZES | MODERNBERT_FIELDS),
}
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTModel", IMAGE_SIZES),
    "deit": ("DeiTModel", IMAGE_SIZES),
    "beit": ("BeitModel", IMAGE_SIZES),
    "ijepa": ("IJepaModel", IMAGE_SIZES),
    "dinov2": ("Dinov2Model", DINO_SIZES),
    "dinov2-registers": ("Dinov2WithRegistersModel", DINO_SIZES),
    "dinov3": ("DINOv3ViTModel", IMAGE_SIZES),
    "clip": ("CLIPVisionModel", IMAGE_SIZES),
    "siglip": ("SiglipVisionModel", IMAGE_SIZES),
    "videomae": ("VideoMAEModel", IMAGE_SIZES | {"num_frames": 4}),
}
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("BartModel", BART_SIZES),
    "mbart": ("MBartModel", BART_SIZES),
    "whisper": ("WhisperModel", WHISPER_SIZES),
}
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaModel", TEXT_SIZES),
    "gpt2": ("GPT2Model", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}),
    "clip-text": ("CLIPTextModel", TEXT_SIZES),
    "bert-decoder": ("BertModel", TEXT_SIZES | {"is_decoder": True}),
}
ALL = (
    TEXT
    | IMAGES
    | PAIRS
    | CAUSAL
    | {
        "t5": (
            "T5EncoderModel",
            {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
        ),
        "beit-bias": ("BeitModel", IMAGE_SIZES | {"use_relative_position_bias": True}),
        "mpnet": ("MPNetModel", TEXT_SIZES),
    }
)


def _stock_model(name: str, attention: str = "sdpa", **fields: Any) -> PreTrainedModel:
    class_name, values = ALL[name]
    cls = getattr(transformers, class_name)
    config = cls.config_class(**(values | fields))
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():  # wide weights, so that attention matters in the output
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _stock_inputs(name: str, tokens: int = 41) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    if name == "videomae":
        return {"pixel_values": torch.randn(2, 4, 3, 24, 24, generator=generator)}
    if name in IMAGES or name == "beit-bias":
        return {"pixel_values": torch.randn(2, 3, 24, 24, generator=generator)}
    ids = torch.randint(3, 90, (2, tokens), generator=generator)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 80, generator=generator), "decoder_input_ids": ids[:, :9]}
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :9]} if name in PAIRS else {})


@pytest.fixture(scope="session")
def stock_model() -> Callable[..., PreTrainedModel]:
    """Makes a stock model in evaluation mode, of a name above, with an attention implementation and changed fields."""
    return _stock_model


@pytest.fixture(scope="session")
def stock_inputs() -> Callable[..., dict[str, Tensor]]:
    """Makes inputs for a stock model of a name above, two rows without padding."""
    return _stock_inputs


# DistilBERT takes no `position_ids`, so its embeddings depend on padding in front.
@pytest.fixture(params=[(name, side) for name in TEXT for side in ("right", "left") if name + side != "distilbertleft"])
def padded(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Every text encoder in turn with each side on which its batches can be padded."""
    return request.param


@pytest.fixture(params=[*TEXT, *IMAGES])
def encoder(request: pytest.FixtureRequest) -> str:
    """Every encoder in turn."""
    return request.param


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> str:
    """Every encoder-decoder model in turn."""
    return request.param


@pytest.fixture(params=CAUSAL)
def causal_model(request: pytest.FixtureRequest) -> str:
    """Every causal model in turn."""
    return request.param
