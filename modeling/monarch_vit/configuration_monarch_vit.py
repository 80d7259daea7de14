"""Configuration of ViT as a registered vision encoder.

Annotations are evaluated in this file: `strict` does not check a type that is a string.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig

from hf_efficient.modeling.base.registered_config import RegisteredConfig
from hf_efficient.modeling.monarch.monarch_spec import MonarchFields, MonarchSpec


@strict
class MonarchViTConfig(RegisteredConfig, ViTConfig):
    """`ViTConfig` of transformers, whose fields keep their meaning, and three more.

    | field | meaning |
    |---|---|
    | `monarch` | settings of Monarch attention, the fields of `MonarchSpec`; None: softmax attention, as in ViT |
    | `source_model_type` | model type of transformers that the weights come from; None when trained from scratch |
    | `hfe_format` | version of the checkpoint layout |
    """

    model_type = "hfe_monarch_vit"
    peft_targets = "vit"
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
            ValueError: `hidden_size` is not a multiple of `num_attention_heads`, or `monarch` breaks a rule of
                `MonarchSpec`, has a layer that the model lacks, or blocks longer than the patches of an image.
        """
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.monarch is not None:
            spec = MonarchSpec.from_dict(self.monarch)
            spec.check_layers(self.num_hidden_layers)
            image, patch = ((x, x) if isinstance(x, int) else x for x in (self.image_size, self.patch_size))
            tokens = 1 + (image[0] // patch[0]) * (image[1] // patch[1])
            spec.check_length(tokens, "tokens of an image")


__all__ = ["MonarchViTConfig"]
