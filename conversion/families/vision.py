"""The model family of image encoders: ViT models become classes of ours that derive from the stock ones."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig, ViTConfig
from transformers.utils import IMAGE_PROCESSOR_NAME

from hf_efficient.conversion.families.derived import DerivedFamily
from hf_efficient.conversion.families.family import FINE_TUNING, LORA
from hf_efficient.conversion.reading.config_fields import unread_fields
from hf_efficient.errors import HFEError
from hf_efficient.json_file import is_whole

# Part of a name -> what it was before transformers 5, which still writes the old names for stock models.
_OLD_PARTS = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_LAYER = re.compile(r"(|.*\.)layers\.(\d+)\.(.+)\.(weight|bias)")
_LARGEST_SIZE = 1 << 16


class VisionFamily(DerivedFamily):
    """Image encoders with bidirectional self-attention; see `ModelFamily` for the methods."""

    name = "image encoders"
    config_classes = {"vit": ViTConfig}
    prefixes = ("vit.",)
    # The mask token is of masked image modelling.
    other_heads = ("vit.pooler.", "pooler.", "vit.embeddings.mask_token", "embeddings.mask_token")
    companion_files = (IMAGE_PROCESSOR_NAME,)
    image_processor = "ViTImageProcessor"
    tensor_groups = {
        "attention": (".attention.",),
        "feed-forward": (".mlp.",),
        "embeddings and head": ("",),
    }
    inspected_fields = (
        *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size"),
        "num_channels",
    )
    pipeline_tags = {"AutoModel": "image-feature-extraction", "AutoModelForImageClassification": "image-classification"}
    not_evaluated = "it takes images, and there are no images to measure it on"

    def check_fields(self, fields: dict[str, Any], stock: PreTrainedConfig) -> list[str]:
        """As `ModelFamily.check_fields`, see `unread_fields`."""
        return unread_fields(fields, stock)

    def own_config(self, stock: PreTrainedConfig) -> PreTrainedConfig:
        """As `DerivedFamily.own_config`; `HFEError` also for sizes of image and patch that give no patch."""
        for name in ("image_size", "patch_size", "num_channels"):
            value = getattr(stock, name)
            sides = list(value) if isinstance(value, list | tuple) and name != "num_channels" else [value, value]
            if len(sides) != 2 or not all(is_whole(side, 1, _LARGEST_SIZE) for side in sides):
                raise HFEError(
                    f"config.json has {name}={str(value)[:80]}, not a whole number from 1 to {_LARGEST_SIZE}"
                    + ("" if name == "num_channels" else ", or two of them"),
                    "correct config.json",
                )
        if min(patch_grid(stock)) < 1:
            raise HFEError(
                f"config.json has image_size={stock.image_size} and patch_size={stock.patch_size}: no patch fits",
                "correct config.json",
            )
        return super().own_config(stock)

    def older_names(self, name: str) -> list[str]:
        """The name of a layer's tensor before transformers 5, such as `encoder.layer.0.output.dense.weight`."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return []
        prefix, layer, part, kind = match.groups()
        return [f"{prefix}encoder.layer.{layer}.{_OLD_PARTS.get(part, part)}.{kind}"]

    def evaluator(self, config: PreTrainedConfig) -> None:
        """None: nothing measures a model of images on text."""
        return

    def description(self, config: PreTrainedConfig) -> dict[str, str]:
        """Label -> text about layers, attention heads, patches and class, for `inspect`."""
        heads, (rows, columns) = config.num_attention_heads, patch_grid(config)
        return {
            "shape": f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, feed-forward "
            f"{config.intermediate_size}",
            "attention": f"{heads} heads of {config.hidden_size // heads}, bidirectional",
            "image": f"{rows} x {columns} patches of {config.patch_size}, {config.num_channels} channels",
            "class": config.architectures[0],
        }

    def snippets(self, auto_class: str, *, chat: bool) -> dict[str, str]:
        """Sentence -> code for the model's head and for LoRA."""
        label, code = ("Embedding of an image:", _EMBEDDING)
        if auto_class == "AutoModelForImageClassification":
            label, code = "Class of an image:", _CLASSIFY
        return {label: code, FINE_TUNING: LORA.format("").replace("tokenizer.", "processor.")}


def patch_grid(config: Any) -> tuple[int, int]:
    """(rows, columns) of patches in an image of the size in a configuration of ViT or of ours."""
    image, patch = ((x, x) if isinstance(x, int) else tuple(x) for x in (config.image_size, config.patch_size))
    return image[0] // patch[0], image[1] // patch[1]


VISION = VisionFamily()

_EMBEDDING = """from PIL import Image

inputs = processor(Image.open("picture.jpg").convert("RGB"), return_tensors="pt").to(model.device)
print(model(**inputs).last_hidden_state[:, 0])"""
_CLASSIFY = """from PIL import Image

inputs = processor(Image.open("picture.jpg").convert("RGB"), return_tensors="pt").to(model.device)
print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])"""
