"""Checks the fields of `config.json`, before and after transformers creates a configuration from them."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_efficient.errors import HFEError, error_text
from hf_efficient.json_file import is_whole
from hf_efficient.modeling.decoder.attention import DecoderRotaryEmbedding
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig

_REMEDY = "correct config.json"
# Largest accepted values, far above those of any model; larger ones would take much time and memory before they fail.
_MAX_COUNTS = {
    **{"vocab_size": 1 << 28, "hidden_size": 1 << 20, "intermediate_size": 1 << 24, "num_hidden_layers": 1 << 12},
    **{"num_attention_heads": 1 << 16, "num_key_value_heads": 1 << 16, "head_dim": 1 << 16},
    **{"max_position_embeddings": 1 << 40, "sliding_window": 1 << 40, "max_window_layers": 1 << 40},
}
_MAY_BE_ZERO = ("max_window_layers", "sliding_window")
_MAX_NUMBERS = {"rms_norm_eps": 1.0, "initializer_range": 1e3, "attention_dropout": 1.0, "rope_theta": 1e30}
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id")
# Attributes of the class that old checkpoints have as fields; they are ignored.
_CLASS_ATTRIBUTES = (
    *("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan"),
    "keys_to_ignore_at_inference",
)


def checked_fields(fields: dict[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Check the types and sizes of the fields of a config.json; returns those that may be passed to `config_class`.

    Left out are names that begin with an underscore and attributes of the class that old checkpoints have as fields.

    Raises:
        HFEError: a value has the wrong type, is negative or is far larger than any model's; a key is not a field but
            would overwrite an attribute of the class; or `per_layer_config` is set.
    """
    known = {field.name for field in dataclasses.fields(config_class)}
    passed = {name: value for name, value in fields.items() if name not in _CLASS_ATTRIBUTES and name[:1] != "_"}
    for name, value in passed.items():
        # transformers sets every key as an attribute, so such a key would change how the others are read.
        attribute = inspect.getattr_static(config_class, name, None)
        if name not in known and name != "model_type" and attribute is not None and not isinstance(attribute, property):
            raise HFEError(f"config.json has the key {name!r}, which is not a field of a configuration", _REMEDY)
        if (
            name in _MAX_COUNTS
            and value is not None
            and not is_whole(value, int(name not in _MAY_BE_ZERO), _MAX_COUNTS[name])
        ):
            raise _invalid(name, value, f"a whole number from 1 to {_MAX_COUNTS[name]}")
        if name in _MAX_NUMBERS and value is not None and not _is_number(value, _MAX_NUMBERS[name]):
            raise _invalid(name, value, f"a number from 0 to {_MAX_NUMBERS[name]:g}")
        if name in _TOKEN_IDS and not all(map(_is_token_id, value if isinstance(value, list) else [value])):
            raise _invalid(name, value, "a token id")
        if name == "architectures" and value is not None and not _is_list_of_strings(value):
            raise _invalid(name, value, "a list of names")
        if name in ("dtype", "torch_dtype") and value is not None and _parse_dtype(value) is None:
            raise _invalid(name, value, "a dtype such as float32 or bfloat16")
    if passed.get("per_layer_config"):
        raise HFEError(
            "config.json has a per_layer_config; all layers must have one configuration",
            _REMEDY,
        )
    return passed


def check_decoder(config: DecoderConfig) -> None:
    """Raise `HFEError` if no decoder can be built with the activation, the rotary embedding or the padding token."""
    if config.hidden_act not in ACT2FN:
        raise HFEError(
            f"config.json names the activation hidden_act={config.hidden_act!r}, which transformers does not know",
            f"use one of {', '.join(sorted(ACT2FN)[:6])}, …, or a checkpoint of another family",
        )
    pad = config.pad_token_id
    if pad is not None and not -config.vocab_size <= pad < config.vocab_size:
        raise HFEError(
            f"config.json has pad_token_id={pad}; the vocabulary is 0..{config.vocab_size - 1}",
            "set pad_token_id in config.json to a token of the vocabulary, or to null",
        )
    rope = config.rope_parameters
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    if kind != "default" and (not isinstance(kind, str) or kind not in ROPE_INIT_FUNCTIONS):
        raise HFEError(
            f"config.json has the rotary embedding {str(kind if kind is not None else rope)[:80]!r}; this decoder "
            f"has default, {', '.join(ROPE_INIT_FUNCTIONS)}",
            "choose a checkpoint with one of these",
        )
    try:
        with torch.device("cpu"):  # also inside a meta-device context
            frequencies = DecoderRotaryEmbedding(config).inv_freq
    # Every rope type has its own parameters, and raises its own errors for missing or wrong ones.
    except Exception as error:
        cause = error_text(error, named=True)
        raise HFEError(f"config.json has rope_parameters that cannot be used ({cause})", _REMEDY) from error
    if not bool(frequencies.isfinite().all()):
        raise HFEError(f"config.json has rope_parameters={str(rope)[:200]}, whose frequencies are not finite", _REMEDY)


def _invalid(name: str, value: Any, rule: str) -> HFEError:
    """The error for a field whose value breaks `rule`."""
    return HFEError(f"config.json has {name}={str(value)[:80]!s}, not {rule}", _REMEDY)


def _is_number(value: Any, maximum: float) -> bool:
    """Whether `value` is an int or float from 0 to `maximum`, and not a bool."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value <= maximum


def _is_list_of_strings(value: Any) -> bool:
    """Whether `value` is a list of strings."""
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_token_id(value: Any) -> bool:
    """Whether `value` is None or an int that may be a token id."""
    # Some old configurations have -1 for no token.
    return value is None or is_whole(value, -1, (1 << 31) - 1)


def _parse_dtype(value: Any) -> torch.dtype | None:
    """`value` if it is a torch dtype, the torch dtype named by it if it is a string, or None."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    return dtype if isinstance(dtype, torch.dtype) else None
