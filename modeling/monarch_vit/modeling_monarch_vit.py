"""ViT as a registered vision encoder: the classes of transformers with `MonarchViTConfig`.

Arguments and results of each `forward` are those of the class of transformers that the docstring names. The attention
is Monarch attention if the configuration's field `monarch` is set, else transformers' own; another one that the caller
names as `attn_implementation` runs in either case, see `MonarchEncoder`. B is the batch size; S is the number of tokens
of an image, one class token and the patches.
"""

from __future__ import annotations

# ruff: noqa: E402  (an older transformers lacks what is imported below, and this error names the release it takes)
from hf_efficient.modeling.base.tested_releases import check_transformers

check_transformers()

from typing import Any

from transformers import ViTForImageClassification, ViTModel, ViTPreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from hf_efficient.modeling.monarch.monarch_encoder import MonarchEncoder
from hf_efficient.modeling.monarch_vit.configuration_monarch_vit import MonarchViTConfig


class MonarchViTPreTrainedModel(MonarchEncoder, ViTPreTrainedModel):
    """Base class: creating a model checks its configuration again.

    Raises:
        StrictDataclassClassValidationError: (of huggingface_hub) a rule of `MonarchViTConfig` is violated.
    """

    config: MonarchViTConfig
    config_class = MonarchViTConfig  # set too: transformers does not resolve the string annotation above

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As in transformers, but tensors are saved under the names of their modules.

        With ``save_original_format=True`` they get those of transformers 4, as in a stock ViT, which
        `hf-efficient verify` does not read.
        """
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class MonarchViTModel(MonarchViTPreTrainedModel, ViTModel):
    """`ViTModel`: hidden states [B, S, hidden_size] of images [B, channels, height, width], and the pooled first."""

    def __init__(self, config: MonarchViTConfig, *args: Any, **kwargs: Any) -> None:
        # Files of stock models have the names of transformers 4, such as `encoder.layer.0.attention.output.dense`.
        # Loading renames them by a table of classes, which takes long to build, so that importing this file does not.
        if get_checkpoint_conversion_mapping(MonarchViTModel.__name__) is None:
            renamings = get_checkpoint_conversion_mapping(ViTModel.__name__)
            register_checkpoint_conversion_mapping(MonarchViTModel.__name__, renamings)
        super().__init__(config, *args, **kwargs)


class MonarchViTForImageClassification(MonarchViTPreTrainedModel, ViTForImageClassification):
    """`ViTForImageClassification`: logits [B, num_labels] of an image."""

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As in transformers, but tensors are saved under the names of their modules.

        With ``save_original_format=True`` they get those of transformers 4, as in a stock ViT, which `MonarchViTModel`
        and `hf-efficient verify` do not read.
        """
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


__all__ = ["MonarchViTConfig", "MonarchViTForImageClassification", "MonarchViTModel", "MonarchViTPreTrainedModel"]
