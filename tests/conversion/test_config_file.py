"""Fields of config.json with which no model can be built are refused by name, before anything is built."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from hf_efficient.conversion.families.decoder import decoder_config
from hf_efficient.conversion.families.family import source_config
from hf_efficient.conversion.families.tensors import check_tensors
from hf_efficient.errors import HFEError

STOCK = {
    **{"model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 10000.0},
}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not a supported family"),
        ({"hidden_act": "snake"}, "the activation hidden_act='snake', which transformers does not know"),
        (
            {"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}},
            "rotary embedding 'mrope'; this",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "config.json"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "config.json"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "config.json"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "config.json"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0, not a number from 0"),
        ({"pad_token_id": 97}, r"pad_token_id=97; the vocabulary is 0\.\.96"),
        ({"pad_token_id": 1 << 70}, "pad_token_id=.*, not a token id"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id=.*, not a token id"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, not a whole number from 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True, not a whole number"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"hidden_size": 1 << 70}, "hidden_size="),
        ({"vocab_size": -5}, "vocab_size=-5"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps=1e-5, not a number"),
        ({"torch_dtype": "nn"}, "torch_dtype=nn, not a dtype"),
        ({"architectures": True}, "architectures=True, not a list of names"),
        ({"architectures": ["LlamaForCausalLM", None]}, "architectures=.*, not a list of names"),
        ({"rms_norm_eps": "a\nb"}, "rms_norm_eps=a b, not a number"),
        ({"dtype": 16}, "dtype=16, not a dtype"),
        ({"to_dict": 1}, "the key 'to_dict', which is not a field"),
        ({"attribute_map": {"hidden_size": "vocab_size"}}, "the key 'attribute_map', which is not a field"),
        ({"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config"),
        ({"quantization_config": ["x"]}, "quantised"),
        ({"head_dim": 7}, "head_dim"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(HFEError, match=words) as error:
        decoder_config(source_config({**STOCK, **fields}))
    assert "\n" not in str(error.value)


def test_keys_of_old_checkpoints_are_accepted() -> None:
    old = {"_name_or_path": "x", "pad_token_id": -1, "torch_dtype": "float16", "pretraining_tp": 1, "auto_map": {}}
    config = decoder_config(source_config({**STOCK, **old, "base_model_tp_plan": {"a": "b"}, "my_own_note": [1]}))
    assert (config.hidden_size, config.pad_token_id) == (32, -1)


def test_more_layers_than_tensors_are_refused_before_a_model_is_built() -> None:
    config = decoder_config(LlamaConfig(**{**STOCK, "num_hidden_layers": 4096}))
    with pytest.raises(HFEError, match="holds 0 tensors, and config.json calls for 4096 layers"):
        check_tensors(config, {}, {})
