"""Which files hold a checkpoint's weights: always those that transformers loads, or an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_efficient.errors import HFEError
from hf_efficient.modeling.decoder.weight_files import resolve_weight_files, weight_file_names

INDEX = "model.safetensors.index.json"


def tiny(scale: float) -> LlamaForCausalLM:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, scale)
    return model


def norm_in(files: list[Path]) -> float:
    """The final norm as the files give it: of a tensor in several files the last one counts."""
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return float(tensors["model.norm.weight"][0])


def name_weights(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))


def single_beside_index(folder: Path) -> dict:
    tiny(2.0).save_pretrained(folder, max_shard_size="5KB")
    kept = {path.name: path.read_bytes() for path in folder.glob("model-*")} | {INDEX: (folder / INDEX).read_bytes()}
    tiny(3.0).save_pretrained(folder)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    return {}


def stale_index_without_shards(folder: Path) -> dict:
    tiny(2.0).save_pretrained(folder, max_shard_size="5KB")
    tiny(3.0).save_pretrained(folder)
    assert (folder / INDEX).exists() and not list(folder.glob("model-*"))
    return {}


def sharded(folder: Path) -> dict:
    tiny(2.0).save_pretrained(folder, max_shard_size="5KB")
    return {}


def shard_outside_the_index(folder: Path) -> dict:
    tiny(2.0).save_pretrained(folder, max_shard_size="5KB")
    save_file({"model.norm.weight": torch.full((16,), 9.0)}, folder / "model-99999-of-99999.safetensors")
    return {}


def one_tensor_in_two_shards(folder: Path) -> dict:
    tiny(2.0).save_pretrained(folder, max_shard_size="5KB")
    index = json.loads((folder / INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    tensors = load_file(folder / first) | {"model.norm.weight": torch.full((16,), 9.0)}
    save_file(tensors, folder / first, metadata={"format": "pt"})
    return {}


def variant(folder: Path) -> dict:
    tiny(3.0).save_pretrained(folder)
    tiny(2.0).save_pretrained(folder, variant="fp16")
    return {"variant": "fp16"}


def sharded_variant(folder: Path) -> dict:
    tiny(3.0).save_pretrained(folder)
    tiny(2.0).save_pretrained(folder, variant="fp16", max_shard_size="5KB")
    return {"variant": "fp16"}


def named_in_the_configuration(folder: Path) -> dict:
    tiny(2.0).save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    tiny(3.0).save_pretrained(folder)
    name_weights(folder, "other.safetensors")
    return {}


def index_named_in_the_configuration(folder: Path) -> dict:
    tiny(2.0).save_pretrained(folder, max_shard_size="5KB")
    (folder / INDEX).rename(folder / "other.safetensors.index.json")
    tiny(3.0).save_pretrained(folder / "x")
    (folder / "x/model.safetensors").rename(folder / "model.safetensors")
    name_weights(folder, "other.safetensors.index.json")
    return {}


def subfolder(folder: Path) -> dict:
    tiny(3.0).save_pretrained(folder)
    tiny(2.0).save_pretrained(folder / "inner", max_shard_size="5KB")
    return {"subfolder": "inner"}


@pytest.mark.parametrize(
    "make",
    [
        single_beside_index,
        stale_index_without_shards,
        sharded,
        shard_outside_the_index,
        one_tensor_in_two_shards,
        variant,
        sharded_variant,
        named_in_the_configuration,
        index_named_in_the_configuration,
        subfolder,
    ],
    ids=lambda make: make.__name__,
)
def test_the_files_are_those_that_transformers_loads(make, tmp_path) -> None:
    arguments = make(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, **arguments)
    config = json.loads((tmp_path / arguments.get("subfolder", "") / "config.json").read_text())
    files = resolve_weight_files(tmp_path, config, **arguments)
    assert norm_in(files) == loaded.model.norm.weight[0].item()


def write_index(folder: Path, content: object) -> None:
    (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "JSON"),
        ("[" * 200_000, "JSON"),
        ("[]", "holds a list, not an object"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": {"a": 3}}, "file '3', which is no file name"),
        ({"weight_map": {"a": "../b.safetensors"}}, "outside"),
        ({"weight_map": {"a": "/b.safetensors"}}, "outside"),
        ({"weight_map": {"a": "C:\\b.safetensors"}}, "outside"),
        ({"weight_map": {"a": "b.bin"}}, "not a safetensors file"),
        ({"weight_map": {"a": "b\0.safetensors"}}, r"b\\x00"),
        ({"weight_map": {"a": "b\ud800.safetensors"}}, r"b\\ud800"),
        ({"weight_map": {"a": "b.safetensors", "c": "d.safetensors"}}, r"'b.safetensors', which is missing \(2 of 2"),
    ],
)
def test_a_damaged_index_is_one_line(content, match, tmp_path) -> None:
    write_index(tmp_path, content)
    with pytest.raises(HFEError, match=match) as caught:
        resolve_weight_files(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("named", ["pytorch_model.bin", "adapter_model.bin", "../a.safetensors", 3, ["a.safetensors"]])
def test_transformers_weights_names_safetensors_inside(named) -> None:
    with pytest.raises(HFEError, match="transformers_weights"):
        weight_file_names({"transformers_weights": named})


@pytest.mark.parametrize(
    ("present", "match"),
    [
        ([], "does not hold model.safetensors or model.safetensors.index.json"),
        (["training_args.bin"], "does not hold"),
        (["pytorch_model.bin"], "pickle"),
        (["model.fp16.safetensors"], r"but model\.fp16\.safetensors"),
        (["model.safetensors", "shard-00000-model-00000-of-00002.safetensors"], "distributed"),
    ],
)
def test_a_folder_without_readable_weights_says_what_it_has(present, match, tmp_path) -> None:
    for name in present:
        (tmp_path / name).touch()
    with pytest.raises(HFEError, match=match):
        resolve_weight_files(tmp_path)


def test_a_folder_that_is_not_there_is_one_line(tmp_path) -> None:
    with pytest.raises(HFEError, match="cannot be read"):
        resolve_weight_files(tmp_path / "absent")
