"""Turns on Monarch attention in a model of transformers, in all of its layers or in some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_efficient.errors import HFEError
from hf_efficient.logging import get_logger
from hf_efficient.modeling.monarch.default_spec import config_spec
from hf_efficient.modeling.monarch.monarch_interface import MONARCH
from hf_efficient.modeling.monarch.monarch_spec import MonarchSpec


def enable_monarch(
    model: PreTrainedModel, spec: MonarchSpec | None = None, *, layers: Sequence[int] | None = None
) -> None:
    """Make the bidirectional self-attention of a model Monarch attention, with these settings.

    Sets `model.config.monarch`, which is saved with the model; after loading it again, call this function again with
    the model alone, or pass ``attn_implementation="monarch"``. Each attention module gets the attributes `monarch`,
    its settings or None for softmax attention, and `efficient`, which is True; False makes that layer use softmax
    attention. ``model.set_attn_implementation("sdpa")`` turns all of it off.

    Args:
        model: an encoder, such as BERT or ViT; or an encoder-decoder model, whose encoder it is turned on in. Of a
            model with several parts pass the part, such as ``model.vision_model``.
        spec: the settings; None: those in `model.config.monarch`, or if there are none, the default for the
            configuration.
        layers: numbers of the attention layers, counted in the order of the model; in place of `spec.layers`.

    Raises:
        HFEError: the model has no self-attention that Monarch attention can replace, a layer does not exist or has a
            sliding window, or the configuration gives no default block size.

    Example:
        >>> import hf_efficient
        >>> from hf_efficient import MonarchSpec
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=4, hidden_size=32, num_attention_heads=2))
        >>> hf_efficient.enable_monarch(model, MonarchSpec(block_size=16), layers=[0, 1])
        >>> model.config.monarch["layers"]
        [0, 1]
    """
    spec = config_spec(model.config) if spec is None else spec
    if layers is not None:
        spec = replace(spec, layers=tuple(layers))
    if not model._can_set_attn_implementation():
        raise HFEError(
            f"{type(model).__name__} computes attention without transformers' attention interface, so nothing can "
            "replace it",
            "use a model that takes attn_implementation='sdpa'",
        )
    attach_spec(model, spec)
    model.config.monarch = spec.to_dict()
    model.set_attn_implementation(MONARCH)


def attach_spec(model: PreTrainedModel, spec: MonarchSpec) -> None:
    """Set the attributes `monarch` and `efficient` of each attention module, and log which layers run what.

    Raises:
        HFEError: as for `enable_monarch`.
    """
    modules = attention_layers(model)
    causal = next((module for module in modules if module.is_causal), None)
    if not modules or causal is not None:
        found = "has no bidirectional self-attention" if causal is None else f"has causal {type(causal).__name__}"
        raise HFEError(
            f"{type(model).__name__} {found}, and Monarch attention is for bidirectional self-attention only",
            "use an encoder, or pass the part of the model that is one, such as model.vision_model",
        )
    spec.check_layers(len(modules))
    windows = [i for i, module in enumerate(modules) if getattr(module, "sliding_window", None) is not None]
    named = [i for i in windows if spec.layers is not None and i in spec.layers]
    if named:
        raise HFEError(
            f"monarch.layers contains {named}, which have a sliding window", "name layers with full attention"
        )
    chosen = [i for i in range(len(modules)) if spec.runs_in(i) and i not in windows]
    for i, module in enumerate(modules):
        module.monarch = spec if i in chosen else None
        module.efficient = True
    others = [i for i in range(len(modules)) if i not in chosen]
    get_logger().info(
        f"{type(model).__name__}: layers with Monarch attention {chosen}, with softmax attention {others}; {spec}"
    )


def attention_layers(model: nn.Module) -> list[Any]:
    """Return the self-attention modules of a model in their order; of an encoder-decoder model those of the encoder.

    They are the modules that call transformers' attention interface: a class named for attention, with `is_causal`.
    """
    modules: list[Any] = list(model.modules())
    return [
        module
        for module in modules
        if "Attention" in type(module).__name__
        and isinstance(getattr(module, "is_causal", None), bool)
        and not (module.config.is_encoder_decoder and getattr(module, "is_decoder", False))
    ]


__all__ = ["attach_spec", "attention_layers", "enable_monarch"]
