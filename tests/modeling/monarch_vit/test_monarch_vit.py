"""The registered ViT: names of tensors in files of every release, image sizes, and blocks that are rows of patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig

from hf_efficient.kernels.monarch_attention.api import monarch_attention
from hf_efficient.modeling.monarch import monarch_interface
from hf_efficient.modeling.monarch_vit.modeling_monarch_vit import (
    MonarchViTConfig,
    MonarchViTForImageClassification,
    MonarchViTModel,
)

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    **{"image_size": 24, "patch_size": 4, "num_labels": 3},
}
MONARCH = {"block_size": 6, "pad": "pre"}
PAIRS = [("ViTModel", MonarchViTModel), ("ViTForImageClassification", MonarchViTForImageClassification)]
# Name in a file of transformers 4 -> that of the module.
OLD_NAMES = {
    "encoder.layer.1.attention.attention.query.weight": "layers.1.attention.q_proj.weight",
    "encoder.layer.0.attention.output.dense.bias": "layers.0.attention.o_proj.bias",
    "encoder.layer.0.intermediate.dense.weight": "layers.0.mlp.fc1.weight",
    "encoder.layer.0.output.dense.weight": "layers.0.mlp.fc2.weight",
}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def output(model: PreTrainedModel, images: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(images, **inputs)[0]


@pytest.mark.parametrize(("stock_name", "ours"), PAIRS)
def test_a_stock_file_with_the_names_of_transformers_4_is_read(
    stock_name: str, ours: Any, images: Tensor, tmp_path: Path
) -> None:
    stock = getattr(transformers, stock_name)(ViTConfig(**SIZES)).eval()
    stock.save_pretrained(tmp_path)
    names = {name.removeprefix("vit.") for name in load_file(tmp_path / "model.safetensors")}
    assert set(OLD_NAMES) <= names  # transformers still writes them
    loaded, info = ours.from_pretrained(tmp_path, config=MonarchViTConfig(**SIZES), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(output(loaded, images), output(stock, images))


@pytest.mark.parametrize(("stock_name", "ours"), PAIRS)
def test_it_is_saved_with_the_names_of_its_modules_which_stock_models_read_too(
    stock_name: str, ours: Any, images: Tensor, tmp_path: Path
) -> None:
    model = ours(MonarchViTConfig(**SIZES, monarch=MONARCH)).eval()
    for round_trip in range(2):  # what was loaded is saved with the same names again
        folder = tmp_path / str(round_trip)
        model.save_pretrained(folder)
        assert set(load_file(folder / "model.safetensors")) == set(model.state_dict())
        model = ours.from_pretrained(folder).eval()
    stock, info = getattr(transformers, stock_name).from_pretrained(
        tmp_path / "0", config=ViTConfig(**SIZES), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model.set_attn_implementation("sdpa")
    assert torch.equal(output(model, images), output(stock, images))


@pytest.mark.parametrize("image_size", [24, [24, 24], (24, 24)])
def test_a_block_is_a_row_of_patches_and_the_class_token_is_before_the_first(
    image_size: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sequence [class token, 36 patches] is filled up in front, by hand here."""
    layers = []

    def record(query: Tensor, key: Tensor, value: Tensor, layout: Any, **kwargs: Any) -> Tensor:
        found = monarch_attention(query, key, value, layout, **kwargs)
        padded = [nn.functional.pad(x, (0, 0, 5, 0)) for x in (query, key, value)]
        mask = (torch.arange(42) >= 5).expand(2, -1)
        by_hand = monarch_attention(*padded, type(layout)(6), **kwargs | {"key_mask": mask})
        torch.testing.assert_close(found, by_hand[:, :, 5:], rtol=1e-5, atol=1e-5)
        layers.append(layout)
        return found

    monkeypatch.setattr(monarch_interface, "monarch_attention", record)
    output(MonarchViTModel(MonarchViTConfig(**(SIZES | {"image_size": image_size}), monarch=MONARCH)), images)
    assert [layout.block_size for layout in layers] == [6, 6]


def test_images_of_another_size_keep_the_block_of_the_configuration(images: Tensor) -> None:
    model = MonarchViTModel(MonarchViTConfig(**SIZES, monarch=MONARCH))
    larger = torch.randn(2, 3, 32, 40)
    found = output(model, larger, interpolate_pos_encoding=True)
    assert found.shape == (2, 1 + 8 * 10, 32) and found.isfinite().all()
    alone = output(model, larger[:1], interpolate_pos_encoding=True)
    torch.testing.assert_close(found[:1], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="doesn't match model"):
        output(model, larger)


def test_an_image_of_less_than_two_blocks_uses_softmax_attention(images: Tensor) -> None:
    config = MonarchViTConfig(**SIZES, monarch={"block_size": 20})
    model = MonarchViTModel(config)
    found = output(model, images)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, output(model, images), rtol=1e-5, atol=1e-5)


def test_masked_patches_change_nothing(images: Tensor) -> None:
    model = MonarchViTForImageClassification(MonarchViTConfig(**SIZES, monarch=MONARCH))
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[0, 20:] = 0
    changed = images.clone()
    changed[0, :, 16:] = 9.0  # the patches of the last two rows, from 25 on
    found, other = (output(model, pixels, attention_mask=mask) for pixels in (images, changed))
    torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5)


def test_the_pipeline_for_images_runs_it(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pipelines of images need Pillow")
    from transformers import ViTImageProcessorPil, pipeline

    model = MonarchViTForImageClassification(MonarchViTConfig(**SIZES, monarch=MONARCH)).eval()
    processor = ViTImageProcessorPil(size={"height": 24, "width": 24})
    found = pipeline("image-classification", model=model, image_processor=processor)(image.new("RGB", (50, 40), "red"))
    assert {each["label"] for each in found} == {"LABEL_0", "LABEL_1", "LABEL_2"}
    assert sum(each["score"] for each in found) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_attention_heads": 5}, "hidden_size=32 must be a multiple of num_attention_heads=5"),
        ({"monarch": {"block_size": 38}}, "block_size=38 must be at most tokens of an image=37"),
        ({"monarch": {"block_size": 6, "layers": [2]}}, "the model has layers 0..1"),
    ],
)
def test_a_wrong_field_is_named_with_its_rule(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        MonarchViTConfig(**(SIZES | fields))
