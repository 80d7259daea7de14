"""A Wan transformer of ours as diffusers and the authors' code store it: names of tensors and fields of config.json."""

from __future__ import annotations

from typing import Any

import torch

from hf_efficient.conversion.families.family import Layout
from hf_efficient.conversion.wan.stock_config import (
    CAUSAL_CLASS,
    CAUSAL_FIELDS,
    DIFFUSERS_CLASS,
    DIFFUSERS_FIELDS,
    DIFFUSERS_FIXED,
    ORIGINAL_CLASS,
    ORIGINAL_FIELDS,
)
from hf_efficient.conversion.wan.tensor_names import diffusers_name
from hf_efficient.errors import HFEError
from hf_efficient.modeling.monarch_wan.configuration_monarch_wan import MonarchWanConfig
from hf_efficient.modeling.monarch_wan.modeling_monarch_wan import MonarchWanModel

LAYOUTS = ("diffusers", "original")
# The weight file in both layouts; its index has the same name with `.index.json`.
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Fields that neither the original config.json nor that of diffusers stores, with the value that their code has.
_FIXED_IN_CODE: dict[str, Any] = {"rope_theta": 10000.0}
# Fields of the original layout that are stored only if they have another value.
_NOT_STORED: dict[str, Any] = {"patch_size": [1, 2, 2], "text_dim": 4096}


def layout_of(name: str, config: MonarchWanConfig) -> Layout:
    """The layout `name`, one of `LAYOUTS`, of the model of `config`.

    Raises:
        HFEError: the layout has no class for the model: diffusers for the causal variant, or a field has a value that
            is fixed in its code.
    """
    fixed = _FIXED_IN_CODE | ({"text_len": 512} if name == "diffusers" else {"rope_max_seq_len": 1024})
    for field, value in fixed.items():
        if getattr(config, field) != value:
            raise HFEError(
                f"the model has {field}={getattr(config, field)}; in the layout {name} it is always {value}",
                "keep the model in its own layout",
            )
    with torch.device("meta"):
        names = list(MonarchWanModel(config).state_dict())
    left_out = []
    if config.monarch is not None:
        left_out.append(f"the layout {name} has no Monarch attention: its code computes softmax attention")
    if name == "diffusers":
        return Layout(_diffusers_fields(config), {ours: diffusers_name(ours) for ours in names}, WEIGHTS, left_out)
    return Layout(_original_fields(config), {ours: ours for ours in names}, WEIGHTS, left_out)


def _diffusers_fields(config: MonarchWanConfig) -> dict[str, Any]:
    """The config.json of diffusers' class; `HFEError` for the causal variant, which diffusers does not have."""
    if config.variant == "causal":
        raise HFEError(
            "the model is the causal variant, and WanTransformer3DModel of diffusers lets all frames attend to each "
            "other",
            "write the layout original",
        )
    fields = {theirs: getattr(config, ours) for theirs, ours in DIFFUSERS_FIELDS.items()}
    return {"_class_name": DIFFUSERS_CLASS, **fields, "attention_head_dim": config.head_dim, **DIFFUSERS_FIXED}


def _original_fields(config: MonarchWanConfig) -> dict[str, Any]:
    """The config.json of the authors' class, of Self-Forcing's for the causal variant."""
    causal = config.variant == "causal"
    known = {**ORIGINAL_FIELDS, **(CAUSAL_FIELDS if causal else {})}
    fields = {theirs: getattr(config, ours) for theirs, ours in known.items()}
    # The authors' code stores neither of the two, which are the same in all of its models.
    fields = {name: value for name, value in fields.items() if _NOT_STORED.get(name) != value}
    return {"_class_name": CAUSAL_CLASS if causal else ORIGINAL_CLASS, "model_type": "t2v", **fields}
