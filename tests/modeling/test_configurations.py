"""Configurations: defaults, and one clear error for each field that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from itertools import takewhile
from typing import Any, ClassVar, get_origin

import pytest
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from transformers import PreTrainedConfig

from hf_efficient.modeling.stem.configuration_stem import StemConfig, stem_layer_preset
from hf_efficient.registry import ARCHITECTURES, ArchitectureSpec


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.model_type)
def test_every_field_refuses_a_wrong_type(architecture: ArchitectureSpec) -> None:
    """The check is lost without the decorator on the class, and where annotations are strings."""
    classes = takewhile(lambda cls: cls is not PreTrainedConfig, architecture.config_class.__mro__)
    annotated = {name: kind for cls in classes for name, kind in vars(cls).get("__annotations__", {}).items()}
    names = {name for name, kind in annotated.items() if get_origin(kind) is not ClassVar}
    assert len(names) >= 19
    for name in names:
        with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'"):
            architecture.config_class(**{name: object()})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem_layers": []}, "stem_layers is empty"),
        ({"stem_layers": [1, 1]}, r"\[1, 1\] must be sorted and free of duplicates"),
        ({"stem_layers": [2, 1]}, r"\[2, 1\] must be sorted"),
        ({"stem_layers": [1, 3]}, r"contains \[3\]; the model has layers 0\.\.2"),
        ({"stem_layers": [-1]}, r"contains \[-1\]"),
        ({"stem_layers": ["1"]}, r"'stem_layers' with value \['1'\]"),
        ({"stem_embedding_dim": 40}, "stem_embedding_dim=40 must equal intermediate_size=48"),
        ({"stem_init_std": 0.0}, "stem_init_std=0.0 must be positive"),
        ({"stem_inputs_embeds": "guess"}, "'guess' must be 'error' or 'match'"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"layer_types": ["full_attention", "full_attention", "conv"]}, r"layer_types contains \['conv'\]"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window must be set"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
    ],
)
def test_wrong_value_is_named_with_its_rule(fields: dict[str, Any], message: str, tiny_config: Callable) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_config("hfe_stem", **fields)


@pytest.mark.parametrize(
    ("preset", "layers", "expected"),
    [("third", 16, [2, 5, 8, 11, 14]), ("third", 2, [1]), ("half", 6, [1, 3, 5]), ("full", 4, [1, 2, 3])],
)
def test_presets_choose_the_layers_of_the_paper(preset: str, layers: int, expected: list[int]) -> None:
    assert stem_layer_preset(layers, preset) == expected


def test_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match="'quarter'.*full.*half.*third"):
        stem_layer_preset(4, "quarter")


def test_default_layers_are_every_third() -> None:
    assert StemConfig(num_hidden_layers=9).stem_layers == [2, 5, 8]


def test_legacy_rope_fields_are_understood(tiny_config: Callable) -> None:
    config = tiny_config("hfe_stem", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert config.rope_parameters["rope_type"] == "linear" and config.rope_parameters["rope_theta"] == 5e5


def test_tensor_parallel_plan_names_only_modules_that_exist(tiny_config: Callable, tiny_model: Callable) -> None:
    """And STEM's gate is gathered to meet the whole row that a split table gives."""
    for fields in ({}, {"qk_norm": True}, {"stem_layers": [0, 1, 2]}):
        plan = tiny_config("hfe_stem", **fields).base_model_tp_plan
        names = [name for name, _ in tiny_model("hfe_stem", **fields).model.named_modules()]
        assert [pattern for pattern in plan if not any(fnmatch(name, pattern) for name in names)] == []
        assert plan["layers.*.mlp.gate_proj"] == "colwise_rep"
    assert tiny_config("hfe_decoder").base_model_tp_plan["layers.*.mlp.gate_proj"] == "colwise"
