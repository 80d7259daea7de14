"""Configuration of Bert as a registered encoder.

Annotations are evaluated in this file: `strict` does not check a type that is a string.
"""

from huggingface_hub.dataclasses import strict
from transformers import BertConfig

from hf_efficient.modeling.monarch.encoder_config import MonarchEncoderConfig


@strict
class MonarchBertConfig(MonarchEncoderConfig, BertConfig):
    """`BertConfig` of transformers, whose fields keep their meaning, and those of `MonarchEncoderConfig`."""

    model_type = "hfe_monarch_bert"
    peft_targets = "bert"

    monarch: dict | None = None
    source_model_type: str | None = None
    hfe_format: int = 1

    def longest_input(self) -> tuple[int, str]:
        """Positions of a text, and their name."""
        return self.max_position_embeddings, "max_position_embeddings"


__all__ = ["MonarchBertConfig"]
