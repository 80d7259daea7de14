"""The stock families that a conversion takes, as configurations of our one decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from hf_efficient.conversion.reading.config_file import check_decoder, checked_fields
from hf_efficient.conversion.reading.safetensors_reader import DTYPES
from hf_efficient.errors import HFEError, error_text
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig
from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import EfficientDecoderForCausalLM

# Fields that mean the same in every family and in our decoder.
_SHARED_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters"),
)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Buffers that old checkpoints stored beside the weights; every model computes them itself.
_HARMLESS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "position_ids", "freqs_cis")


@dataclass(frozen=True)
class Family:
    """A stock family: its configuration class, and the decoder fields that it sets in its own way."""

    config_class: type[PreTrainedConfig]
    own_fields: Callable[[Any], dict[str, Any]]


def _llama(config: LlamaConfig) -> dict[str, Any]:
    return {
        "head_dim": config.head_dim,
        # Llama's flag speaks for the output projection too.
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _mistral(config: MistralConfig) -> dict[str, Any]:
    return {"head_dim": config.head_dim, "sliding_window": config.sliding_window}


def _qwen2(config: Qwen2Config) -> dict[str, Any]:
    return {
        # No field says so, but Qwen2 has biases on q, k and v, and none on the output.
        "attention_bias": True,
        # Nor is there a field for this, but the stock model follows one that is set.
        "head_dim": getattr(config, "head_dim", None),
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
    }


def _qwen3(config: Qwen3Config) -> dict[str, Any]:
    return {
        "head_dim": config.head_dim,
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "qk_norm": True,
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
    }


FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaConfig, _llama),
    "mistral": Family(MistralConfig, _mistral),
    "qwen2": Family(Qwen2Config, _qwen2),
    "qwen3": Family(Qwen3Config, _qwen3),
}


def source_config(fields: dict[str, Any], origin: str = "config.json") -> PreTrainedConfig:
    """The configuration that `config.json` describes: of a supported stock family, or one of ours.

    Code that the checkpoint may carry is never run: only `model_type` decides. `origin` is the file that the fields
    come from, where it is another one.

    Raises:
        HFEError: unsupported family, mixture of experts, quantised weights, or a field of a wrong type or value.
    """
    try:
        return _source_config(fields)
    except HFEError as error:
        raise HFEError(*(part.replace("config.json", origin) for part in (error.problem, error.remedy))) from error


def _source_config(fields: dict[str, Any]) -> PreTrainedConfig:
    model_type = fields.get("model_type")
    quantisation = fields.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise HFEError(
            f"the checkpoint is quantised (quant_method {method}); a conversion needs plain weights",
            "use the unquantised checkpoint, or a GGUF file, which is dequantised",
        )
    experts = next((fields[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if fields.get(k)), 0)
    if experts:
        raise HFEError(
            f"model_type {model_type!r} is a mixture of {experts} experts; only dense decoders can be converted",
            f"use a dense model of the families {', '.join(FAMILIES)}",
        )
    config_class = _config_class(model_type)
    checked = checked_fields(fields, config_class)
    try:
        config = config_class.from_dict(checked)
        # As every stock model does: it takes in what the configuration was given after its rotary parameters.
        config.standardize_rope_params()
        return config
    # transformers and huggingface_hub raise errors of their own for a field of a wrong type.
    except Exception as error:
        cause = error_text(error, most=None)
        raise HFEError(f"config.json is not a valid {config_class.__name__}: {cause}", "correct config.json") from error


def _config_class(model_type: Any) -> type[PreTrainedConfig]:
    named = isinstance(model_type, str)
    if named and model_type in FAMILIES:
        return FAMILIES[model_type].config_class
    # Ours are registered with transformers' mapping when the package is imported.
    if named and model_type in CONFIG_MAPPING and issubclass(CONFIG_MAPPING[model_type], DecoderConfig):
        return CONFIG_MAPPING[model_type]
    raise HFEError(
        f"model_type {model_type!r} is not a supported family; a conversion takes {', '.join(FAMILIES)} and our own "
        "hfe_ decoders",
        "choose a checkpoint of one of these families",
    )


def decoder_config(stock: PreTrainedConfig) -> EfficientDecoderConfig:
    """The same model as a configuration of our decoder, which gives the same logits from the same tensors.

    Raises:
        HFEError: the configuration does not describe a model that can be built.
    """
    if isinstance(stock, DecoderConfig):
        fields = stock.to_dict()
        # The last says where a loaded model keeps tensors, which makes it no other model.
        for name in (
            "model_type",
            "architectures",
            "auto_map",
            "transformers_version",
            "_name_or_path",
            "stem_offload",
        ):
            fields.pop(name, None)
        return _built(fields)
    fields = {name: getattr(stock, name) for name in _SHARED_FIELDS}
    fields["attention_dropout"] = stock.attention_dropout or 0.0
    fields.update(FAMILIES[stock.model_type].own_fields(stock))
    return _built({"source_model_type": stock.model_type, "dtype": stock.dtype, **fields})


def _built(fields: dict[str, Any]) -> EfficientDecoderConfig:
    try:
        config = EfficientDecoderConfig(**fields)
    # huggingface_hub raises errors of its own for a field of a wrong type or value.
    except Exception as error:
        cause = error_text(error, most=None)
        raise HFEError(f"config.json does not describe a decoder of ours: {cause}", "correct config.json") from error
    check_decoder(config)
    return config


def skeleton(config: DecoderConfig) -> nn.Module:
    """The causal language model of a configuration, on the meta device: names, shapes and module types, no weight."""
    with torch.device("meta"):
        return EfficientDecoderForCausalLM(decoder_config(config))


def expected_tensors(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors, in the order of the model. A tied head is stored as the embedding."""
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def float32_tensors(config: DecoderConfig) -> set[str]:
    """Names of the tensors that a checkpoint stores in float32, whatever the dtype of the others."""
    model: Any = skeleton(config)
    leaves = model._keep_in_fp32_modules_strict or ()
    return {name for name in model.state_dict() if name.rpartition(".")[2] in leaves}


def check_tensors(
    config: DecoderConfig, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]
) -> dict[str, str]:
    """Compare a source's tensors with its configuration. Returns the tensors to leave out, each with the reason.

    Raises:
        HFEError: a tensor is missing, is not known to the model, or has another shape or an integer dtype.
    """
    # Before a model of that many layers is built.
    if config.num_hidden_layers > len(shapes):
        raise HFEError(
            f"the checkpoint holds {len(shapes)} tensors, and config.json calls for {config.num_hidden_layers} layers",
            "use the whole checkpoint, with the config.json that belongs to it",
        )
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise HFEError(
            f"the checkpoint lacks {_list(missing)}, which config.json calls for",
            "use the whole checkpoint of a causal language model, with the config.json that belongs to it",
        )
    left_out = {name: _reason_to_leave_out(name, config) for name in shapes if name not in expected}
    unknown = [name for name, reason in left_out.items() if not reason]
    if unknown:
        raise HFEError(
            f"the checkpoint holds {_list(unknown)}, which the model that config.json describes does not have",
            "use the config.json that belongs to the checkpoint; a task head or an adapter must be removed first",
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise HFEError(
                f"tensor {name} has shape {list(shapes[name])}; config.json calls for {list(shape)}",
                "use the config.json that belongs to the checkpoint",
            )
        if dtypes[name] not in _FLOATS:
            kind = next(label for label, dtype in DTYPES.items() if dtype == dtypes[name])
            raise HFEError(
                f"tensor {name} has dtype {kind}; weights must be F32, F16, BF16 or F64",
                "use the unquantised checkpoint",
            )
    return left_out


def _reason_to_leave_out(name: str, config: DecoderConfig) -> str:
    if name.endswith(_HARMLESS):
        return "a buffer that the model computes itself"
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "the head is tied to the embedding"
    return ""


def _list(names: list[str], limit: int = 3) -> str:
    """`tensor a, b, c and 7 more`."""
    shown = ", ".join(names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{'tensor' if len(names) == 1 else 'the tensors'} {shown}{more}"
