"""Every architecture of the package, one line each.

A new architecture is a folder in ``modeling/``, a file in ``conversion/``, its kernels, and one line here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_efficient.modeling.bhyt.modeling_bhyt import BhytConfig, BhytForCausalLM, BhytModel
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import (
    EfficientDecoderConfig,
    EfficientDecoderForCausalLM,
    EfficientDecoderModel,
)
from hf_efficient.modeling.medverse.modeling_medverse import MedVerseConfig, MedVerseForCausalLM, MedVerseModel
from hf_efficient.modeling.multiverse.modeling_multiverse import (
    MultiverseConfig,
    MultiverseForCausalLM,
    MultiverseModel,
)
from hf_efficient.modeling.stem.modeling_stem import StemConfig, StemForCausalLM, StemModel


@dataclass(frozen=True)
class Architecture:
    """One registered architecture.

    Attributes:
        patch: name of the patch on the command line; None for the decoder that takes any combination.
        auto_classes: name of an Auto class -> the class it resolves to; the configuration comes first.
        patch_options: ``module:Class`` of the dataclass that holds the patch's conversion options.
        generation: module whose `parallel_generate` its checkpoints offer to stock models too.
    """

    patch: str | None
    auto_classes: dict[str, type]
    patch_options: str | None = None
    generation: str | None = None

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return self.auto_classes["AutoConfig"]

    @property
    def model_type(self) -> str:
        return self.config_class.model_type


# Task heads that each modeling file defines beside its causal language model.
_TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


def _causal_lm(
    patch: str | None,
    config: type[PreTrainedConfig],
    model: type[PreTrainedModel],
    causal_lm: type[PreTrainedModel],
    options: str | None = None,
    generation: str | None = None,
) -> Architecture:
    prefix, modeling = causal_lm.__name__.removesuffix("ForCausalLM"), sys.modules[causal_lm.__module__]
    heads = {f"AutoModelFor{task}": getattr(modeling, f"{prefix}For{task}") for task in _TASKS}
    classes = {"AutoConfig": config, "AutoModel": model, **heads, "AutoModelForCausalLM": causal_lm}
    return Architecture(patch, classes, options, generation)


_PARALLEL = "hf_efficient.modeling.topology.generation.generation_topology"


ARCHITECTURES: tuple[Architecture, ...] = (
    _causal_lm(None, EfficientDecoderConfig, EfficientDecoderModel, EfficientDecoderForCausalLM),
    _causal_lm("stem", StemConfig, StemModel, StemForCausalLM, "hf_efficient.conversion.stem.patch:Stem"),
    _causal_lm("bhyt", BhytConfig, BhytModel, BhytForCausalLM, "hf_efficient.conversion.bhyt.patch:Bhyt"),
    _causal_lm(
        "multiverse",
        MultiverseConfig,
        MultiverseModel,
        MultiverseForCausalLM,
        "hf_efficient.conversion.topology.patch:Multiverse",
        _PARALLEL,
    ),
    _causal_lm(
        "medverse",
        MedVerseConfig,
        MedVerseModel,
        MedVerseForCausalLM,
        "hf_efficient.conversion.topology.patch:MedVerse",
        _PARALLEL,
    ),
)

_AUTO_MODELS = {
    auto.__name__: auto
    for auto in (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
    )
}


def register_architectures() -> None:
    """Register every architecture with transformers' Auto classes. Calling it again changes nothing."""
    for architecture in ARCHITECTURES:
        config_class = architecture.config_class
        AutoConfig.register(architecture.model_type, config_class, exist_ok=True)
        for auto_name, model_class in architecture.auto_classes.items():
            if auto_name != "AutoConfig":
                _AUTO_MODELS[auto_name].register(config_class, model_class, exist_ok=True)


def architecture_of(model_type: str) -> Architecture | None:
    """The architecture registered under ``model_type``, or None when it is not ours."""
    return next((a for a in ARCHITECTURES if a.model_type == model_type), None)
