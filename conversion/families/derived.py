"""`DerivedFamily`: stock models that become classes of ours which derive from the stock ones, tensor by tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from hf_efficient.conversion.architecture import ArchitectureSpec, architecture_of, architectures, runtime_fields
from hf_efficient.conversion.families.family import ModelFamily
from hf_efficient.errors import HFEError, error_text

# Fields of a configuration that describe the file or the class, not the model.
_FILE_FIELDS = ("model_type", "auto_map", "transformers_version", "_name_or_path")


class DerivedFamily(ModelFamily):
    """A family whose models have the tensors of the stock ones; a subclass sets the attributes of `ModelFamily` too.

    Attributes:
        prefixes: what the names of the base model's tensors begin with in a model with a head, such as `bert.`.
        buffers: ends of the names of stored tensors that the model computes itself.
        other_heads: prefixes of tensors that a checkpoint may hold beside those of the class that it names -> reason.
    """

    prefixes: ClassVar[tuple[str, ...]]
    buffers: ClassVar[tuple[str, ...]] = ()
    other_heads: ClassVar[tuple[str, ...]] = ()

    def older_names(self, name: str) -> list[str]:
        """Names that the tensor `name` has in checkpoints of other releases of transformers; none by default."""
        return []

    def own_config(self, stock: PreTrainedConfig) -> PreTrainedConfig:
        """As `ModelFamily.own_config`; `architectures` names our class with the source's head. Errors: `auto_class`."""
        spec = _spec(stock)
        # Fields that no class declares, such as those of old releases, would be stored with the result.
        declared = {*spec.config_class().to_dict(), *(each.name for each in dataclasses.fields(spec.config_class))}
        fields = {name: x for name, x in stock.to_dict().items() if name in declared and name not in _FILE_FIELDS}
        if architecture_of(stock.model_type) is None:
            fields["source_model_type"] = stock.model_type
        for name in runtime_fields():
            fields.pop(name, None)
        fields["architectures"] = [spec.auto_classes[self.auto_class(stock)].__name__]
        try:
            config: Any = spec.config_class(**fields)
        # For a field of a wrong type or value huggingface_hub raises its own error classes.
        except Exception as error:
            cause = error_text(error, most=None)
            raise HFEError(
                f"config.json does not describe an encoder of ours: {cause}", "correct config.json"
            ) from error
        if config.hidden_act not in ACT2FN:
            raise HFEError(
                f"config.json names the activation hidden_act={config.hidden_act!r}, which transformers does not know",
                f"use one of {', '.join(sorted(ACT2FN)[:6])}, …, or a checkpoint of another family",
            )
        return config

    def auto_class(self, stock: PreTrainedConfig) -> str:
        """Name of the Auto class of the first of `architectures`; `BertForPreTraining` counts as masked language model.

        Raises:
            HFEError: `architectures` is missing, or names a class that our architecture does not have.
        """
        named = (stock.architectures or [None])[0]
        spec = _spec(stock)
        prefix = type(stock).__name__.removesuffix("Config")
        task = str(named).removeprefix(prefix).removeprefix("For").replace("PreTraining", "MaskedLM")
        auto = "AutoModel" if task == "Model" else f"AutoModelFor{task}"
        if named is None or auto not in spec.auto_classes:
            heads = [each.removeprefix("AutoModel") or "Model" for each in spec.auto_classes if each != "AutoConfig"]
            known = ", ".join(prefix + head for head in heads)
            raise HFEError(
                f"config.json names the class {named} in architectures; conversions support {known}",
                "correct architectures in config.json, or choose a checkpoint of one of these classes",
            )
        return auto

    def skeleton(self, config: PreTrainedConfig) -> nn.Module:
        """The model of the class in `architectures`, on the meta device."""
        with torch.device("meta"):
            return model_class(config)(config)

    def stored_names(self, names: set[str], expected: set[str]) -> dict[str, str]:
        """As `ModelFamily.stored_names`: a missing or surplus prefix, and the names of `older_names`."""
        stored = {}
        for name in expected - names:
            found = next((each for each in self._other_names(name) if each in names and each not in expected), None)
            if found is not None:
                stored[name] = found
        return stored

    def _other_names(self, name: str) -> Iterator[str]:
        """Names under which a checkpoint may hold the tensor `name`, itself first."""
        # A checkpoint of the base model has no prefix before its names, one of a model with a head has.
        shorter = (name.removeprefix(prefix) for prefix in self.prefixes)
        for other in (name, *shorter, *(prefix + name for prefix in self.prefixes)):
            yield other
            yield from self.older_names(other)

    def reason_to_leave_out(self, name: str) -> str:
        """A reason for stored buffers and parts of other heads; an empty text for any other tensor."""
        if name.endswith(self.buffers):
            return "a buffer that the model computes itself"
        return "part of a head that the model's class does not have" if name.startswith(self.other_heads) else ""


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The model class that a configuration of one of our derived models names first in `architectures`.

    Raises:
        KeyError: the name is not that of a class of ours. A configuration from `own_config` names one.
    """
    spec = _spec(config)
    by_name: dict[str, Any] = {cls.__name__: cls for cls in spec.auto_classes.values()}
    return by_name[config.architectures[0]]


def _spec(config: PreTrainedConfig) -> ArchitectureSpec:
    """The architecture of a configuration of ours; for a stock one, the one that combines patches.

    Raises:
        StopIteration: no architecture that combines patches is made from the stock model type.
    """
    ours = architecture_of(config.model_type)
    if ours is not None:
        return ours
    return next(spec for spec in architectures() if config.model_type in (spec.source_types or ()) and spec.combines)
