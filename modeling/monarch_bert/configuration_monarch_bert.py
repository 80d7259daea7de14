"""Configuration of BERT as a registered encoder.

Annotations are evaluated in this file: `strict` does not check a type that is a string.
"""

from huggingface_hub.dataclasses import strict
from transformers import BertConfig

from hf_efficient.modeling.base.registered_config import RegisteredConfig


@strict
class MonarchBertConfig(RegisteredConfig, BertConfig):
    """`BertConfig` of transformers, whose fields keep their meaning, and two more.

    | field | meaning |
    |---|---|
    | `source_model_type` | model type of transformers that the weights come from; None when trained from scratch |
    | `hfe_format` | version of the checkpoint layout |
    """

    model_type = "hfe_monarch_bert"
    peft_targets = "bert"

    source_model_type: str | None = None
    hfe_format: int = 1

    def validate_architecture(self) -> None:
        """Check the fields against each other.

        Called when a configuration is created, which then raises `StrictDataclassClassValidationError` of
        huggingface_hub, caused by this error.

        Raises:
            ValueError: `hidden_size` is not a multiple of `num_attention_heads`, or the model would be a decoder.
        """
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.is_decoder or self.add_cross_attention:
            raise ValueError("is_decoder and add_cross_attention must be False: the model is an encoder")


__all__ = ["MonarchBertConfig"]
