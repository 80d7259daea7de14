"""A damaged or unsuitable source is refused in one line with a remedy, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_efficient.convert_checkpoint import convert
from hf_efficient.errors import HFEError

WEIGHTS = "model.safetensors"


@pytest.fixture
def stock(tmp_path: Path, stock_folder: Callable[..., Path]) -> Path:
    """An undamaged tiny checkpoint, which the tests damage."""
    return Path(shutil.copytree(stock_folder("llama"), tmp_path / "stock"))


def _config(**fields: Any) -> Callable[[Path], None]:
    """Set fields of config.json; None removes one."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    return damage


def _weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def _set(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.__setitem__(name, value)


def _poison(value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"][-1, -1].fill_(value)


def _truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def _only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _only_adapter(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "config.json").rename(folder / "adapter_config.json")


def _index(weight_map: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()  # a single file would be read in place of an index
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


HEAD, EMBEDDING, UP = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"

DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "stock has no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json holds a list, not an object"),
    "unsupported family": (_config(model_type="gpt2"), "model_type 'gpt2' is not a supported family"),
    "no family": (_config(model_type=None), "model_type None is not a supported family"),
    "family with code of its own": (
        _config(model_type="own", auto_map={"AutoConfig": "x.Y"}),
        "model_type 'own' is not a supported family",
    ),
    "mixture of experts": (
        _config(model_type="mixtral", num_local_experts=8),
        "mixture of 8 experts; only dense decoders",
    ),
    "quantised": (_config(quantization_config={"quant_method": "gptq"}), r"quantised \(quant_method gptq\)"),
    "field of a wrong type": (_config(hidden_size="wide"), "hidden_size=wide, not a whole number"),
    "text for a switch": (_config(attention_bias="no"), "config.json is not a valid LlamaConfig"),
    "field of a wrong value": (_config(num_attention_heads=5), "config.json is not a valid"),
    "another family's config": (
        _config(model_type="qwen3"),
        r"lacks the tensors model\.layers\.0\.self_attn\.q_norm\.weight",
    ),
    "more layers than weights": (_config(num_hidden_layers=4), "lacks the tensors model.layers.3"),
    "fewer layers than weights": (_config(num_hidden_layers=2), r"holds the tensors model\.layers\.2"),
    "missing tensor": (_weights(lambda t: t.pop(UP)), f"lacks tensor {UP}"),
    "extra tensor": (_weights(_set("score.weight", torch.ones(2))), "holds tensor score.weight"),
    "wrong shape": (
        _config(vocab_size=96),
        r"embed_tokens.weight has shape \[97, 32\]; config.json calls for \[96, 32\]",
    ),
    "integer weights": (_weights(_set(UP, torch.ones(48, 32, dtype=torch.int8))), f"tensor {UP} has dtype I8"),
    "NaN": (_weights(_poison(float("nan"))), "holds NaN"),
    "infinity": (_weights(_poison(float("inf"))), "holds infinity"),
    "tied head that differs": (_config(tie_word_embeddings=True), "ties the head to the embedding"),
    "truncated": (_truncate, "truncated"),
    "pickle only": (_only_pickle, r"pickle \(pytorch_model.bin\), which can run any code"),
    "adapter": (_only_adapter, "is an adapter, not a model"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "does not hold model.safetensors or"),
    "index that leaves the folder": (_index({HEAD: "../x.safetensors"}), "outside the checkpoint's folder"),
    "index to a missing shard": (_index({HEAD: "x.safetensors"}), "names 'x.safetensors', which is missing"),
    "index without a map": (_index({}), "has no weight_map"),
    "index whose map is a list": (_index([1]), "has no weight_map"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_source(damage: str, stock: Path, tmp_path: Path) -> None:
    harm, words = DAMAGES[damage]
    harm(stock)
    with pytest.raises(HFEError, match=words) as error:
        convert(stock, tmp_path / "out", evaluate=False, progress=False)
    assert error.value.exit_code == 1
    assert error.value.remedy and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


def test_damage_in_the_middle_keeps_the_old_output(stock: Path, tmp_path: Path) -> None:
    convert(stock, tmp_path / "out", evaluate=False, progress=False)
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    _weights(_poison(float("nan")))(stock)
    with pytest.raises(HFEError, match="NaN"):
        convert(stock, tmp_path / "out", max_shard_size="20KB", evaluate=False, overwrite=True, progress=False)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stock"]


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("./nowhere", "there is no file or folder"),
        ("nowhere.gguf", "there is no file or folder nowhere.gguf"),
        ("a/b/c", "there is no file or folder a/b/c"),
        ("nobody/nothing", "there is no local folder nobody/nothing, the Hub cannot be reached"),
    ],
)
def test_a_missing_source(location: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HFEError, match=words) as error:
        convert(location, tmp_path / "out", evaluate=False, progress=False)
    assert error.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(HFEError, match="weights.bin is a file but not a .gguf"):
        convert(tmp_path / "weights.bin", tmp_path / "out", evaluate=False, progress=False)


def test_value_too_large_for_the_dtype(stock: Path, tmp_path: Path) -> None:
    _weights(_poison(1e9))(stock)
    with pytest.raises(HFEError, match="beyond the range of F16; convert with --dtype bfloat16"):
        convert(stock, tmp_path / "out", dtype="float16", evaluate=False, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]
    convert(stock, tmp_path / "out", dtype="bfloat16", evaluate=False, progress=False)


def test_measuring_needs_a_tokenizer(stock: Path, tmp_path: Path) -> None:
    with pytest.raises(HFEError, match="stock has no tokenizer that can be loaded"):
        convert(stock, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]
