"""Multiverse: topology attention over blocks of parallel paths."""

from __future__ import annotations

from transformers.generation import GenerationMixin

from hf_efficient.modeling.decoder.task_heads import (
    DecoderForQuestionAnswering,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
)
from hf_efficient.modeling.multiverse.configuration_multiverse import MultiverseConfig
from hf_efficient.modeling.topology.modeling_topology import (
    TopologyForCausalLM,
    TopologyModel,
    TopologyPreTrainedModel,
)


class MultiversePreTrainedModel(TopologyPreTrainedModel):
    """Base class: configuration class of the grammar `multiverse`."""

    config: MultiverseConfig
    config_class = MultiverseConfig  # set too: transformers does not resolve the string annotation above


class MultiverseModel(MultiversePreTrainedModel, TopologyModel):
    """`TopologyModel` of the grammar `multiverse`."""


class MultiverseForCausalLM(MultiversePreTrainedModel, TopologyForCausalLM, GenerationMixin):
    """`MultiverseModel` and a language-model head."""

    model_class = MultiverseModel


class MultiverseForSequenceClassification(MultiversePreTrainedModel, DecoderForSequenceClassification):
    """`MultiverseModel` and a sequence classification head."""

    model_class = MultiverseModel


class MultiverseForTokenClassification(MultiversePreTrainedModel, DecoderForTokenClassification):
    """`MultiverseModel` and a token classification head."""

    model_class = MultiverseModel


class MultiverseForQuestionAnswering(MultiversePreTrainedModel, DecoderForQuestionAnswering):
    """`MultiverseModel` and a question answering head."""

    model_class = MultiverseModel


__all__ = [
    "MultiverseConfig",
    "MultiverseForCausalLM",
    "MultiverseForQuestionAnswering",
    "MultiverseForSequenceClassification",
    "MultiverseForTokenClassification",
    "MultiverseModel",
    "MultiversePreTrainedModel",
]
