"""Which files of a checkpoint folder are part of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_efficient.conversion.architecture import load
from hf_efficient.conversion.families.decoder import CAUSAL_DECODERS
from hf_efficient.conversion.families.encoder import ENCODERS
from hf_efficient.conversion.families.vision import VISION
from hf_efficient.hub.contents import FolderContents, folder_contents, may_be_part
from hf_efficient.hub.export import render_code
from hf_efficient.registry import ARCHITECTURES

CODE = ("modeling_stem.py", "custom_generate/generate.py")
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
FILES_OF_FAMILIES = {
    "preprocessor_config.json": VISION,
    "modules.json": ENCODERS,
    "sentence_bert_config.json": ENCODERS,
    "config_sentence_transformers.json": ENCODERS,
    "1_Pooling/config.json": ENCODERS,
    "2_Normalize/config.json": ENCODERS,
    "generation_config.json": CAUSAL_DECODERS,
}


def contents_of(*names: str) -> FolderContents:
    """The contents of a decoder's folder."""
    return folder_contents(names, CODE, CAUSAL_DECODERS)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.model_type)
def test_every_file_that_is_written_is_part_of_the_model(architecture: object, checkpoints: dict[str, Path]) -> None:
    folder = checkpoints[architecture.model_type]  # type: ignore[attr-defined]
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    family = load(architecture.family)  # type: ignore[attr-defined]
    contents = folder_contents(paths, render_code(architecture).files, family)  # type: ignore[arg-type]
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
    assert contents_of(name).model == (name,)


@pytest.mark.parametrize("name", FILES_OF_FAMILIES)
def test_a_file_of_one_family_is_foreign_to_the_others(name: str) -> None:
    for family in (CAUSAL_DECODERS, ENCODERS, VISION):
        own = family is FILES_OF_FAMILIES[name]
        assert folder_contents([name], CODE, family).model == ((name,) if own else ())
    assert folder_contents([name], CODE).model == (name,) and may_be_part(name)


@pytest.mark.parametrize(
    "name",
    [
        *("training_args.bin", "trainer_state.json", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"),
        *("rng_state.pth", "rng_state_3.pth", "runs/Nov30_host/events.out.tfevents.1.host", "all_results.json"),
    ],
)
def test_left_by_training(name: str) -> None:
    assert contents_of(name).training == (name,)


@pytest.mark.parametrize("name", [".git/config", ".gitattributes", ".cache/huggingface/download/x.metadata"])
def test_records_of_git_and_of_a_download(name: str) -> None:
    assert contents_of(name).records == (name,)


@pytest.mark.parametrize(
    "name",
    [
        *(".env", ".hidden/token", "id_rsa", "token", ".cache/x", "__pycache__/modeling_stem.cpython-311.pyc"),
        *("Config.json", "CONFIG.JSON", "config.5.17.0.json", "tokenizer.5.17.0.json", "sub/config.json"),
        *("pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors", "model.fp16.bin"),
        *("modeling_other.py", "custom_generate/requirements.txt", "preprocessor_config.json", "LICENSE.py"),
        *("additional_chat_templates/more/tools.jinja", "runs/run.py", "LICENSES/run.py", "model.safetensors/x"),
        *("2_Dense/config.json", "1_Pooling/model.safetensors", "x/1_Pooling/config.json", "11_Pooling/config.json"),
        *("tokenizer.json\n", "LICENSE\n", "training_args.bin.py", "tf_model.h5", "model.gguf"),
    ],
)
def test_anything_else_is_foreign(name: str) -> None:
    assert contents_of(name).foreign == (name,)


def test_one_file_of_weights_wins_over_an_index_as_in_transformers() -> None:
    assert contents_of(*SHARDS, INDEX).model == tuple(sorted([*SHARDS, INDEX]))
    contents = contents_of(*SHARDS, INDEX, "model.safetensors")
    assert contents.model == ("model.safetensors",) and contents.foreign == tuple(sorted([*SHARDS, INDEX]))
