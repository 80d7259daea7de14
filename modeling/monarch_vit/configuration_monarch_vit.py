"""Configuration of ViT as a registered vision encoder.

Annotations are evaluated in this file: `strict` does not check a type that is a string.
"""

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig

from hf_efficient.modeling.monarch.encoder_config import MonarchEncoderConfig


@strict
class MonarchViTConfig(MonarchEncoderConfig, ViTConfig):
    """`ViTConfig` of transformers, whose fields keep their meaning, and those of `MonarchEncoderConfig`."""

    model_type = "hfe_monarch_vit"
    peft_targets = "vit"

    monarch: dict | None = None
    source_model_type: str | None = None
    hfe_format: int = 1

    def longest_input(self) -> tuple[int, str]:
        """Patches of an image with the class token, and what they are called."""
        image, patch = ((x, x) if isinstance(x, int) else x for x in (self.image_size, self.patch_size))
        return 1 + (image[0] // patch[0]) * (image[1] // patch[1]), "tokens of an image"


__all__ = ["MonarchViTConfig"]
