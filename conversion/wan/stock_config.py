"""The configuration of a Wan 2.1 transformer before its conversion, from the config.json of either public layout.

Annotations are evaluated in this file: `strict` does not check a type that is a string.
"""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict

from hf_efficient.errors import HFEError
from hf_efficient.json_file import is_whole
from hf_efficient.modeling.monarch_wan.configuration_monarch_wan import MonarchWanConfig

DIFFUSERS_CLASS = "WanTransformer3DModel"
ORIGINAL_CLASS, CAUSAL_CLASS = "WanModel", "CausalWanModel"
CLASSES = (DIFFUSERS_CLASS, ORIGINAL_CLASS, CAUSAL_CLASS)
# Field of the layout -> ours. In diffusers' layout `hidden_size` is the product of two fields.
DIFFUSERS_FIELDS = {
    **{"num_attention_heads": "num_attention_heads", "num_layers": "num_hidden_layers", "eps": "eps"},
    **{"ffn_dim": "intermediate_size", "freq_dim": "freq_dim", "text_dim": "text_dim", "patch_size": "patch_size"},
    **{"in_channels": "in_channels", "out_channels": "out_channels", "rope_max_seq_len": "rope_max_seq_len"},
}
ORIGINAL_FIELDS = {
    **{"dim": "hidden_size", "ffn_dim": "intermediate_size", "num_heads": "num_attention_heads", "eps": "eps"},
    **{"num_layers": "num_hidden_layers", "in_dim": "in_channels", "out_dim": "out_channels"},
    **{"freq_dim": "freq_dim", "text_len": "text_len", "text_dim": "text_dim", "patch_size": "patch_size"},
}
# Fields that only the causal class of the original layout has.
CAUSAL_FIELDS = {name: name for name in ("local_attn_size", "sink_size")}
# Fields that a config.json of the layout always has.
_DIFFUSERS_REQUIRED = ("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim")
_ORIGINAL_REQUIRED = ("dim", "ffn_dim", "num_heads", "num_layers")
# Field -> the only value with which our model computes the same; a missing field has it.
DIFFUSERS_FIXED: dict[str, Any] = {
    **{"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"},
    **{"image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None},
}
_ORIGINAL_FIXED: dict[str, Any] = {
    **{"model_type": "t2v", "cross_attn_norm": True, "qk_norm": True, "window_size": [-1, -1]},
}
# Fields of the first releases of diffusers' class, without effect.
_NO_EFFECT = ("window_size", "add_img_emb")
_MAX_SIZE = 1 << 16


@strict
class WanConfig(MonarchWanConfig):
    """The fields of `MonarchWanConfig`, of a model that was not converted: `monarch` is None."""

    model_type = "wan"


def stock_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json of diffusers' or the original layout as fields of `WanConfig`.

    Raises:
        HFEError: `_class_name` is not one of `CLASSES`, a field is missing, or the model is not a text-to-video model
            that ours can be.
    """
    name = fields.get("_class_name")
    if name not in CLASSES:
        raise HFEError(
            f"config.json names the class _class_name={str(name)[:80]!r}; conversions support {', '.join(CLASSES)}",
            "use the transformer of a Wan 2.1 text-to-video checkpoint",
        )
    diffusers = name == DIFFUSERS_CLASS
    for field, value in (DIFFUSERS_FIXED if diffusers else _ORIGINAL_FIXED).items():
        if fields.get(field, value) != value:
            raise HFEError(
                f"config.json sets {field}={str(fields[field])[:80]!r}; our model has {field}={value!r}, that of a Wan "
                "2.1 text-to-video model",
                "use a text-to-video checkpoint of Wan 2.1",
            )
    for field in _DIFFUSERS_REQUIRED if diffusers else _ORIGINAL_REQUIRED:
        if not is_whole(fields.get(field), 1, _MAX_SIZE):
            raise HFEError(
                f"config.json has {field}={str(fields.get(field))[:80]}, not a whole number from 1 to {_MAX_SIZE}",
                "correct config.json",
            )
    known = DIFFUSERS_FIELDS if diffusers else {**ORIGINAL_FIELDS, **(CAUSAL_FIELDS if name == CAUSAL_CLASS else {})}
    translated = {ours: fields[theirs] for theirs, ours in known.items() if fields.get(theirs) is not None}
    if diffusers:
        translated["hidden_size"] = fields["num_attention_heads"] * fields["attention_head_dim"]
        translated.setdefault("out_channels", translated.get("in_channels", WanConfig.in_channels))
    variant = "causal" if name == CAUSAL_CLASS else "bidirectional"
    return {"model_type": WanConfig.model_type, "variant": variant, **translated}


def read_fields(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the fields of a config.json that `stock_fields` reads, checks or may ignore."""
    if fields.get("_class_name") == DIFFUSERS_CLASS:
        return (*DIFFUSERS_FIELDS, *DIFFUSERS_FIXED, "attention_head_dim", *_NO_EFFECT)
    causal = CAUSAL_FIELDS if fields.get("_class_name") == CAUSAL_CLASS else {}
    return (*ORIGINAL_FIELDS, *causal, *_ORIGINAL_FIXED)
