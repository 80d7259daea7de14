"""A source is read as transformers reads it, or refused: the same files, the same names, the same fields."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_efficient.conversion.plan import check_source
from hf_efficient.conversion.reading.source import open_source
from hf_efficient.convert_checkpoint import convert
from hf_efficient.errors import HFEError
from hf_efficient.inspection import inspect
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import EfficientDecoderForCausalLM

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Edit = Callable[[Path], Any]


def fields(name: str = "config.json", **changes: Any) -> Edit:
    """Set fields of config.json, and write it under another name if one is given."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / name).write_text(json.dumps({**config, **changes}))

    return edit


def rotary(**parameters: Any) -> Edit:
    """`rope_theta` and `rope_scaling`, the older form of `rope_parameters` that most checkpoints have."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.pop("rope_parameters", None)
        (folder / "config.json").write_text(json.dumps({**config, **parameters}))

    return edit


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], name: str = WEIGHTS) -> Edit:
    def edit(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / name, metadata={"format": "pt"})

    return edit


def scaled(factor: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda stored: {name: tensor * factor for name, tensor in stored.items()}


def without_prefix(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in stored.items()}


def partly_without_prefix(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model.") if "mlp" in name else name: tensor for name, tensor in stored.items()}


def head_only(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in stored.items()}


def stale_index(folder: Path, *, shards: bool) -> None:
    """Add an index of shards, as it remains when a sharded model is saved again as one file."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    new = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    model.save_pretrained(folder, max_shard_size="20KB")
    if not shards:
        for path in folder.glob("model-*"):
            path.unlink()
    (folder / WEIGHTS).write_bytes(new)


def several(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def named_index(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder / "parts", max_shard_size="20KB")
    tensors(scaled(0.5))(folder)
    index = json.loads((folder / "parts" / INDEX).read_text())
    for shard in set(index["weight_map"].values()):
        (folder / "parts" / shard).rename(folder / shard)
    shutil.rmtree(folder / "parts")
    (folder / "own.safetensors.index.json").write_text(json.dumps(index))
    fields(transformers_weights="own.safetensors.index.json")(folder)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
LONG = {"type": "longrope", "factor": 4.0, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
HARMLESS = {
    **{"pretraining_tp": 2, "is_llama_config": True, "rope_interleaved": False, "unsloth_version": "2025.1"},
    **{"transformers.js_config": {"dtype": "q4"}, "tokenizer_class": "X", "use_sliding_window": True},
    **{"temperature": 0.5, "_attn_implementation_autoset": True, "torch_dtype": "float32", "seq_length": 5},
}

SAME: dict[str, tuple[str, Edit]] = {
    "stale index, shards gone": ("llama", lambda folder: stale_index(folder, shards=False)),
    "stale index and its shards": ("llama", lambda folder: stale_index(folder, shards=True)),
    "transformers_weights": (
        "llama",
        several(tensors(scaled(0.5), "own.safetensors"), fields(transformers_weights="own.safetensors")),
    ),
    "transformers_weights, index": ("llama", named_index),
    "configuration_files": (
        "llama",
        several(
            fields("config.5.1.0.json", rms_norm_eps=0.5),
            fields("config.99.0.0.json", rms_norm_eps=7.0),
            fields(configuration_files=["config.json", "config.5.1.0.json", "config.99.0.0.json"]),
        ),
    ),
    "configuration_files, none old enough": (
        "llama",
        several(fields("config.99.0.0.json", rms_norm_eps=7.0), fields(configuration_files=["config.99.0.0.json"])),
    ),
    "base model": ("llama-tied", tensors(without_prefix)),
    "base model of a head": ("llama", tensors(without_prefix)),
    "some names without prefix": ("qwen3", tensors(partly_without_prefix)),
    "tied, the head alone stored": ("llama-tied", tensors(head_only)),
    "tied, both stored": (
        "qwen2-window",
        tensors(lambda stored: {**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}),
    ),
    "theta alone": ("llama", rotary(rope_theta=500.0)),
    "theta beside parameters": ("llama", fields(rope_theta=500.0)),
    "linear": ("llama", rotary(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 3.0})),
    "dynamic, short": ("llama", rotary(rope_scaling={"type": "dynamic", "factor": 2.0})),
    "dynamic, long": ("llama", rotary(max_position_embeddings=8, rope_scaling={"type": "dynamic", "factor": 2.0})),
    "yarn": ("qwen2", rotary(rope_theta=500.0, rope_scaling=YARN)),
    "yarn, original length outside": (
        "qwen2",
        rotary(original_max_position_embeddings=8, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    ),
    "llama3": ("llama", rotary(rope_scaling=LLAMA3)),
    "longrope, short": ("llama", rotary(rope_scaling=LONG)),
    "longrope, long": ("llama", rotary(rope_scaling=LONG, original_max_position_embeddings=8)),
    "head_dim null": ("llama", fields(head_dim=None)),
    "windows that are not used": ("qwen2", fields(use_sliding_window=False, sliding_window=4, max_window_layers=0)),
    "windows from a layer on": (
        "qwen3",
        fields(use_sliding_window=True, sliding_window=4, max_window_layers=2, layer_types=None),
    ),
    "layer_types": (
        "qwen2",
        fields(
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "Mistral whose layers are alike": ("mistral-window", fields(layer_types=["sliding_attention"] * 3)),
    "Llama whose layers are alike": ("llama", fields(layer_types=["full_attention"] * 3)),
    "fields without effect": ("llama", fields(**HARMLESS)),
    "fields of others that are not set": ("llama", fields(is_decoder=False, attention_multiplier=None, experts=0)),
}


def prepared(name: str, edit: Edit, stock_folder: Callable[..., Path], tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(stock_folder(name), tmp_path / "stock"))
    edit(folder)
    return folder


@torch.no_grad()
def read_logits(folder: Path, ids: Tensor) -> Tensor:
    source = open_source(str(folder))
    left_out = check_source(source)
    model = EfficientDecoderForCausalLM(source.config).eval()
    state = {name: source.reader.read(name) for name in source.reader.names() if name not in left_out}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not set(missing) - {"lm_head.weight"}
    model.tie_weights()
    return model(ids).logits


@torch.no_grad()
def stock_logits(folder: Path, ids: Tensor) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits


@pytest.mark.parametrize("case", SAME)
def test_logits_are_those_of_transformers(
    case: str, stock_folder: Callable[..., Path], tmp_path: Path, ids: Tensor
) -> None:
    name, edit = SAME[case]
    folder = prepared(name, edit, stock_folder, tmp_path)
    assert (read_logits(folder, ids) - stock_logits(folder, ids)).abs().max() <= 1e-5
    assert inspect(str(folder)).model["num_hidden_layers"] == 3


@pytest.mark.parametrize(
    "case", ["stale index and its shards", "transformers_weights", "configuration_files", "tied, the head alone stored"]
)
def test_converted_logits_are_those_of_transformers(
    case: str, stock_folder: Callable[..., Path], tmp_path: Path, ids: Tensor
) -> None:
    name, edit = SAME[case]
    folder = prepared(name, edit, stock_folder, tmp_path)
    convert(folder, tmp_path / "out", evaluate=False, progress=False)
    assert (stock_logits(tmp_path / "out", ids) - stock_logits(folder, ids)).abs().max() <= 1e-5
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"transformers_weights", "configuration_files"} & written.keys()


REFUSED: dict[str, tuple[str, Edit, str]] = {
    "bidirectional": ("llama", fields(is_causal=False), "is_causal=False, which means bidirectional attention"),
    "bidirectional, null": ("qwen2", fields(is_causal=None), "is_causal=None"),
    "Mistral with windows by layer": (
        "mistral-window",
        fields(layer_types=["full_attention", "sliding_attention", "full_attention"]),
        "layer_types=.* differs from what every layer of mistral does",
    ),
    "Mistral without window, with sliding layers": (
        "mistral",
        fields(layer_types=["sliding_attention"] * 3),
        "layer_types=.* differs",
    ),
    "Llama with a window": (
        "llama",
        fields(sliding_window=4),
        "sliding_window=4, which only affects the cache in llama",
    ),
    "sliding layers without a window": (
        "qwen2",
        fields(layer_types=["sliding_attention"] * 3),
        "sliding_window must be set",
    ),
    "part of the head": ("llama", fields(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "unknown rotary type": (
        "llama",
        rotary(rope_scaling={"rope_type": "mrope", "factor": 2.0}),
        "rotary embedding 'mrope'",
    ),
    "field of Granite": (
        "llama",
        fields(attention_multiplier=0.5),
        "attention_multiplier=0.5, a field that the stock llama does not",
    ),
    "field of Cohere": ("qwen2", fields(logit_scale=0.5), "logit_scale=0.5"),
    "biases that the stock class ignores": ("mistral", fields(attention_bias=True), "attention_bias=True"),
    "layers that differ": (
        "llama",
        fields(per_layer_config={"0": {"hidden_act": "relu"}}),
        "per_layer_config",
    ),
    "fused modules": ("llama", fields(fusion_config={"x": True}), "fusion_config="),
    "class names of another type": (
        "llama",
        fields(architectures=[True]),
        "architectures=.*not a list of names",
    ),
    "nested": ("llama", fields(text_config={"hidden_size": 8}), "text_config="),
    "renamed fields": ("llama", fields(attribute_map={"hidden_size": "vocab_size"}), "the key 'attribute_map'"),
    "embedded adapter": (
        "llama",
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "holds an adapter beside its weights",
    ),
    "variant only": (
        "llama",
        lambda folder: (folder / WEIGHTS).rename(folder / "model.fp16.safetensors"),
        "does not hold model.safetensors or .*, but model.fp16.safetensors",
    ),
    "transformers_weights of pickle": (
        "llama",
        fields(transformers_weights="x.bin"),
        "'x.bin', which is not the name of",
    ),
    "transformers_weights outside": (
        "llama",
        fields(transformers_weights="../x.safetensors"),
        "outside the checkpoint's",
    ),
    "transformers_weights missing": (
        "llama",
        fields(transformers_weights="x.safetensors"),
        "does not hold x.safetensors",
    ),
    "distributed": (
        "llama",
        lambda folder: (folder / WEIGHTS).rename(folder / "shard-00001-model-00001-of-00001.safetensors"),
        "weights of a distributed model",
    ),
    "configuration_files outside": (
        "llama",
        fields(configuration_files=["config.5.0.0/../../x.json"]),
        "outside the checkpoint's folder|no version|not named by versions",
    ),
    "configuration_files missing": (
        "llama",
        fields(configuration_files=["config.5.0.0.json"]),
        "config.5.0.0.json, which is missing",
    ),
    "configuration_files of another type": (
        "llama",
        fields(configuration_files="config.5.0.0.json"),
        "must be a list of file names",
    ),
    "both names of a tensor": (
        "llama",
        tensors(lambda stored: {**stored, "norm.weight": stored["model.norm.weight"].clone()}),
        "holds tensor norm.weight",
    ),
    "base model without a head": (
        "llama",
        tensors(lambda stored: {n: t for n, t in without_prefix(stored).items() if n != "lm_head.weight"}),
        "lacks tensor lm_head.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_compute_something_else_is_refused(
    case: str, stock_folder: Callable[..., Path], tmp_path: Path
) -> None:
    name, edit, words = REFUSED[case]
    folder = prepared(name, edit, stock_folder, tmp_path)
    with pytest.raises(HFEError, match=words) as error:
        convert(folder, tmp_path / "out", evaluate=False, progress=False)
    assert error.value.remedy and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"own_note": 3, "my_number": "x"},
            "config.json sets own_note, my_number, which are ignored, as by the stock llama",
        ),
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}},
            "comes with its own modeling code, which is not run",
        ),
        ({"architectures": ["LlamaBiModel"]}, "config.json names the class LlamaBiModel; its weights were read as"),
        ({"dtype": "bfloat16"}, "the weights are float32 and stay so; transformers would load them in bfloat16"),
        ({"dtype": None, "torch_dtype": "float16"}, "transformers would load them in float16"),
    ],
)
def test_ignored_fields_give_a_warning(
    changes: dict[str, Any], words: str, stock_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = prepared("llama", fields(**changes), stock_folder, tmp_path)
    assert words in " ".join(open_source(str(folder)).warnings)
    assert words in inspect(str(folder)).table()
