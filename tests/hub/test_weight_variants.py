"""`save_pretrained(variant=…)`: its weight files are verified, uploaded and loaded like the plain ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_efficient.hub.contents import folder_contents
from hf_efficient.hub.verify import verify, verify_upload
from hf_efficient.hub.weight_names import weight_sets

pytestmark = pytest.mark.usefixtures("rendered_once")
SINGLE, INDEX = "model.fp16.safetensors", "model.safetensors.index.fp16.json"
FIRST, LAST = "model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"
PLAIN, PLAIN_INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def with_variant(checkpoint: Path) -> Callable[..., Path]:
    """`with_variant(shards, plain)`: a checkpoint with the variant fp16, sharded or not, beside plain files or not."""

    def make(shards: bool = False, plain: bool = False) -> Path:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16)
        if not plain:
            (checkpoint / PLAIN).unlink()
        # So that the second of two files is small.
        size = int(model.get_memory_footprint() * 0.9) if shards else "5GB"
        model.save_pretrained(checkpoint, variant="fp16", max_shard_size=size)
        names = {path.name for path in checkpoint.glob("model*.safetensors*")}
        assert names == {*([FIRST, LAST, INDEX] if shards else [SINGLE]), *([PLAIN] if plain else [])}
        return checkpoint

    return make


@pytest.mark.parametrize("plain", [False, True], ids=["alone", "beside plain weights"])
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "sharded"])
def test_a_variant_is_verified_uploaded_and_loaded(
    with_variant: Callable[..., Path], shards: bool, plain: bool, hub: Any, run_python: Callable[..., dict[str, Any]]
) -> None:
    folder = with_variant(shards, plain)
    report, uploaded = verify_upload(folder)
    assert verify(folder).ok and report.ok, report.table()
    assert report.tensors == (60 if plain else 30) and not report.not_part
    script = """
import json
from hf_efficient.hub.push import push
from hf_efficient.hub.verify import verify
commit = push(sys.argv[1], "tester/model").commit
print(json.dumps([commit, verify("tester/model", revision=commit).to_dict()]))
"""
    commit, verified = run_python(script, folder, package=True, **hub.environment)
    assert verified["ok"] and verified["tensors"] == report.tensors
    assert {*uploaded} <= hub.files("tester/model", commit).keys()
    card = hub.files("tester/model", commit)["README.md"].decode()
    assert ('variant="fp16"' in card) is not plain
    load = """
import json, torch
from transformers import AutoModelForCausalLM
load = AutoModelForCausalLM.from_pretrained
models = [load(name, variant="fp16", trust_remote_code=True) for name in (sys.argv[1], "tester/model")]
ids = torch.tensor([[1, 4, 7]])
logits = [model(ids).logits for model in models]
print(json.dumps([torch.equal(*logits), str(models[1].dtype)]))
"""
    assert run_python(load, folder, **hub.environment) == [True, "torch.float16"]


def stray_shard(folder: Path) -> None:
    shutil.copy(folder / FIRST, folder / "model.fp16-00003-of-00003.safetensors")


def another_shape(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, **changes}))


@pytest.mark.parametrize("plain", [False, True], ids=["alone", "beside plain weights"])
@pytest.mark.parametrize(
    ("shards", "change", "words"),
    [
        (True, stray_shard, "model.fp16-00003-of-00003.safetensors: is not part of the weights that " + INDEX),
        (True, lambda f: (f / LAST).unlink(), f"{LAST}: is missing"),
        (True, lambda f: (f / INDEX).unlink(), f"{INDEX}: is missing, and shards are there"),
        (True, lambda f: edit_index(f, url="x"), f"{INDEX}: url is not a known key"),
        (True, lambda f: edit_index(f, weight_map={"x": FIRST}), f"{INDEX}: looks for tensor"),
        (True, lambda f: edit_index(f, weight_map={"x": "../x.safetensors"}), f"{INDEX}: points at"),
        (True, lambda f: shutil.copy(f / FIRST, f / SINGLE), f"{INDEX}: stands beside {SINGLE}"),
        (False, another_shape, "weights of the variant fp16: tensor model.norm.weight has shape [31]"),
        (False, lambda f: (f / SINGLE).write_bytes(b"\xff" * 40), f"{SINGLE}: "),
        (False, lambda f: (f / SINGLE).rename(f / "model.fp16.bin"), "model.fp16.bin: is"),
        (False, lambda f: shutil.copy(f / SINGLE, f / "model.fp16.x.safetensors"), "model.fp16.x.safetensors: is"),
    ],
)
def test_damage_in_a_variant_is_named(
    with_variant: Callable[..., Path], shards: bool, plain: bool, change: Callable[[Path], Any], words: str
) -> None:
    folder = with_variant(shards, plain)
    change(folder)
    report = verify(folder)
    assert not report.ok and words in "\n".join(map(str, report.findings))


def test_weights_are_sorted_by_variant() -> None:
    shard = "model-00001-of-00001.safetensors"
    names = [SINGLE, FIRST, INDEX, PLAIN_INDEX, shard, "model.8-bit-00001-of-00001.safetensors", "model.norm.bin"]
    plain, eight, half = weight_sets(names)
    assert (plain.variant, plain.files, plain.unused) == (None, (shard, PLAIN_INDEX), ())
    assert (eight.variant, eight.single) == ("8-bit", "model.8-bit.safetensors")
    assert (half.variant, half.files, set(half.unused)) == ("fp16", (SINGLE,), {FIRST, INDEX})
    contents = folder_contents(names, ())
    assert set(contents.foreign) == {FIRST, INDEX, "model.norm.bin"}
