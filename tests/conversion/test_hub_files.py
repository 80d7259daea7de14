"""What transformers would load is downloaded from the Hub, and no other weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from hf_efficient.conversion.reading import hub_files
from hf_efficient.conversion.reading.source import open_source
from hf_efficient.errors import HFEError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a fake repository maker/small; downloads copy from it into a snapshot of the Hub's cache."""
    remote = tmp_path / "remote"
    snapshot = tmp_path / "models--maker--small" / "snapshots" / "0123abc"

    def fetch(repo_id: str, patterns: list[str], revision: str | None, token: str | None) -> Path:
        for path in remote.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in patterns):
                snapshot.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, snapshot / path.name)
        return snapshot

    monkeypatch.setattr(hub_files, "_snapshot", fetch)
    monkeypatch.chdir(tmp_path)
    return remote


def weights(source: Any) -> list[str]:
    """Names of the weight files that were fetched."""
    return sorted(path.name for path in source.files.glob("*.safetensors"))


def test_a_single_file_comes_before_an_index(repository: Path, stock_folder: Callable[..., Path]) -> None:
    shutil.copytree(stock_folder(max_shard_size="20KB"), repository)
    source = open_source("maker/small")
    assert len(weights(source)) > 2 and source.weight_files == sorted(source.files.glob("*.safetensors"))
    shutil.rmtree(source.files)
    shutil.copyfile(stock_folder() / "model.safetensors", repository / "model.safetensors")
    assert weights(open_source("maker/small")) == ["model.safetensors"]


@pytest.mark.parametrize("place", ["config.json", "config.5.0.0.json"])
def test_the_configuration_names_the_file(repository: Path, stock_folder: Callable[..., Path], place: str) -> None:
    shutil.copytree(stock_folder(), repository)
    shutil.copyfile(repository / "model.safetensors", repository / "own.safetensors")
    fields = json.loads((repository / "config.json").read_text())
    (repository / "config.json").write_text(json.dumps({**fields, "configuration_files": [place]}))
    (repository / place).write_text(json.dumps({**fields, "transformers_weights": "own.safetensors"}))
    assert weights(open_source("maker/small")) == ["own.safetensors"]


def test_a_repository_with_an_adapter_is_refused_before_its_weights(
    repository: Path, stock_folder: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(stock_folder(), repository)
    (repository / "adapter_config.json").write_text("{}")
    with pytest.raises(HFEError, match="maker/small holds an adapter beside its weights"):
        open_source("maker/small")
    assert not list((tmp_path / "models--maker--small").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("small-Q4_0.gguf", "maker/small holds GGUF files .small-Q4_0.gguf. and no safetensors; download one"),
        ("pytorch_model.bin", "maker/small holds its weights as pickle"),
    ],
)
def test_other_weights_are_named(
    repository: Path, name: str, words: str, stock_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.mkdir()
    shutil.copyfile(stock_folder() / "config.json", repository / "config.json")
    monkeypatch.setattr(hub_files.HfApi, "list_repo_files", lambda *_, **__: ["config.json", name])
    with pytest.raises(HFEError, match=words):
        open_source("maker/small")
