"""The model family of video diffusion transformers: Wan 2.1 text-to-video, of diffusers and of its authors' code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_efficient.conversion.architecture import architecture_of, runtime_fields
from hf_efficient.conversion.families.family import FINE_TUNING, LORA, Layout, ModelFamily
from hf_efficient.conversion.patch import bibtex
from hf_efficient.conversion.reading.checkpoint_files import weight_files
from hf_efficient.conversion.reading.config_fields import unread_fields
from hf_efficient.conversion.wan.layouts import LAYOUTS, WEIGHTS, layout_of
from hf_efficient.conversion.wan.stock_config import CLASSES, WanConfig, read_fields, stock_fields
from hf_efficient.conversion.wan.tensor_names import stored_names
from hf_efficient.errors import HFEError, error_text
from hf_efficient.modeling.monarch_wan.configuration_monarch_wan import MonarchWanConfig
from hf_efficient.modeling.monarch_wan.modeling_monarch_wan import MonarchWanModel

if TYPE_CHECKING:
    from hf_efficient.conversion.measuring.evaluation import Evaluator

# Fields of a configuration that describe the file or the class, not the model.
_FILE_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")
# Largest accepted values of fields that `checked_fields` does not know, far above those of any model.
_MAX_SIZES = {
    **dict.fromkeys(("in_channels", "out_channels", "text_dim", "freq_dim", "text_len", "rope_max_seq_len"), 1 << 20),
    "patch_size": 1 << 10,
}


class VideoFamily(ModelFamily):
    """Transformers that predict the flow of noisy video latents from a text; see `ModelFamily` for the methods."""

    name = "video transformers"
    config_classes = {WanConfig.model_type: WanConfig}
    tensor_groups = {
        "self-attention": (".self_attn.",),
        "cross-attention": (".cross_attn.", ".norm3."),
        "feed-forward": (".ffn.",),
        "embeddings, modulation and head": ("",),
    }
    inspected_fields = (
        *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "in_channels"),
        *("out_channels", "patch_size", "text_dim", "text_len", "variant"),
    )
    pipeline_tags = {"AutoModel": "text-to-video"}
    companion_files = ()
    subfolders = ("transformer",)
    layouts = LAYOUTS
    patch_notes = {
        "monarch": "In Monarch attention for video (arXiv:2602.12271) the self-attention of a block is approximated by "
        "products of block-diagonal matrices over tiles of the token grid. The weights are the source's, bit for bit, "
        "and the cross-attention to the text is exact. **The approximation is lossy**: videos differ from the "
        "source's. It saves time where a video has tens of thousands of tokens, and where attention is spread or "
        "follows position; heads that attend to a few tokens far apart suffer most. `monarch` in config.json has the "
        "tiles: `h_reduce` 2, the default of the conversion, is the setting for weights that were not trained with "
        "Monarch attention, and `h_reduce` 1 is only for fine-tuned weights. With `monarch` set to null the model is "
        "the source model again."
    }
    patch_citations = {
        "monarch": bibtex(
            "agarwal2026monarchrt",
            "MonarchRT: Efficient Attention for Real-Time Video Generation",
            "Agarwal, Krish and Chen, Zhuoming and Luo, Cheng and Chen, Yongqi and Zheng, Haizhong and Huang, Xun and "
            "Rudra, Atri and Chen, Beidi",
            "2602.12271",
        )
    }
    not_evaluated = "a video model predicts no tokens of a text"

    def supports(self, fields: Mapping[str, Any]) -> bool:
        """True if `_class_name`, which diffusers and the authors' code write, is that of a Wan transformer."""
        return fields.get("_class_name") in CLASSES or super().supports(fields)

    def check_source(self, fields: Mapping[str, Any]) -> None:
        """Raise `HFEError` for a model of diffusers of another class, such as a transformer for images."""
        name = fields.get("_class_name")
        if name is not None and name not in CLASSES:
            raise HFEError(
                f"config.json names the class _class_name={str(name)[:80]!r} of diffusers; conversions support "
                f"{', '.join(CLASSES)}",
                "name the folder or repository of a Wan 2.1 text-to-video model",
            )

    def stock_fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        """As `ModelFamily.stock_fields`, see `conversion/wan/stock_config.py`."""
        return stock_fields(fields)

    def check_fields(self, fields: dict[str, Any], stock: PreTrainedConfig) -> list[str]:
        """As `ModelFamily.check_fields`; `HFEError` for unknown fields that by their name change the result."""
        return unread_fields(fields, stock, read=read_fields(fields) if "_class_name" in fields else ())

    def own_config(self, stock: PreTrainedConfig) -> MonarchWanConfig:
        """As `ModelFamily.own_config`: the same fields, with softmax attention unless `stock` is one of ours."""
        fields = {name: value for name, value in stock.to_dict().items() if name not in _FILE_FIELDS}
        for name in runtime_fields():
            fields.pop(name, None)
        if architecture_of(stock.model_type) is None:
            fields["source_model_type"] = stock.model_type
        try:
            config = MonarchWanConfig(**fields, architectures=[MonarchWanModel.__name__])
        # For a field of a wrong type or value huggingface_hub raises its own error classes.
        except Exception as error:
            cause = error_text(error, most=None)
            raise HFEError(
                f"config.json does not describe a Wan transformer: {cause}", "correct config.json"
            ) from error
        for name, most in _MAX_SIZES.items():
            value = getattr(config, name)
            if max(value if isinstance(value, list) else [value]) > most:
                raise HFEError(f"config.json has {name}={value}, more than {most}", "correct config.json")
        return config

    def auto_class(self, stock: PreTrainedConfig) -> str:
        """`AutoModel`: there is one class."""
        return "AutoModel"

    def skeleton(self, config: PreTrainedConfig) -> nn.Module:
        """The model of `config` on the meta device."""
        with torch.device("meta"):
            return MonarchWanModel(self.own_config(config))

    def stored_names(self, names: set[str], expected: set[str]) -> dict[str, str]:
        """As `ModelFamily.stored_names`: names of diffusers or of the authors' code, with or without a prefix.

        Raises:
            HFEError: the checkpoint has names of both, or tensors of an image-to-video model.
        """
        return stored_names(names, expected)

    def reason_to_leave_out(self, name: str) -> str:
        """An empty text: every tensor of a source is one of the model."""
        return ""

    def evaluator(self, config: PreTrainedConfig) -> Evaluator | None:
        """None."""
        return None

    def weight_file_names(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """`diffusion_pytorch_model.safetensors` or its index; the names of transformers for a checkpoint of ours."""
        if "_class_name" not in fields:
            return super().weight_file_names(fields)
        return (WEIGHTS, f"{WEIGHTS}.index.json")

    def weight_files(self, folder: Path, fields: dict[str, Any], name: str) -> list[Path]:
        """As `ModelFamily.weight_files`, by the names of `weight_file_names`."""
        if "_class_name" not in fields:
            return super().weight_files(folder, fields, name)
        names = self.weight_file_names(fields)
        found = next((each for each in names if (folder / each).is_file()), names[0])
        return weight_files(folder, {"transformers_weights": found}, name)

    def layout(self, name: str, config: PreTrainedConfig) -> Layout:
        """As `ModelFamily.layout`: `diffusers` or `original`, see `conversion/wan/layouts.py`."""
        return layout_of(name, self.own_config(config))

    def description(self, config: PreTrainedConfig) -> dict[str, str]:
        """Label -> text about blocks, attention and the latents, for `inspect`."""
        causal = f"causal, chunks of {config.num_frames_per_block} frames" if config.variant == "causal" else ""
        patch = " x ".join(map(str, config.patch_size))
        return {
            "shape": f"{config.num_hidden_layers} blocks, hidden {config.hidden_size}, feed-forward "
            f"{config.intermediate_size}",
            "attention": f"{config.num_attention_heads} heads of {config.head_dim}, {causal or 'bidirectional'}",
            "latents": f"{config.in_channels} channels, {patch} of them (frame, height, width) in a token",
            "text": f"{config.text_len} tokens of {config.text_dim} channels",
        }

    def snippets(self, auto_class: str, *, chat: bool) -> dict[str, str]:
        """Sentence -> code that denoises latents, that uses the weights in a pipeline of diffusers, and for LoRA."""
        without_tokenizer = LORA.format("").rpartition("\n")[0]
        return {_SAMPLING: _SAMPLE, _IN_DIFFUSERS: _PIPELINE, FINE_TUNING: without_tokenizer}


VIDEO = VideoFamily()

_SAMPLING = """Latents of a video. Text encoder and autoencoder are those of Wan 2.1, which diffusers has; `text` and
`negative` are texts that its pipeline's `encode_prompt` embedded, [1, 512, 4096]:"""
_SAMPLE = """import torch

model = model.to("cuda", torch.bfloat16)
noise = torch.randn(1, 16, 21, 60, 104, device="cuda")  # 81 frames of 480 x 832 pixels
if model.config.variant == "causal":
    latents = model.sample_chunks(noise, text)
else:
    latents = model.sample(noise, text, negative, guidance_scale=5.0, timesteps=50, shift=3.0)"""
_IN_DIFFUSERS = """The same weights in a pipeline of diffusers, for models that are not causal, after
`hf-efficient export FOLDER wan-diffusers --to diffusers` (`pip install 'hf-efficient[diffusers]'`):"""
_PIPELINE = """import torch
from diffusers import WanPipeline, WanTransformer3DModel
from hf_efficient import enable_monarch_wan

transformer = WanTransformer3DModel.from_pretrained("wan-diffusers", torch_dtype=torch.bfloat16)
pipeline = WanPipeline.from_pretrained(
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", transformer=transformer, torch_dtype=torch.bfloat16
).to("cuda")
enable_monarch_wan(pipeline, h_reduce=2)
frames = pipeline("A cat on a windowsill, rain outside.", height=480, width=832, num_frames=81).frames[0]"""
