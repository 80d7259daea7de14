"""The model family of causal decoders: Llama, Mistral, Qwen2 and Qwen3 become configurations of one decoder class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from hf_efficient.conversion.architecture import load, runtime_fields
from hf_efficient.conversion.families.family import FINE_TUNING, LORA, ModelFamily
from hf_efficient.conversion.reading.config_fields import check_fields
from hf_efficient.conversion.reading.config_file import check_decoder
from hf_efficient.errors import HFEError, error_text
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig
from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import EfficientDecoderForCausalLM

if TYPE_CHECKING:
    from hf_efficient.conversion.measuring.evaluation import Evaluator

_PREFIX = "model."
# Fields with the same meaning in all four stock configurations and in our decoder's.
_SHARED_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters"),
)
# Fields of a configuration that describe the file or the class, not the model.
_FILE_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")
# Buffers that old checkpoints store with the weights; every model computes them itself.
_BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "position_ids", "freqs_cis")


def _llama(config: LlamaConfig) -> dict[str, Any]:
    """The decoder fields of a Llama model that not all families share."""
    return {
        "head_dim": config.head_dim,
        # Llama's flag also sets the bias of the output projection.
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _mistral(config: MistralConfig) -> dict[str, Any]:
    """The decoder fields of a Mistral model that not all families share."""
    return {"head_dim": config.head_dim, "sliding_window": config.sliding_window}


def _qwen2(config: Qwen2Config) -> dict[str, Any]:
    """The decoder fields of a Qwen2 model that not all families share."""
    return {
        # Not a field of Qwen2Config: the model always has biases on q, k and v, and none on the output.
        "attention_bias": True,
        # Not a field either, but the stock model uses the attribute if config.json sets it.
        "head_dim": getattr(config, "head_dim", None),
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
    }


def _qwen3(config: Qwen3Config) -> dict[str, Any]:
    """The decoder fields of a Qwen3 model that not all families share."""
    return {
        "head_dim": config.head_dim,
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "qk_norm": True,
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
    }


# Stock model type -> the decoder fields that depend on it, from its configuration.
_OWN_FIELDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def decoder_config(stock: PreTrainedConfig) -> EfficientDecoderConfig:
    """The same model as a configuration of our decoder, which computes the same logits from the same tensors.

    `stock` is of one of the four stock classes, or already of one of our decoders; then the runtime fields, which
    choose how a loaded model runs, get their defaults. The argument is not changed.

    Raises:
        HFEError: the configuration does not describe a model that can be built.
    """
    if isinstance(stock, DecoderConfig):
        fields = stock.to_dict()
        for name in (*_FILE_FIELDS, *runtime_fields()):
            fields.pop(name, None)
        return _checked_config(fields)
    fields = {name: getattr(stock, name) for name in _SHARED_FIELDS}
    fields["attention_dropout"] = stock.attention_dropout or 0.0
    fields.update(_OWN_FIELDS[stock.model_type](stock))
    return _checked_config({"source_model_type": stock.model_type, "dtype": stock.dtype, **fields})


def _checked_config(fields: dict[str, Any]) -> EfficientDecoderConfig:
    """The configuration with these fields; `HFEError` if a value is invalid or no model can be built from it."""
    try:
        config = EfficientDecoderConfig(**fields)
    # For a field of a wrong type or value huggingface_hub raises its own error classes.
    except Exception as error:
        cause = error_text(error, most=None)
        raise HFEError(f"config.json does not describe a decoder of ours: {cause}", "correct config.json") from error
    check_decoder(config)
    return config


class CausalDecoderFamily(ModelFamily):
    """Llama-like causal language models; see `ModelFamily` for the methods."""

    name = "causal decoders"
    config_classes = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    tensor_groups = {
        "embeddings and head": ("embed_tokens", "lm_head"),
        "attention": ("self_attn",),
        "feed-forward": (".mlp.",),
        "norms": ("norm",),
    }
    inspected_fields = (
        *("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "tie_word_embeddings"),
    )
    pipeline_tags = {
        "AutoModelForCausalLM": "text-generation",
        "AutoModelForSequenceClassification": "text-classification",
        "AutoModelForTokenClassification": "token-classification",
        "AutoModelForQuestionAnswering": "question-answering",
    }
    generates = True

    def check_source(self, fields: Mapping[str, Any]) -> None:
        """Raise `HFEError` for a mixture of experts."""
        keys = ("num_local_experts", "num_experts", "n_routed_experts")
        experts = next((fields[key] for key in keys if fields.get(key)), 0)
        if experts:
            raise HFEError(
                f"model_type {fields.get('model_type')!r} is a mixture of {experts} experts; only dense decoders can "
                "be converted",
                f"use a dense model of the families {', '.join(self.config_classes)}",
            )

    def check_fields(self, fields: dict[str, Any], stock: PreTrainedConfig) -> list[str]:
        """As `ModelFamily.check_fields`, see `conversion.reading.config_fields.check_fields`."""
        return check_fields(fields, stock)

    def own_config(self, stock: PreTrainedConfig) -> EfficientDecoderConfig:
        """As `ModelFamily.own_config`, see `decoder_config`."""
        return decoder_config(stock)

    def auto_class(self, stock: PreTrainedConfig) -> str:
        """`AutoModelForCausalLM`, whatever class config.json names."""
        return "AutoModelForCausalLM"

    def skeleton(self, config: PreTrainedConfig) -> nn.Module:
        """Our causal language model of `config` on the meta device; errors as for `decoder_config`."""
        with torch.device("meta"):
            return EfficientDecoderForCausalLM(decoder_config(config))

    def stored_names(self, names: set[str], expected: set[str]) -> dict[str, str]:
        """As `ModelFamily.stored_names`: a checkpoint of the base model lacks the prefix `model.`."""
        return {
            _PREFIX + name: name
            for name in names
            if name not in expected and _PREFIX + name in expected and _PREFIX + name not in names
        }

    def reason_to_leave_out(self, name: str) -> str:
        """A reason for buffers that old checkpoints store; an empty text for any other tensor."""
        return "a buffer that the model computes itself" if name.endswith(_BUFFERS) else ""

    def evaluator(self, config: PreTrainedConfig) -> Evaluator:
        """The `CausalEvaluator`: loss of next tokens."""
        return load("hf_efficient.conversion.measuring.evaluation:CausalEvaluator")()

    def description(self, config: PreTrainedConfig) -> dict[str, str]:
        """Label -> text about layers, attention heads and vocabulary, for `inspect`."""
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        tied = "tied" if config.tie_word_embeddings else "untied"
        return {
            "shape": f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, feed-forward "
            f"{config.intermediate_size}",
            "attention": f"{heads} query, {groups} key/value heads of {config.head_dim}",
            "vocabulary": f"{config.vocab_size:,}, embeddings {tied}",
        }

    def snippets(self, auto_class: str, *, chat: bool) -> dict[str, str]:
        """Sentence -> code for text, chat and LoRA; empty for another Auto class than `AutoModelForCausalLM`."""
        if auto_class != "AutoModelForCausalLM":
            return {}
        return {"Text:": _TEXT, **({"Chat:": _CHAT} if chat else {}), FINE_TUNING: LORA.format('task_type="CAUSAL_LM"')}


CAUSAL_DECODERS = CausalDecoderFamily()

_TEXT = """inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=40)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
_CHAT = """messages = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
inputs = inputs.to(model.device)
output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=40)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))"""
