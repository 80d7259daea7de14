"""Reads GGUF files as transformers checkpoints.

Tensors get transformers' names, llama.cpp's reordering of q and k is undone, and the configuration comes from the
metadata.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_efficient.conversion.families.family import source_config
from hf_efficient.conversion.reading.gguf_file import GGUFFile
from hf_efficient.conversion.reading.rotary_order import to_rotate_half_order
from hf_efficient.errors import HFEError

_TOP_LEVEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Metadata key without the architecture's prefix -> configuration field.
_FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_ROPE_FREQUENCIES = "rope_freqs.weight"
# Further keys that are checked below or do not change the model's output.
_OTHER_KEYS = frozenset(
    (
        *("attention.key_length", "attention.value_length", "attention.causal", "attention.sliding_window"),
        *("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
        *("rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor"),
        *("expert_count", "expert_used_count", "vocab_size", "tensor_data_layout", "pooling_type"),
    )
)
# Factors that mean no scaling.
_UNSCALED = (None, 0, 1)
# File names of a model that llama.cpp split into several files.
_PART = re.compile(r".*-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)


class GGUFReader:
    """A `TensorReader` (see `tensor_reader.py`) for one GGUF file. Every tensor is dequantised to float32.

    Attributes:
        file: the parsed GGUF file.
        config: transformers' configuration of the model.

    Raises:
        HFEError: the file is damaged (see `GGUFFile`) or not supported (see `gguf_config`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFFile(path)
        self.config = gguf_config(self.file)
        self._stored = {stock_name(name): name for name in self.file.tensors if name != _ROPE_FREQUENCIES}

    def names(self) -> list[str]:
        """Names of the tensors in transformers' naming."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.file.tensors[self._stored[name]].shape

    def dtype(self, name: str) -> torch.dtype:
        """float32, since `read` dequantises."""
        return torch.float32

    def read(self, name: str) -> Tensor:
        """The tensor in float32, q and k reordered for transformers; `HFEError` for NaN, infinity or truncation."""
        tensor = self.file.read(self._stored[name])
        heads = self._interleaved_heads(name)
        return tensor if heads is None else to_rotate_half_order(tensor, heads)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """A copy of ``read(name)[start:stop]``, with the errors of `read`.

        Other rows are read only for vectors and for reordered tensors.
        """
        shape = self.shape(name)
        if len(shape) < 2 or self._interleaved_heads(name) is not None:
            return self.read(name)[start:stop].clone()
        return self.file.read_rows(self._stored[name], start, min(stop, shape[0]))

    def _interleaved_heads(self, name: str) -> int | None:
        """Number of heads of a tensor that llama.cpp stores with interleaved rotary channels; None for any other."""
        if self.file.metadata["general.architecture"] != "llama":
            return None
        if ".self_attn.q_proj." in name:
            return self.config.num_attention_heads
        return self.config.num_key_value_heads if ".self_attn.k_proj." in name else None


def stock_name(name: str) -> str:
    """The transformers name of a GGUF tensor. An unknown name is returned unchanged; `check_source` rejects it."""
    module, dot, suffix = name.rpartition(".")
    if module in _TOP_LEVEL:
        return _TOP_LEVEL[module] + dot + suffix
    in_layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    if in_layer and in_layer[2] in _IN_LAYER:
        return f"model.layers.{in_layer[1]}.{_IN_LAYER[in_layer[2]]}{dot}{suffix}"
    return name


def gguf_config(file: GGUFFile) -> PreTrainedConfig:
    """transformers' configuration of the model in a GGUF file, the same as that of transformers' GGUF loader.

    Mistral models are stored as llama files without their sliding window; both loaders give them full attention.

    Raises:
        HFEError: the file is one part of a split model, its architecture is not supported, a field is missing or
            invalid, or the metadata has a feature that is not supported (e.g. scaled RoPE, sliding windows).
    """
    metadata = file.metadata
    _check_not_split(file)
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise HFEError(
            f"{file.path.name} has GGUF architecture {architecture!r}, which is not a supported family; a "
            f"conversion supports {', '.join(_ARCHITECTURES)}",
            "choose a file of one of these, or convert from the original checkpoint",
        )

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    _check_rope_unscaled(file, architecture)
    _check_other_keys(file, architecture)
    fields: dict[str, Any] = {"model_type": architecture}
    for key, field in _FIELDS.items():
        if value(key) is None:
            raise HFEError(f"{file.path.name} lacks the metadata {architecture}.{key}", "write the file again")
        fields[field] = value(key)
        if isinstance(fields[field], list):
            raise HFEError(
                f"{file.path.name} has a {architecture}.{key} for each layer; a conversion supports one for all layers",
                "choose a model whose layers are all the same",
            )
        if isinstance(fields[field], bool) or not isinstance(fields[field], int | float):
            raise HFEError(
                f"{file.path.name} has {architecture}.{key} {str(fields[field])[:80]!r}, which is not a number",
                "write the file again",
            )
    fields["head_dim"] = value("attention.key_length") or value("rope.dimension_count")
    _check_head_dim(file, architecture, fields)
    if fields["head_dim"] is None or architecture == "qwen2":
        del fields["head_dim"]
    fields["rope_theta"] = value("rope.freq_base", 10000.0)
    fields["num_experts"] = value("expert_count", 0)
    if "token_embd.weight" in file.tensors:
        fields["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    if architecture != "qwen2":
        fields["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    for role in ("bos", "eos", "padding", "unknown"):
        token = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if token is not None:
            fields[{"padding": "pad", "unknown": "unk"}.get(role, role) + "_token_id"] = token
    if not fields["num_experts"]:
        del fields["num_experts"]
    return source_config(fields, f"the metadata of {file.path.name}")


def _check_not_split(file: GGUFFile) -> None:
    """Raise `HFEError` if the model is split into several files."""
    part = _PART.fullmatch(file.path.name)
    count = file.metadata.get("split.count") or (int(part[1]) if part else 1)
    if count != 1:
        raise HFEError(
            f"{file.path.name} is one of {count} files that a GGUF model was split into",
            "join them (`llama-gguf-split --merge FIRST_FILE WHOLE.gguf`) and name the whole file",
        )


def _check_rope_unscaled(file: GGUFFile, architecture: str) -> None:
    """Raise `HFEError` for scaled rotary frequencies: GGUF does not store all parameters of transformers' rope types.

    Any `scaling.type` but `none` counts as scaling, whatever its factor. Without a type, a factor (under its older name
    too, since llama.cpp reads it as linear scaling) or an attention factor other than 0 and 1 does. A tensor of
    frequency factors counts unless all are 1; an error in reading it (`GGUFFile.read`) is raised too.
    """

    def value(key: str) -> Any:
        return file.metadata.get(f"{architecture}.rope.{key}")

    kind, scaled = value("scaling.type"), False
    if kind is None:
        factors = {key: value(key) for key in ("scaling.factor", "scale_linear", "scaling.attn_factor")}
        kind = next((f"rope.{key} {factor}" for key, factor in factors.items() if factor not in _UNSCALED), "none")
    if kind == "none" and _ROPE_FREQUENCIES in file.tensors:
        kind = _ROPE_FREQUENCIES
        scaled = not bool((file.read(_ROPE_FREQUENCIES) == 1).all())
    elif kind != "none":
        scaled = True
    if scaled:
        raise HFEError(
            f"{file.path.name} scales its rotary frequencies ({kind}), which cannot be carried over from GGUF exactly",
            "convert from the original safetensors checkpoint",
        )


def _check_other_keys(file: GGUFFile, architecture: str) -> None:
    """Raise `HFEError` for unknown metadata keys with a value, bidirectional attention and effective sliding windows.

    A value of 0, false or an empty one counts as none; a window of at least the context length has no effect.
    An unknown key of the architecture may change what the model computes.
    """
    for key, value in file.metadata.items():
        prefix, _, name = key.partition(".")
        if prefix == architecture and name not in _FIELDS and name not in _OTHER_KEYS and value not in (0, "", []):
            raise HFEError(
                f"{file.path.name} sets {key}={str(value)[:80]}, which a conversion does not carry over",
                "convert from the original safetensors checkpoint",
            )
    if not file.metadata.get(f"{architecture}.attention.causal", True):
        raise HFEError(f"{file.path.name} has bidirectional attention (attention.causal)", "use a causal model")
    window = file.metadata.get(f"{architecture}.attention.sliding_window")
    context = file.metadata.get(f"{architecture}.context_length")
    if window and not (isinstance(window, int) and isinstance(context, int) and window >= context):
        raise HFEError(
            f"{file.path.name} has a sliding window of {window} positions, which transformers does not read from GGUF",
            "convert from the original safetensors checkpoint",
        )


def _check_head_dim(file: GGUFFile, architecture: str, fields: dict[str, Any]) -> None:
    """Raise `HFEError` unless q, k and v have one head_dim and RoPE applies to all of it."""
    heads = fields["num_attention_heads"] or 1
    expected = fields["hidden_size"] // heads if architecture == "qwen2" else fields["head_dim"]
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        width = file.metadata.get(f"{architecture}.{key}")
        if width not in (None, expected):
            raise HFEError(
                f"{file.path.name} has {architecture}.{key} {width} where heads are {expected} wide; a conversion "
                "takes one head_dim for all heads, rotated as a whole",
                "choose a model of another architecture",
            )


def gguf_special_tokens(file: GGUFFile) -> dict[str, int]:
    """`bos_token`, `eos_token`, `unk_token` and `pad_token` -> token id, as far as the metadata names them."""
    roles = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {token: file.metadata.get(f"tokenizer.ggml.{role}_token_id") for role, token in roles.items()}
    return {token: value for token, value in ids.items() if value is not None}
