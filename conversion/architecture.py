"""`ArchitectureSpec`, the description of one of our model architectures, and the list of all that are registered.

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
    """One of our architectures: its model classes by name, and what conversion, `inspect` and the command line need.

    ``module:name`` is an object of a module, imported when it is used.

    Attributes:
        patch: name of the patch on the command line; None for an architecture without a patch.
        modeling: the modeling file, which also holds the configuration class.
        prefix: what its class names begin with: `X` for `XConfig`, `XModel`, `XForCausalLM`.
        tasks: heads that it defines, the main one last, e.g. `CausalLM` for `AutoModelForCausalLM`.
        family: ``module:name`` of the `ModelFamily` whose stock models it is made from.
        source_types: model types of transformers that can be converted to it; None for all of the family.
        combines: whether models of the family without a patch, or with several patches, become this architecture.
        patch_options: ``module:Class`` of the dataclass that holds the patch's conversion options.
        generation: module with a function `parallel_generate` that also works with stock models; None without one.
        adds_tokens: whether the patch adds tokens to the vocabulary; a checkpoint may have one such patch.
        tensor_groups: label in `inspect` -> parts of the names of its own tensors.
        inspected_fields: configuration field -> label in `inspect`.
        token_tables: parts of the names of tensors [vocab_size, W] of which only a text's rows are needed.
        runtime_fields: configuration fields that choose how a loaded model runs, and change neither tensors nor logits.
        release_readers: ``module:Class`` of each reader for checkpoints of the authors' own training code.
        writes_special_tokens: ``module:function``, config -> True if generated special tokens are part of the text.
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
        """Name of an Auto class -> our class, the configuration first, the main head last. Imports the modeling."""
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
        """Our configuration class. Imports the modeling file."""
        return self.auto_classes["AutoConfig"]

    @property
    def peft_targets(self) -> tuple[str, dict[str, list[str]]]:
        """(transformers' model type whose default `target_modules` in PEFT apply, PEFT method -> other target modules).

        Both are attributes of the configuration class, since a checkpoint's own copy of the code registers them too.
        """
        return self.config_class.peft_targets, self.config_class.peft_targets_by_method

    @property
    def model_type(self) -> str:
        """`model_type` of the configuration class. Imports the modeling file."""
        return self.config_class.model_type


_ARCHITECTURES: list[ArchitectureSpec] = []


def register_architecture(spec: ArchitectureSpec) -> None:
    """Add an architecture to the list, unless an equal one is there."""
    if spec not in _ARCHITECTURES:
        _ARCHITECTURES.append(spec)


def architectures() -> Sequence[ArchitectureSpec]:
    """Every registered architecture, in the order of the registry."""
    return _ARCHITECTURES


def architecture_of(model_type: str) -> ArchitectureSpec | None:
    """The architecture registered under ``model_type``, or None if that is not one of ours. Imports modeling files."""
    return next((spec for spec in _ARCHITECTURES if spec.model_type == model_type), None)


def architectures_beside(spec: ArchitectureSpec) -> list[ArchitectureSpec]:
    """The architectures that the same models can be converted to as to ``spec``, itself included."""
    return [each for each in _ARCHITECTURES if (each.family, each.source_types) == (spec.family, spec.source_types)]


def active_architectures(config: PreTrainedConfig) -> list[ArchitectureSpec]:
    """The architecture of each patch in `config.active_patches`; empty for a stock configuration."""
    spec = architecture_of(config.model_type)
    if spec is None:
        return []
    return [each for each in architectures_beside(spec) if each.patch in config.active_patches]


def patch_classes() -> dict[str, type]:
    """Name of each patch on the command line -> the dataclass of its options, whose module is imported."""
    return {spec.patch: load(spec.patch_options) for spec in _ARCHITECTURES if spec.patch and spec.patch_options}


def runtime_fields() -> set[str]:
    """The `runtime_fields` of all architectures."""
    return {name for spec in _ARCHITECTURES for name in spec.runtime_fields}


def token_tables() -> tuple[str, ...]:
    """The `token_tables` of all architectures."""
    return tuple(part for spec in _ARCHITECTURES for part in spec.token_tables)


def load(path: str) -> Any:
    """Import the object ``module:name``; raises ImportError or AttributeError if there is none."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
