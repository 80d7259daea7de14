"""MedVerse: topology attention over a plan, each step of which sees the steps that it depends on."""

from __future__ import annotations

from transformers.generation import GenerationMixin

from hf_efficient.modeling.decoder.task_heads import (
    DecoderForQuestionAnswering,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
)
from hf_efficient.modeling.medverse.configuration_medverse import MedVerseConfig
from hf_efficient.modeling.topology.modeling_topology import (
    TopologyForCausalLM,
    TopologyModel,
    TopologyPreTrainedModel,
)


class MedVersePreTrainedModel(TopologyPreTrainedModel):
    """Base class: configuration class of the grammar `medverse`."""

    config: MedVerseConfig
    config_class = MedVerseConfig  # set too: transformers does not resolve the string annotation above


class MedVerseModel(MedVersePreTrainedModel, TopologyModel):
    """`TopologyModel` of the grammar `medverse`."""


class MedVerseForCausalLM(MedVersePreTrainedModel, TopologyForCausalLM, GenerationMixin):
    """`MedVerseModel` and a language-model head."""

    model_class = MedVerseModel


class MedVerseForSequenceClassification(MedVersePreTrainedModel, DecoderForSequenceClassification):
    """`MedVerseModel` and a sequence classification head."""

    model_class = MedVerseModel


class MedVerseForTokenClassification(MedVersePreTrainedModel, DecoderForTokenClassification):
    """`MedVerseModel` and a token classification head."""

    model_class = MedVerseModel


class MedVerseForQuestionAnswering(MedVersePreTrainedModel, DecoderForQuestionAnswering):
    """`MedVerseModel` and a question answering head."""

    model_class = MedVerseModel


__all__ = [
    "MedVerseConfig",
    "MedVerseForCausalLM",
    "MedVerseForQuestionAnswering",
    "MedVerseForSequenceClassification",
    "MedVerseForTokenClassification",
    "MedVerseModel",
    "MedVersePreTrainedModel",
]
