"""Configuration of RoBERTa as a registered encoder.

Annotations are evaluated in this file: `strict` does not check a type that is a string.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import RobertaConfig

from hf_efficient.modeling.base.registered_config import RegisteredConfig
from hf_efficient.modeling.monarch.monarch_spec import MonarchFields, MonarchSpec


@strict
class MonarchRobertaConfig(RegisteredConfig, RobertaConfig):
    """`RobertaConfig` of transformers, whose fields keep their meaning, and three more.

    | field | meaning |
    |---|---|
    | `monarch` | settings of Monarch attention, the fields of `MonarchSpec`; None: softmax attention, as in RoBERTa |
    | `source_model_type` | model type of transformers that the weights come from; None when trained from scratch |
    | `hfe_format` | version of the checkpoint layout |
    """

    model_type = "hfe_monarch_roberta"
    peft_targets = "roberta"
    # JSON types of fields whose annotation says only `dict`; verification checks config.json against them.
    field_types = {"monarch": MonarchFields | None}

    monarch: dict | None = None
    source_model_type: str | None = None
    hfe_format: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.monarch is not None:
            self.monarch = MonarchSpec.from_dict(self.monarch).to_dict()
        super().__post_init__(**kwargs)

    @property
    def active_patches(self) -> list[str]:
        """Names of the patches that this configuration has: `monarch` if that field is set."""
        return ["monarch"] if self.monarch is not None else []

    def validate_architecture(self) -> None:
        """Check the fields against each other.

        Called when a configuration is created, which then raises `StrictDataclassClassValidationError` of
        huggingface_hub, caused by this error.

        Raises:
            ValueError: `hidden_size` is not a multiple of `num_attention_heads`, the model would be a decoder, or
                `monarch` breaks a rule of `MonarchSpec`, has a layer that the model lacks, or blocks longer than
                the longest text.
        """
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.is_decoder or self.add_cross_attention:
            raise ValueError("is_decoder and add_cross_attention must be False: the model is an encoder")
        if self.monarch is not None:
            spec = MonarchSpec.from_dict(self.monarch)
            spec.check_layers(self.num_hidden_layers)
            # Positions are counted from `pad_token_id + 1` on, so the first rows of the table are never used.
            unused = 1 + (self.pad_token_id or 0)
            spec.check_length(self.max_position_embeddings - unused, f"max_position_embeddings-{unused}")


__all__ = ["MonarchRobertaConfig"]
