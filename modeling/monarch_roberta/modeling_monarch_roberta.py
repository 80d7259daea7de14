"""RoBERTa as a registered encoder: the classes of transformers with `MonarchRobertaConfig`.

Arguments and results of each `forward` are those of the class of transformers that the docstring names. The attention
is Monarch attention if the configuration's field `monarch` is set, else transformers' own; another one that the caller
names as `attn_implementation` runs in either case, see `MonarchEncoder`. B is the batch size, S the sequence length.
"""

from __future__ import annotations

# ruff: noqa: E402  (an older transformers lacks what is imported below, and this error names the release it takes)
from hf_efficient.modeling.base.tested_releases import check_transformers

check_transformers()

from transformers import (
    RobertaForMaskedLM,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
    RobertaPreTrainedModel,
)

from hf_efficient.modeling.monarch.monarch_encoder import MonarchEncoder
from hf_efficient.modeling.monarch_roberta.configuration_monarch_roberta import MonarchRobertaConfig


class MonarchRobertaPreTrainedModel(MonarchEncoder, RobertaPreTrainedModel):
    """Base class: creating a model checks its configuration again.

    Raises:
        StrictDataclassClassValidationError: (of huggingface_hub) a rule of `MonarchRobertaConfig` is violated.
    """

    config: MonarchRobertaConfig
    config_class = MonarchRobertaConfig  # set too: transformers does not resolve the string annotation above


class MonarchRobertaModel(MonarchRobertaPreTrainedModel, RobertaModel):
    """`RobertaModel`: hidden states [B, S, hidden_size] of token ids [B, S], and the pooled first position."""


class MonarchRobertaForMaskedLM(MonarchRobertaPreTrainedModel, RobertaForMaskedLM):
    """`RobertaForMaskedLM`: logits [B, S, vocab_size] of every position, and the loss at labels other than -100."""


class MonarchRobertaForSequenceClassification(MonarchRobertaPreTrainedModel, RobertaForSequenceClassification):
    """`RobertaForSequenceClassification`: logits [B, num_labels] of a text."""


class MonarchRobertaForTokenClassification(MonarchRobertaPreTrainedModel, RobertaForTokenClassification):
    """`RobertaForTokenClassification`: logits [B, S, num_labels] of its tokens."""


class MonarchRobertaForQuestionAnswering(MonarchRobertaPreTrainedModel, RobertaForQuestionAnswering):
    """`RobertaForQuestionAnswering`: logits [B, S] of an answer's first token and of its last."""


__all__ = [
    "MonarchRobertaConfig",
    "MonarchRobertaForMaskedLM",
    "MonarchRobertaForQuestionAnswering",
    "MonarchRobertaForSequenceClassification",
    "MonarchRobertaForTokenClassification",
    "MonarchRobertaModel",
    "MonarchRobertaPreTrainedModel",
]
