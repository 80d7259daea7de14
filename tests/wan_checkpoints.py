"""Small Wan checkpoints in every layout, written from the table of names below and not with the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS = 2
DIM, FFN, FREQ, TEXT, CHANNELS, HEADS = 128, 48, 16, 32, 4, 1
# Name in the original layout, name in diffusers', shape; `N` stands for the number of the block.
_ATTENTION = [
    *((f"{part}.{kind}", f"{theirs}.{kind}", (DIM, DIM) if kind == "weight" else (DIM,))
      for part, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
      for kind in ("weight", "bias")),
    ("norm_q.weight", "norm_q.weight", (DIM,)),
    ("norm_k.weight", "norm_k.weight", (DIM,)),
]  # fmt: skip
_BLOCK = [
    ("modulation", "scale_shift_table", (1, 6, DIM)),
    *((f"self_attn.{ours}", f"attn1.{theirs}", shape) for ours, theirs, shape in _ATTENTION),
    *((f"cross_attn.{ours}", f"attn2.{theirs}", shape) for ours, theirs, shape in _ATTENTION),
    ("norm3.weight", "norm2.weight", (DIM,)),
    ("norm3.bias", "norm2.bias", (DIM,)),
    ("ffn.0.weight", "ffn.net.0.proj.weight", (FFN, DIM)),
    ("ffn.0.bias", "ffn.net.0.proj.bias", (FFN,)),
    ("ffn.2.weight", "ffn.net.2.weight", (DIM, FFN)),
    ("ffn.2.bias", "ffn.net.2.bias", (DIM,)),
]
_EMBEDDER = "condition_embedder"
_GLOBAL = [
    ("patch_embedding.weight", "patch_embedding.weight", (DIM, CHANNELS, 1, 2, 2)),
    ("patch_embedding.bias", "patch_embedding.bias", (DIM,)),
    ("text_embedding.0.weight", f"{_EMBEDDER}.text_embedder.linear_1.weight", (DIM, TEXT)),
    ("text_embedding.0.bias", f"{_EMBEDDER}.text_embedder.linear_1.bias", (DIM,)),
    ("text_embedding.2.weight", f"{_EMBEDDER}.text_embedder.linear_2.weight", (DIM, DIM)),
    ("text_embedding.2.bias", f"{_EMBEDDER}.text_embedder.linear_2.bias", (DIM,)),
    ("time_embedding.0.weight", f"{_EMBEDDER}.time_embedder.linear_1.weight", (DIM, FREQ)),
    ("time_embedding.0.bias", f"{_EMBEDDER}.time_embedder.linear_1.bias", (DIM,)),
    ("time_embedding.2.weight", f"{_EMBEDDER}.time_embedder.linear_2.weight", (DIM, DIM)),
    ("time_embedding.2.bias", f"{_EMBEDDER}.time_embedder.linear_2.bias", (DIM,)),
    ("time_projection.1.weight", f"{_EMBEDDER}.time_proj.weight", (6 * DIM, DIM)),
    ("time_projection.1.bias", f"{_EMBEDDER}.time_proj.bias", (6 * DIM,)),
    ("head.modulation", "scale_shift_table", (1, 2, DIM)),
    ("head.head.weight", "proj_out.weight", (4 * CHANNELS, DIM)),
    ("head.head.bias", "proj_out.bias", (4 * CHANNELS,)),
]
DIFFUSERS: dict[str, Any] = {
    **{"_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0.dev0", "added_kv_proj_dim": None},
    **{"attention_head_dim": DIM // HEADS, "cross_attn_norm": True, "eps": 1e-06, "ffn_dim": FFN, "freq_dim": FREQ},
    **{"image_dim": None, "in_channels": CHANNELS, "num_attention_heads": HEADS, "num_layers": LAYERS},
    **{"out_channels": CHANNELS, "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads"},
    **{"rope_max_seq_len": 1024, "text_dim": TEXT},
}
ORIGINAL: dict[str, Any] = {
    **{"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": DIM, "eps": 1e-06, "ffn_dim": FFN},
    **{"freq_dim": FREQ, "in_dim": CHANNELS, "model_type": "t2v", "num_heads": HEADS, "num_layers": LAYERS},
    # Not stored for the published models, whose texts have 4096 channels.
    **{"out_dim": CHANNELS, "text_len": 512, "text_dim": TEXT},
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def table(layers: int = LAYERS) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name in the original layout, name in diffusers', shape) of every tensor."""
    rows = list(_GLOBAL)
    for index in range(layers):
        rows += [(f"blocks.{index}.{ours}", f"blocks.{index}.{theirs}", shape) for ours, theirs, shape in _BLOCK]
    return rows


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors by their original names."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (0.1 * torch.randn(shape, generator=generator)).to(dtype) for name, _, shape in table()}


def in_diffusers(original: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by diffusers' names."""
    return {theirs: original[ours] for ours, theirs, _ in table()}


def write(folder: Path, weights: dict[str, Tensor], fields: dict[str, Any], *, shards: int = 1) -> Path:
    """Write config.json and the weights, in one file or in shards with an index; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if shards == 1:
        save_file(weights, folder / WEIGHTS)
        return folder
    names = [f"diffusion_pytorch_model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    place = {name: names[index % shards] for index, name in enumerate(weights)}
    for file in names:
        save_file({name: tensor for name, tensor in weights.items() if place[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": place}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return folder


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; a field set to `...` is removed."""
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))
