"""BERT as a registered encoder: the classes of transformers with `MonarchBertConfig`.

Arguments and results of each `forward` are those of the class of transformers that the docstring names. The attention
is Monarch attention if the configuration's field `monarch` is set, else transformers' own; another one that the caller
names as `attn_implementation` runs in either case, see `MonarchEncoder`. B is the batch size, S the sequence length.
"""

from __future__ import annotations

# ruff: noqa: E402  (an older transformers lacks what is imported below, and this error names the release it takes)
from hf_efficient.modeling.base.tested_releases import check_transformers

check_transformers()

from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertPreTrainedModel,
)

from hf_efficient.modeling.monarch.monarch_encoder import MonarchEncoder
from hf_efficient.modeling.monarch_bert.configuration_monarch_bert import MonarchBertConfig


class MonarchBertPreTrainedModel(MonarchEncoder, BertPreTrainedModel):
    """Base class: creating a model checks its configuration again.

    Raises:
        StrictDataclassClassValidationError: (of huggingface_hub) a rule of `MonarchBertConfig` is violated.
    """

    config: MonarchBertConfig
    config_class = MonarchBertConfig  # set too: transformers does not resolve the string annotation above


class MonarchBertModel(MonarchBertPreTrainedModel, BertModel):
    """`BertModel`: hidden states [B, S, hidden_size] of token ids [B, S], and the pooled first position."""


class MonarchBertForMaskedLM(MonarchBertPreTrainedModel, BertForMaskedLM):
    """`BertForMaskedLM`: logits [B, S, vocab_size] of every position, and the loss at labels other than -100."""


class MonarchBertForSequenceClassification(MonarchBertPreTrainedModel, BertForSequenceClassification):
    """`BertForSequenceClassification`: logits [B, num_labels] of a text."""


class MonarchBertForTokenClassification(MonarchBertPreTrainedModel, BertForTokenClassification):
    """`BertForTokenClassification`: logits [B, S, num_labels] of its tokens."""


class MonarchBertForQuestionAnswering(MonarchBertPreTrainedModel, BertForQuestionAnswering):
    """`BertForQuestionAnswering`: logits [B, S] of an answer's first token and of its last."""


__all__ = [
    "MonarchBertConfig",
    "MonarchBertForMaskedLM",
    "MonarchBertForQuestionAnswering",
    "MonarchBertForSequenceClassification",
    "MonarchBertForTokenClassification",
    "MonarchBertModel",
    "MonarchBertPreTrainedModel",
]
