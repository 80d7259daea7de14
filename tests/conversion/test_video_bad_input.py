"""Wan checkpoints that cannot be converted are refused by name, rule and remedy, and nothing is written."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_efficient import convert
from hf_efficient.conversion.wan.tensor_names import PREFIX
from hf_efficient.errors import HFEError
from wan_checkpoints import DIFFUSERS, DIM, ORIGINAL, WEIGHTS, edit, in_diffusers, tensors, write

DIFFUSERS_Q, Q = "blocks.1.attn1.to_q.weight", "blocks.1.self_attn.q.weight"


def refused(source: Path, out: Path, words: str) -> None:
    with pytest.raises(HFEError, match=words) as caught:
        convert(source, out, progress=False)
    assert caught.value.remedy and "\n" not in str(caught.value)
    assert not out.exists() and not list(out.parent.glob("*.hfe-partial"))


def change(folder: Path, edit_tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Write other tensors into the weight file of `folder`."""
    save_file(edit_tensors(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    return folder


@pytest.fixture
def diffusers_folder(tmp_path: Path) -> Path:
    return write(tmp_path / "diffusers", in_diffusers(tensors()), DIFFUSERS)


@pytest.fixture
def original_folder(tmp_path: Path) -> Path:
    return write(tmp_path / "original", tensors(), ORIGINAL)


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda stored: {key: value for key, value in stored.items() if key != name}


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda stored: {new if key == old else key: value for key, value in stored.items()}


def test_a_missing_tensor_is_named(diffusers_folder: Path, original_folder: Path, tmp_path: Path) -> None:
    words = f"the checkpoint lacks tensor {Q}, which config.json calls for"
    refused(change(diffusers_folder, without(DIFFUSERS_Q)), tmp_path / "out", words)
    refused(change(original_folder, without(Q)), tmp_path / "out", words)


def test_a_tensor_of_another_shape_is_named(diffusers_folder: Path, tmp_path: Path) -> None:
    change(diffusers_folder, lambda stored: {**stored, DIFFUSERS_Q: torch.zeros(DIM, 4)})
    refused(diffusers_folder, tmp_path / "out", rf"tensor {Q} has shape \[128, 4\]; config.json calls for \[128, 128\]")


def test_an_unknown_tensor_is_named(original_folder: Path, tmp_path: Path) -> None:
    change(original_folder, lambda stored: {**stored, "blocks.0.norm9.weight": torch.zeros(DIM)})
    refused(original_folder, tmp_path / "out", "holds tensor blocks.0.norm9.weight, which the model")


def test_nan_is_named(diffusers_folder: Path, tmp_path: Path) -> None:
    change(diffusers_folder, lambda stored: {**stored, DIFFUSERS_Q: torch.full((DIM, DIM), torch.nan)})
    refused(diffusers_folder, tmp_path / "out", "holds NaN")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (DIFFUSERS_Q, Q),
        ("blocks.0.norm2.weight", "blocks.0.norm3.weight"),
        ("scale_shift_table", "head.modulation"),
    ],
)
def test_names_of_both_layouts_are_refused(old: str, new: str, diffusers_folder: Path, tmp_path: Path) -> None:
    change(diffusers_folder, renamed(old, new))
    refused(
        diffusers_folder, tmp_path / "out", rf"by diffusers' names .* and by the original ones \({new}, 1 of them\)"
    )


def test_a_prefix_of_some_names_is_refused(original_folder: Path, tmp_path: Path) -> None:
    change(original_folder, renamed(Q, PREFIX + Q))
    refused(original_folder, tmp_path / "out", f"lacks tensor {Q}")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("blocks.0.cross_attn.k_img.weight", ORIGINAL),
        ("img_emb.proj.1.weight", ORIGINAL),
        ("blocks.0.attn2.add_k_proj.weight", DIFFUSERS),
        ("condition_embedder.image_embedder.ff.net.0.proj.weight", DIFFUSERS),
    ],
)
def test_tensors_of_image_to_video_models_are_refused(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    weights = tensors() if fields is ORIGINAL else in_diffusers(tensors())
    source = write(tmp_path / "source", {**weights, name: torch.zeros(DIM, DIM)}, fields)
    refused(source, tmp_path / "out", f"has tensor {name} .* a part of image-to-video models")


@pytest.mark.parametrize(
    ("fields", "changes", "words"),
    [
        (
            ORIGINAL,
            {"model_type": "i2v"},
            "model_type='i2v'; our model has model_type='t2v', that of a Wan 2.1 text-to",
        ),
        (ORIGINAL, {"model_type": "ti2v"}, "model_type='ti2v'"),
        (ORIGINAL, {"_class_name": "VaceWanModel"}, "_class_name='VaceWanModel' of diffusers; conversions support Wan"),
        (ORIGINAL, {"window_size": [3, 3]}, r"window_size='\[3, 3\]'"),
        (ORIGINAL, {"dim": ...}, "config.json has dim=None, not a whole number"),
        (ORIGINAL, {"num_layers": 10**9}, "num_layers=1000000000, not a whole number from 1 to 65536"),
        (ORIGINAL, {"num_layers": 60000}, "num_hidden_layers=60000, not a whole number"),
        (ORIGINAL, {"num_layers": 3}, "lacks the tensors blocks.2"),
        (ORIGINAL, {"num_heads": 3}, "must be a multiple of num_attention_heads=3"),
        (ORIGINAL, {"ffn_dim": "48"}, "config.json has ffn_dim=48, not a whole number"),
        (ORIGINAL, {"text_len": "many"}, "text_len"),
        (ORIGINAL, {"attn_scale": 2.0}, "attn_scale=2.0, a field that the stock wan does not have"),
        (ORIGINAL, {"quantization_config": {"quant_method": "gguf"}}, "the checkpoint is quantised"),
        (DIFFUSERS, {"added_kv_proj_dim": 5120}, "added_kv_proj_dim='5120'; our model has added_kv_proj_dim=None"),
        (DIFFUSERS, {"image_dim": 1280}, "image_dim='1280'"),
        (DIFFUSERS, {"qk_norm": None}, "qk_norm='None'; our model has qk_norm='rms_norm_across_heads'"),
        (DIFFUSERS, {"cross_attn_norm": False}, "cross_attn_norm='False'"),
        (DIFFUSERS, {"_class_name": "WanVACETransformer3DModel"}, "names the class _class_name='WanVACETransformer3D"),
        (DIFFUSERS, {"_class_name": "FluxTransformer2DModel"}, "_class_name='FluxTransformer2DModel' of diffusers"),
        (DIFFUSERS, {"patch_size": [2, 2, 2]}, r"patch_size=\[2, 2, 2\] must be \[1, height, width\]"),
        (DIFFUSERS, {"patch_size": [1, 2, 1 << 51]}, "more than 1024"),
        (DIFFUSERS, {"text_dim": 1 << 40}, "text_dim=1099511627776, more than 1048576"),
        (DIFFUSERS, {"attention_head_dim": 0}, "attention_head_dim=0, not a whole number from 1"),
        (DIFFUSERS, {"ffn_dim": 64}, "tensor blocks.0.ffn.0.weight has shape"),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) and len(value) < 3 else "",
)
def test_a_configuration_of_another_model_is_refused(
    fields: dict[str, Any], changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    weights = tensors() if fields is ORIGINAL else in_diffusers(tensors())
    source = write(tmp_path / "source", weights, fields)
    edit(source, **changes)
    refused(source, tmp_path / "out", words)


def test_an_unknown_field_without_effect_is_a_warning(original_folder: Path, tmp_path: Path) -> None:
    edit(original_folder, flavour="plain")
    report = convert(original_folder, tmp_path / "out", progress=False)
    assert "config.json sets flavour, which are ignored, as by the stock wan" in report.warnings


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "source", in_diffusers(tensors()), DIFFUSERS, shards=3)
    (source / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    refused(source, tmp_path / "out", "names 'diffusion_pytorch_model-00002-of-00003.safetensors', which is missing")


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "source" / "transformer", in_diffusers(tensors()), DIFFUSERS, shards=2)
    index = source / f"{WEIGHTS}.index.json"
    name = "diffusion_pytorch_model-00002-of-00002.safetensors"
    os.rename(source / name, source.parent / name)
    index.write_text(index.read_text().replace(name, f"../{name}"))
    refused(source.parent, tmp_path / "out", "outside the checkpoint's folder")


def test_a_link_out_of_the_folder_is_refused(diffusers_folder: Path, tmp_path: Path) -> None:
    os.rename(diffusers_folder / WEIGHTS, tmp_path / "elsewhere.safetensors")
    (diffusers_folder / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    refused(diffusers_folder, tmp_path / "out", "is a link that leads outside the checkpoint's folder")


def test_a_folder_without_weights_is_refused(diffusers_folder: Path, tmp_path: Path) -> None:
    (diffusers_folder / WEIGHTS).unlink()
    refused(diffusers_folder, tmp_path / "out", f"does not hold {WEIGHTS}")
    (diffusers_folder / "diffusion_pytorch_model.bin").write_bytes(b"x")
    refused(diffusers_folder, tmp_path / "out", "holds its weights as pickle")


def test_a_truncated_file_is_refused(original_folder: Path, tmp_path: Path) -> None:
    path = original_folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-8])
    refused(original_folder, tmp_path / "out", "is truncated")


class RunsCode:
    """Pickled, it writes a file when it is opened without protection."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_code_in_a_training_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"generator_ema": tensors(), "config": RunsCode(tmp_path / "ran")}, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", tmp_path / "out", "more than tensors and plain containers, so it is not opened")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    refused(tmp_path / "plain.pt", tmp_path / "out", "plain.pt (is damaged|cannot be read)")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(2)], "has a list, not tensors by name"),
        ({}, "has no tensor patch_embedding.weight"),
        ({"step": 3}, "has a int under 'step', not a tensor"),
        ({"optimizer": {"state": {}}, "generator_ema": None}, "has a dict under 'optimizer', not a tensor"),
        ({"generator_ema": {"a.weight": "text"}}, "has a str under 'a.weight', not a tensor"),
        ({"generator_ema": {"a.weight": torch.zeros(2)}}, "has no tensor patch_embedding.weight"),
        ({"generator": {"model.x": torch.zeros(2), "x": torch.zeros(2)}}, "has the tensor x twice"),
        ({"generator": {"x": torch.zeros(4, 4).t()[:, :2]}}, "not contiguous"),
        ({"generator": {"x": torch.sparse_coo_tensor([[0]], [1.0], (2,))}}, "contiguous dense tensors"),
    ],
)
def test_a_training_file_with_anything_else_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", tmp_path / "out", words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("patch_embedding.weight", torch.zeros(DIM, 4), r"has the shape \[128, 4\] for tensor patch_embedding.weight"),
        ("patch_embedding.weight", torch.zeros(96, 4, 1, 2, 2), "has 96 channels, not a multiple of 128"),
        ("blocks.1.ffn.0.weight", torch.zeros(64, DIM), "tensor blocks.1.ffn.0.weight has shape"),
        ("blocks.3.modulation", torch.zeros(1, 6, DIM), "lacks the tensors blocks.2.modulation"),
        ("blocks.99999999999.modulation", torch.zeros(1, 6, DIM), "not a whole number"),
        ("blocks.0.cross_attn.k_img.weight", torch.zeros(DIM, DIM), "a part of image-to-video models"),
        ("head.head.bias", torch.full((16,), torch.inf), "holds infinity"),
        ("head.head.bias", torch.zeros(16, dtype=torch.int64), "has dtype I64"),
    ],
)
def test_a_training_file_of_another_model_is_refused(name: str, value: Tensor, words: str, tmp_path: Path) -> None:
    torch.save({"generator_ema": {**tensors(), name: value}}, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", tmp_path / "out", words)


def test_damaged_and_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"generator_ema": tensors()}, tmp_path / "weights.pt")
    data = (tmp_path / "weights.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "cut.pt", tmp_path / "out", "cut.pt cannot be read")
    (tmp_path / "empty.pt").write_bytes(b"")
    refused(tmp_path / "empty.pt", tmp_path / "out", "empty.pt (cannot be read|is damaged)")
    (tmp_path / "weights.bin").write_bytes(data)
    refused(tmp_path / "weights.bin", tmp_path / "out", "is a file but not a .gguf")


def test_a_folder_of_training_files_is_refused(tmp_path: Path) -> None:
    """A pickle is opened only if the user named it."""
    (tmp_path / "source").mkdir()
    torch.save({"generator_ema": tensors()}, tmp_path / "source" / "weights.pt")
    refused(tmp_path / "source", tmp_path / "out", "holds its weights as pickle")
