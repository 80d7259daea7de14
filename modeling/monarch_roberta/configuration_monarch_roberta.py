"""Configuration of Roberta as a registered encoder.

Annotations are evaluated in this file: `strict` does not check a type that is a string.
"""

from huggingface_hub.dataclasses import strict
from transformers import RobertaConfig

from hf_efficient.modeling.monarch.encoder_config import MonarchEncoderConfig


@strict
class MonarchRobertaConfig(MonarchEncoderConfig, RobertaConfig):
    """`RobertaConfig` of transformers, whose fields keep their meaning, and those of `MonarchEncoderConfig`."""

    model_type = "hfe_monarch_roberta"
    peft_targets = "roberta"

    monarch: dict | None = None
    source_model_type: str | None = None
    hfe_format: int = 1

    def longest_input(self) -> tuple[int, str]:
        """Positions of a text, and their name."""
        # Positions are counted from `pad_token_id + 1` on, so the first rows of the table are never used.
        unused = 1 + (self.pad_token_id or 0)
        return self.max_position_embeddings - unused, f"max_position_embeddings-{unused}"


__all__ = ["MonarchRobertaConfig"]
