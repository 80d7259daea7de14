"""The decoder with any combination of patches, or none: the only modeling file that imports all patches."""

from __future__ import annotations

from transformers.generation import GenerationMixin

from hf_efficient.modeling.bhyt.modeling_bhyt import BhytForCausalLM, BhytModel, BhytPreTrainedModel
from hf_efficient.modeling.decoder.task_heads import (
    DecoderForQuestionAnswering,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
)
from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig
from hf_efficient.modeling.stem.modeling_stem import StemForCausalLM, StemModel, StemPreTrainedModel
from hf_efficient.modeling.topology.modeling_topology import (
    TopologyForCausalLM,
    TopologyModel,
    TopologyPreTrainedModel,
)


class EfficientDecoderPreTrainedModel(StemPreTrainedModel, BhytPreTrainedModel, TopologyPreTrainedModel):
    """Base class: configuration class, and what the base classes of all patches add."""

    config: EfficientDecoderConfig
    config_class = EfficientDecoderConfig  # set too: transformers does not resolve the string annotation above


class EfficientDecoderModel(EfficientDecoderPreTrainedModel, StemModel, BhytModel, TopologyModel):
    """`DecoderModel` with every patch whose fields the configuration sets."""


class EfficientDecoderForCausalLM(
    EfficientDecoderPreTrainedModel, StemForCausalLM, BhytForCausalLM, TopologyForCausalLM, GenerationMixin
):
    """`EfficientDecoderModel` and a language-model head."""

    model_class = EfficientDecoderModel


class EfficientDecoderForSequenceClassification(EfficientDecoderPreTrainedModel, DecoderForSequenceClassification):
    """`EfficientDecoderModel` and a sequence classification head."""

    model_class = EfficientDecoderModel


class EfficientDecoderForTokenClassification(EfficientDecoderPreTrainedModel, DecoderForTokenClassification):
    """`EfficientDecoderModel` and a token classification head."""

    model_class = EfficientDecoderModel


class EfficientDecoderForQuestionAnswering(EfficientDecoderPreTrainedModel, DecoderForQuestionAnswering):
    """`EfficientDecoderModel` and a question answering head."""

    model_class = EfficientDecoderModel


__all__ = [
    "EfficientDecoderConfig",
    "EfficientDecoderForCausalLM",
    "EfficientDecoderForQuestionAnswering",
    "EfficientDecoderForSequenceClassification",
    "EfficientDecoderForTokenClassification",
    "EfficientDecoderModel",
    "EfficientDecoderPreTrainedModel",
]
