"""What the configurations of the registered encoders with Monarch attention share.

Annotations are evaluated in this file: `strict` does not check a type that is a string.
"""

from typing import Any, ClassVar

from hf_efficient.modeling.base.registered_config import RegisteredConfig
from hf_efficient.modeling.monarch.monarch_spec import MonarchFields, MonarchSpec


class MonarchEncoderConfig(RegisteredConfig):
    """Mixin before the configuration of a stock encoder; the class that it is mixed into has these fields:

    | field | meaning |
    |---|---|
    | `monarch` | settings of Monarch attention, the fields of `MonarchSpec`; None: softmax attention |
    | `source_model_type` | model type of transformers that the weights come from; None when trained from scratch |
    | `hfe_format` | version of the checkpoint layout |
    """

    # JSON types of fields whose annotation says only `dict`; verification checks config.json against them.
    field_types: ClassVar[dict[str, Any]] = {"monarch": MonarchFields | None}

    # Fields of the class that this is mixed into.
    monarch: Any
    hidden_size: Any
    num_attention_heads: Any
    num_hidden_layers: Any

    def __post_init__(self, **kwargs: Any) -> None:
        if self.monarch is not None:
            self.monarch = MonarchSpec.from_dict(self.monarch).to_dict()
        super().__post_init__(**kwargs)  # of the configuration after it

    @property
    def active_patches(self) -> list[str]:
        """Names of the patches that this configuration has: `monarch` if that field is set."""
        return ["monarch"] if self.monarch is not None else []

    def longest_input(self) -> tuple[int, str]:
        """Tokens of the longest input, and what a message calls their number."""
        raise NotImplementedError

    def validate_architecture(self) -> None:
        """Check the fields against each other.

        Called when a configuration is created, which then raises `StrictDataclassClassValidationError` of
        huggingface_hub, caused by this error.

        Raises:
            ValueError: `hidden_size` is not a multiple of `num_attention_heads`, the model would be a decoder, or
                `monarch` breaks a rule of `MonarchSpec`, has a layer that the model lacks, or blocks longer than the
                longest input.
        """
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        # Vision models have neither field.
        if getattr(self, "is_decoder", False) or getattr(self, "add_cross_attention", False):
            raise ValueError("is_decoder and add_cross_attention must be False: the model is an encoder")
        if self.monarch is not None:
            spec = MonarchSpec.from_dict(self.monarch)
            spec.check_layers(self.num_hidden_layers)
            spec.check_length(*self.longest_input())


__all__ = ["MonarchEncoderConfig"]
