"""`ArchitectureSpec`, the record of one registered architecture, and the list of all of them.

`hf_efficient/registry.py` holds the entries and registers them here when the package is imported. Files of
`conversion/`, which may not import that file, read them here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ArchitectureSpec:
    """One registered architecture: classes by name, and what the rest of the package must know of them.

    ``module:name`` is an object of a module, imported when it is used.

    Attributes:
        patch: name of the patch on the command line; None for an architecture without a patch.
        modeling: the modeling file, which also holds the configuration class.
        prefix: what its class names begin with: `X` for `XConfig`, `XModel`, `XForCausalLM`.
        tasks: heads that it defines, the main one last, e.g. `CausalLM` for `AutoModelForCausalLM`.
        family: ``module:name`` of the `ModelFamily` whose stock models it is made from.
        source_types: stock model types that it takes; None for all of the family.
        combines: takes a model of the family without a patch, and with several.
        patch_options: ``module:Class`` of the dataclass that holds the patch's conversion options.
        generation: module whose `parallel_generate` its checkpoints offer to stock models too.
        adds_tokens: the patch adds tokens to the vocabulary; a checkpoint takes one such patch.
        tensor_groups: label in `inspect` -> parts of the names of its own tensors.
        inspected_fields: configuration field -> label in `inspect`.
        token_tables: parts of the names of tensors that have a row for each token and are read at a text's rows only.
        runtime_fields: configuration fields that say how a loaded model runs, and change no tensor and no logit.
        release_readers: ``module:Class`` of each `ReleaseReader` for checkpoints of other training code.
        writes_special_tokens: ``module:function`` of a configuration: True when the special tokens that the model
            generates are part of its text.
        generation_figures: fields of what `generate` returns that the command line shows, such as `parallelism`.
    """

    patch: str | None
    modeling: str
    prefix: str
    tasks: tuple[str, ...]
    family: str
    source_types: tuple[str, ...] | None = None
    combines: bool = False
    patch_options: str | None = None
    generation: str | None = None
    adds_tokens: bool = False
    tensor_groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    inspected_fields: dict[str, str] = field(default_factory=dict)
    token_tables: tuple[str, ...] = ()
    runtime_fields: tuple[str, ...] = ()
    release_readers: tuple[str, ...] = ()
    writes_special_tokens: str | None = None
    generation_figures: tuple[str, ...] = ()

    @cached_property
    def auto_classes(self) -> dict[str, type]:
        """Name of an Auto class -> the class it resolves to; the configuration comes first."""
        names = {"AutoConfig": f"{self.prefix}Config", "AutoModel": f"{self.prefix}Model"}
        names |= {f"AutoModelFor{task}": f"{self.prefix}For{task}" for task in self.tasks}
        module = import_module(self.modeling)
        return {auto: getattr(module, name) for auto, name in names.items()}

    @property
    def main_auto_class(self) -> str:
        """Name of the Auto class of the main head."""
        return list(self.auto_classes)[-1]

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return self.auto_classes["AutoConfig"]

    @property
    def peft_targets(self) -> tuple[str, dict[str, list[str]]]:
        """Stock model type whose target modules PEFT's methods take by default, and lists for single methods.

        The configuration class holds both, since a checkpoint's own copy of the code registers them too.
        """
        return self.config_class.peft_targets, self.config_class.peft_targets_by_method

    @property
    def model_type(self) -> str:
        return self.config_class.model_type


_ARCHITECTURES: list[ArchitectureSpec] = []


def register_architecture(spec: ArchitectureSpec) -> None:
    """Add an architecture to the list; a second call with the same one has no effect."""
    if spec not in _ARCHITECTURES:
        _ARCHITECTURES.append(spec)


def architectures() -> Sequence[ArchitectureSpec]:
    """Every registered architecture, in the order of the registry."""
    return _ARCHITECTURES


def architecture_of(model_type: str) -> ArchitectureSpec | None:
    """The architecture registered under ``model_type``, or None when it is not ours."""
    return next((spec for spec in _ARCHITECTURES if spec.model_type == model_type), None)


def architectures_beside(spec: ArchitectureSpec) -> list[ArchitectureSpec]:
    """The architectures that take the same stock models as ``spec``, itself among them."""
    return [each for each in _ARCHITECTURES if (each.family, each.source_types) == (spec.family, spec.source_types)]


def active_architectures(config: PreTrainedConfig) -> list[ArchitectureSpec]:
    """The architecture of each patch that a configuration of ours carries; none for a stock model's."""
    spec = architecture_of(config.model_type)
    if spec is None:
        return []
    return [each for each in architectures_beside(spec) if each.patch in config.active_patches]


def patch_classes() -> dict[str, type]:
    """Name of each patch on the command line -> the dataclass of its options."""
    return {spec.patch: load(spec.patch_options) for spec in _ARCHITECTURES if spec.patch and spec.patch_options}


def runtime_fields() -> set[str]:
    """Every field that is of run time only, of all architectures."""
    return {name for spec in _ARCHITECTURES for name in spec.runtime_fields}


def token_tables() -> tuple[str, ...]:
    """Parts of the names of every tensor that is read at a text's rows only."""
    return tuple(part for spec in _ARCHITECTURES for part in spec.token_tables)


def load(path: str) -> Any:
    """The object that ``module:name`` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
