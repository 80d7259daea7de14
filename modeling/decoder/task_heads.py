"""Models with the task heads of transformers: sequence and token classification, question answering.

`forward` is that of transformers' generic classes (`GenericForSequenceClassification`, ...). The classes of an
architecture only set `model_class`, the class of their base model.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig
from hf_efficient.modeling.decoder.modeling_decoder import DecoderModel, DecoderPreTrainedModel


class TaskHead:
    """Mixin that creates the base model from `model_class` and the head by `build_head`.

    The generic classes would use `AutoModel`, where the classes of code exported into a checkpoint are not registered.
    """

    model_class: type[DecoderModel] = DecoderModel

    def __init__(self, config: DecoderConfig) -> None:
        DecoderPreTrainedModel.__init__(cast(DecoderPreTrainedModel, self), config)
        self.model = self.model_class(config)
        self.build_head(config)
        cast(DecoderPreTrainedModel, self).post_init()

    def build_head(self, config: DecoderConfig) -> None:
        """Set the modules that the `forward` of transformers' generic class calls; each subclass implements it."""
        raise NotImplementedError


class DecoderForSequenceClassification(TaskHead, GenericForSequenceClassification, DecoderPreTrainedModel):
    """A `DecoderModel` and a linear layer on the last token that is not padding: `logits` [B, num_labels]."""

    def build_head(self, config: DecoderConfig) -> None:
        """Set the head `score`, a linear layer without bias."""
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)


class DecoderForTokenClassification(TaskHead, GenericForTokenClassification, DecoderPreTrainedModel):
    """A `DecoderModel`, dropout and a linear layer on every token: `logits` [B, S, num_labels]."""

    def build_head(self, config: DecoderConfig) -> None:
        """Set dropout and head; the rate is `config.classifier_dropout`, by default 0.1."""
        self.num_labels = config.num_labels
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)


class DecoderForQuestionAnswering(TaskHead, GenericForQuestionAnswering, DecoderPreTrainedModel):
    """A `DecoderModel` and a linear layer on every token: `start_logits` and `end_logits` of an answer, [B, S]."""

    def build_head(self, config: DecoderConfig) -> None:
        """Set the head `qa_outputs`, with one output for the start and one for the end of an answer."""
        self.qa_outputs = nn.Linear(config.hidden_size, 2)


__all__ = ["DecoderForQuestionAnswering", "DecoderForSequenceClassification", "DecoderForTokenClassification"]
