"""Which files of a checkpoint folder are part of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_efficient.hub.contents import folder_contents
from hf_efficient.hub.export import render_code
from hf_efficient.registry import ARCHITECTURES

CODE = ("modeling_stem.py", "custom_generate/generate.py")
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.model_type)
def test_every_file_that_is_written_is_part_of_the_model(architecture: object, checkpoints: dict[str, Path]) -> None:
    folder = checkpoints[architecture.model_type]  # type: ignore[attr-defined]
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    contents = folder_contents(paths, render_code(architecture).files)  # type: ignore[arg-type]
    assert contents.model == tuple(sorted(paths)) and len(paths) > 10


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("model.safetensors", "model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", *SHARDS, INDEX),
        *("additional_chat_templates/tools.jinja", "code_manifest.json", "conversion_report.json", "README.md"),
        *("LICENSE", "LICENSE.txt", "LICENCE.md", "LICENSE-MIT", "NOTICE", "LICENSES/Apache-2.0.txt", *CODE),
    ],
)
def test_part_of_the_model(name: str) -> None:
    assert folder_contents([name], CODE).model == (name,)


@pytest.mark.parametrize(
    "name",
    [
        *("training_args.bin", "trainer_state.json", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"),
        *("rng_state.pth", "rng_state_3.pth", "runs/Nov30_host/events.out.tfevents.1.host", "all_results.json"),
    ],
)
def test_left_by_training(name: str) -> None:
    assert folder_contents([name], CODE).training == (name,)


@pytest.mark.parametrize("name", [".git/config", ".gitattributes", ".cache/huggingface/download/x.metadata"])
def test_records_of_git_and_of_a_download(name: str) -> None:
    assert folder_contents([name], CODE).records == (name,)


@pytest.mark.parametrize(
    "name",
    [
        *(".env", ".hidden/token", "id_rsa", "token", ".cache/x", "__pycache__/modeling_stem.cpython-311.pyc"),
        *("Config.json", "CONFIG.JSON", "config.5.17.0.json", "tokenizer.5.17.0.json", "sub/config.json"),
        *("pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors", "model.fp16.bin"),
        *("modeling_other.py", "custom_generate/requirements.txt", "preprocessor_config.json", "LICENSE.py"),
        *("additional_chat_templates/more/tools.jinja", "runs/run.py", "LICENSES/run.py", "model.safetensors/x"),
        *("tokenizer.json\n", "LICENSE\n", "training_args.bin.py", "tf_model.h5", "model.gguf"),
    ],
)
def test_anything_else_is_foreign(name: str) -> None:
    assert folder_contents([name], CODE).foreign == (name,)


def test_one_file_of_weights_wins_over_an_index_as_in_transformers() -> None:
    assert folder_contents([*SHARDS, INDEX], CODE).model == tuple(sorted([*SHARDS, INDEX]))
    contents = folder_contents([*SHARDS, INDEX, "model.safetensors"], CODE)
    assert contents.model == ("model.safetensors",) and contents.foreign == tuple(sorted([*SHARDS, INDEX]))
