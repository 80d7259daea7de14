"""ViT as a registered vision encoder: the classes of transformers with `MonarchViTConfig`.

Arguments and results of each `forward` are those of the class of transformers that the docstring names. B is the batch
size; S is the number of tokens of an image, one class token and the patches.
"""

from __future__ import annotations

# ruff: noqa: E402  (an older transformers lacks what is imported below, and this error names the release it takes)
from hf_efficient.modeling.base.tested_releases import check_transformers

check_transformers()

from transformers import ViTForImageClassification, ViTModel, ViTPreTrainedModel

from hf_efficient.modeling.monarch.monarch_encoder import MonarchEncoder
from hf_efficient.modeling.monarch_vit.configuration_monarch_vit import MonarchViTConfig


class MonarchViTPreTrainedModel(MonarchEncoder, ViTPreTrainedModel):
    """Base class: creating a model checks its configuration again.

    Raises:
        StrictDataclassClassValidationError: (of huggingface_hub) a rule of `MonarchViTConfig` is violated.
    """

    config: MonarchViTConfig
    config_class = MonarchViTConfig  # set too: transformers does not resolve the string annotation above


class MonarchViTModel(MonarchViTPreTrainedModel, ViTModel):
    """`ViTModel`: hidden states [B, S, hidden_size] of images [B, channels, height, width], and the pooled first."""


class MonarchViTForImageClassification(MonarchViTPreTrainedModel, ViTForImageClassification):
    """`ViTForImageClassification`: logits [B, num_labels] of an image."""


__all__ = ["MonarchViTConfig", "MonarchViTForImageClassification", "MonarchViTModel", "MonarchViTPreTrainedModel"]
