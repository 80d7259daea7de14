"""`stem_offload='disk'` maps the files that the rest of the model was loaded from, wherever else there are tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_efficient.errors import HFEError
from hf_efficient.modeling.stem.modeling_stem import StemForCausalLM, StemModel
from hf_efficient.modeling.stem.stem_table import StemTable

INDEX = "model.safetensors.index.json"
Scaled = Callable[[float], PreTrainedModel]


@pytest.fixture
def scaled(tiny_model: Callable) -> Scaled:
    """The tiny model with all its weights times a factor, which distinguishes two checkpoints."""

    def make(factor: float) -> PreTrainedModel:
        model = tiny_model("hfe_stem")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        return model

    return make


def stale_index(folder: Path, scaled: Scaled) -> dict[str, Any]:
    """The shards of an older version and their index, as savers leave them beside a single file."""
    scaled(0.5).save_pretrained(folder, max_shard_size="20KB")
    old = {path.name: path.read_bytes() for path in folder.glob("model*")}
    scaled(1.0).save_pretrained(folder)
    for name, content in old.items():
        (folder / name).write_bytes(content)
    return {}


def variant(folder: Path, scaled: Scaled) -> dict[str, Any]:
    scaled(0.5).save_pretrained(folder)
    scaled(1.0).save_pretrained(folder, variant="fp16")
    return {"variant": "fp16"}


def sharded_variant(folder: Path, scaled: Scaled) -> dict[str, Any]:
    scaled(0.5).save_pretrained(folder)
    scaled(1.0).save_pretrained(folder, variant="fp16", max_shard_size="20KB")
    return {"variant": "fp16"}


def named_in_the_configuration(folder: Path, scaled: Scaled) -> dict[str, Any]:
    scaled(1.0).save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    scaled(0.5).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    return {}


def subfolder(folder: Path, scaled: Scaled) -> dict[str, Any]:
    scaled(0.5).save_pretrained(folder)
    scaled(1.0).save_pretrained(folder / "inner", max_shard_size="20KB")
    return {"subfolder": "inner"}


def base_model_alone(folder: Path, scaled: Scaled) -> dict[str, Any]:
    """Its tensors have no ``model.`` before their names; the head is tied, so nothing is missing."""
    scaled(1.0).model.save_pretrained(folder)
    return {"tie_word_embeddings": True}


CASES = [stale_index, variant, sharded_variant, named_in_the_configuration, subfolder, base_model_alone]


def assert_maps_what_is_loaded(source: Path | str, **arguments: Any) -> list[StemTable]:
    whole = AutoModelForCausalLM.from_pretrained(source, **arguments)
    mapped = AutoModelForCausalLM.from_pretrained(source, stem_offload="disk", **arguments)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(mapped.state_dict()[name], tensor), name
    tables = [module for module in mapped.modules() if isinstance(module, StemTable)]
    assert all(table.file is not None for table in tables)
    ids = torch.arange(3, 12)[None]
    assert torch.equal(mapped(input_ids=ids).logits, whole(input_ids=ids).logits)
    return tables


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_the_tables_come_from_the_files_of_the_rest(make: Callable, scaled: Scaled, tmp_path: Path) -> None:
    assert_maps_what_is_loaded(tmp_path, **make(tmp_path, scaled))


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_the_tables_come_from_the_revision_of_a_cached_repository(
    shards: str, scaled: Scaled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--org--stem"
    for revision, commit, factor in (("main", "a" * 40, 0.5), ("v2", "b" * 40, 1.0)):
        snapshot = repository / "snapshots" / commit
        scaled(factor).save_pretrained(snapshot, max_shard_size=shards)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    tables = assert_maps_what_is_loaded("org/stem", cache_dir=tmp_path, local_files_only=True, revision="v2")
    assert {table.file.parent.name for table in tables if table.file} == {"b" * 40}


def test_the_base_model_maps_a_checkpoint_of_its_own(scaled: Scaled, tmp_path: Path) -> None:
    base = scaled(1.0).model
    base.save_pretrained(tmp_path)
    mapped = StemModel.from_pretrained(tmp_path, stem_offload="disk")
    ids = torch.arange(3, 12)[None]
    assert torch.equal(mapped(input_ids=ids).last_hidden_state, base(input_ids=ids).last_hidden_state)


def test_what_cannot_be_mapped_is_one_line(scaled: Scaled, tmp_path: Path) -> None:
    model = scaled(1.0)
    with pytest.raises(HFEError, match="safetensors files, and none"):
        StemForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict(), stem_offload="disk")
    model.save_pretrained(tmp_path)
    with pytest.raises(HFEError, match="safetensors files, and none"):
        StemForCausalLM.from_pretrained(tmp_path, stem_offload="disk", use_safetensors=False)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(HFEError, match="pickle"):
        StemForCausalLM.from_pretrained(tmp_path, stem_offload="disk")
