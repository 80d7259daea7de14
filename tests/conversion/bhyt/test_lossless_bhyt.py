"""The lossless conversion: the source's logits, its weights bit for bit, and no text read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_efficient.conversion.bhyt.patch import Bhyt
from hf_efficient.conversion.stem.patch import Stem
from hf_efficient.convert_checkpoint import convert
from hf_efficient.errors import UsageError
from hf_efficient.inspection import inspect
from hf_efficient.modeling.bhyt.bhyt_norm import BhytNorm
from hf_efficient.modeling.decoder.rms_norm import DecoderRMSNorm
from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig

QUIET: dict[str, Any] = {"progress": False, "evaluate": False}
OWN = (".lam", ".out_scale")


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def distance(model: PreTrainedModel, stock: PreTrainedModel, ids: Tensor) -> float:
    """Relative distance of the logits."""
    expected = stock(ids).logits.double()
    return float((model(ids).logits.double() - expected).norm() / expected.norm())


def test_logits_of_every_family_stay_within_the_bound(
    stock_folder: Callable[..., Path], stock_name: str, ids: Tensor, tmp_path: Path
) -> None:
    """The relative error of an element is at most u^2 / 3, u = a sqrt(D), for any input."""
    source = stock_folder(stock_name)
    report = convert(source, tmp_path / "out", [Bhyt(final="bhyt")], **QUIET)
    assert report.model_type == "hfe_bhyt"
    model, stock = load(tmp_path / "out"), load(source)
    assert isinstance(model.model.norm, BhytNorm)
    bound = 2**-20 * stock.config.hidden_size / 3
    assert 0 < distance(model, stock, ids) < bound
    assert torch.equal(model(ids).logits.argmax(-1), stock(ids).logits.argmax(-1))


def test_its_lambda_is_held_constant_in_training(
    stock_folder: Callable[..., Path], ids: Tensor, tmp_path: Path
) -> None:
    """It is 0.01: steps of an optimiser that suit a weight of 1 would change it by a hundred times as much."""
    convert(stock_folder(), tmp_path / "out", [Bhyt(final="bhyt")], **QUIET)
    model = load(tmp_path / "out").train()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.endswith(".lam"), name


def test_the_final_norm_stays_unless_requested(stock_folder: Callable[..., Path], tmp_path: Path) -> None:
    convert(stock_folder(), tmp_path / "out", [Bhyt()], **QUIET)
    model = load(tmp_path / "out")
    assert isinstance(model.model.norm, DecoderRMSNorm)
    assert all(isinstance(layer.post_attention_layernorm, BhytNorm) for layer in model.model.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropping_lambda_and_scale_gives_the_source_back_bit_for_bit(
    stock_folder: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    """The inverse of the conversion. Scales are powers of two in fp32, lambdas exact in every dtype."""
    source = stock_folder("qwen2", dtype)
    convert(source, tmp_path / "out", [Bhyt(final="bhyt")], **QUIET)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = {name: tensor for name, tensor in after.items() if not name.endswith(OWN)}
    assert kept.keys() == before.keys()
    for name, tensor in before.items():
        assert kept[name].dtype == dtype
        assert torch.equal(kept[name].view(torch.uint8), tensor.view(torch.uint8)), name
    for name in after.keys() - kept.keys():
        if name.endswith(".lam"):
            assert after[name].dtype == dtype
            assert after[name].double().item() == 10 * 2**-10
        else:
            assert after[name].dtype == torch.float32
            assert torch.equal(after[name], torch.full((32,), 1024.0))


@pytest.mark.parametrize(("width", "exponent"), [(576, -10), (4096, -10), (6100, -10), (6144, -11), (24_576, -12)])
def test_a_is_the_largest_power_of_two_that_rounding_hides(width: int, exponent: int) -> None:
    """a sqrt(D) <= 0.0765, where tanh differs from its argument by half a unit in the last place of bfloat16."""
    config = EfficientDecoderConfig(hidden_size=width, head_dim=64, num_attention_heads=4)
    assert Bhyt().choose(config, None)["bhyt_lambda_input"] == 10 * 2.0**exponent
    assert 2.0**exponent <= min(2**-10, 0.0765 / math.sqrt(width))
    assert exponent == -10 or 2.0 ** (exponent + 1) > 0.0765 / math.sqrt(width)


def test_no_text_is_read(tiny_llama: Path, tmp_path: Path) -> None:
    """Neither to convert nor to plan: a text that is not there is not missed."""
    report = convert(tiny_llama, tmp_path / "out", [Bhyt()], calibration="/nowhere/at-all.jsonl", **QUIET)
    assert report.calibration is None


def test_eps_of_a_converted_checkpoint_is_that_of_the_source(
    stock_folder: Callable[..., Path], ids: Tensor, tmp_path: Path
) -> None:
    """Not the 1e-6 of the paper's code: where the stream is small another eps is another norm."""
    source = tmp_path / "small"
    stock = AutoModelForCausalLM.from_pretrained(stock_folder("llama-tied"))
    assert stock.config.rms_norm_eps == 1e-5
    with torch.no_grad():
        stock.model.embed_tokens.weight *= 0.01
    stock.save_pretrained(source)
    convert(source, tmp_path / "out", [Bhyt()], **QUIET)
    model = load(tmp_path / "out")
    assert model.config.bhyt_eps == 1e-5
    assert distance(model, stock, ids) < 2e-5
    for module in model.modules():
        if isinstance(module, BhytNorm):
            module.eps = 1e-6
    assert distance(model, stock, ids) > 1e-2


def test_stem_composes_with_bhyt_in_every_order(tiny_llama: Path, text: Path, ids: Tensor, tmp_path: Path) -> None:
    """Together, BHyT on a STEM checkpoint, or STEM on a BHyT checkpoint: the logits of STEM alone, the same tokens."""
    options: dict[str, Any] = {**QUIET, "calibration": text, "calibration_tokens": 2048}
    convert(tiny_llama, tmp_path / "stem", [Stem(layers=[1, 2])], **options)
    convert(tiny_llama, tmp_path / "bhyt", [Bhyt()], **options)
    made = {
        "both": convert(tiny_llama, tmp_path / "both", [Stem(layers=[1, 2]), Bhyt()], **options),
        "bhyt-last": convert(tmp_path / "stem", tmp_path / "bhyt-last", [Bhyt()], **options),
        "stem-last": convert(tmp_path / "bhyt", tmp_path / "stem-last", [Stem(layers=[1, 2])], **options),
    }
    alone = load(tmp_path / "stem")
    expected = alone.generate(ids[:, :5], max_new_tokens=8, do_sample=False)
    for name, report in made.items():
        assert report.model_type == "hfe_decoder"
        model = load(tmp_path / name)
        assert sorted(model.config.active_patches) == ["bhyt", "stem"]
        assert distance(model, alone, ids) < 1e-4
        assert torch.equal(model.generate(ids[:, :5], max_new_tokens=8, do_sample=False), expected)


def test_fp32_tensors_of_a_bhyt_source_stay_fp32(stock_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Also when they are copied and another dtype is requested: gains and lines must not be rounded."""
    convert(stock_folder(), tmp_path / "bhyt", [Bhyt()], **QUIET)
    convert(tmp_path / "bhyt", tmp_path / "copy", [], dtype="bfloat16", **QUIET)
    found = {name: tensor.dtype for name, tensor in load_file(tmp_path / "copy" / "model.safetensors").items()}
    assert {name for name, dtype in found.items() if dtype == torch.float32} == {
        name for name in found if name.endswith(".out_scale")
    }
    assert {found[name] for name in found if not name.endswith(".out_scale")} == {torch.bfloat16}


def test_a_bhyt_checkpoint_is_no_source_for_another(stock_folder: Callable[..., Path], tmp_path: Path) -> None:
    convert(stock_folder(), tmp_path / "bhyt", [Bhyt()], **QUIET)
    with pytest.raises(UsageError, match=r"a BHyT checkpoint already.*stock source again"):
        convert(tmp_path / "bhyt", tmp_path / "again", [Bhyt()], **QUIET)


def test_the_report_and_the_card_say_what_was_done(stock_folder: Callable[..., Path], tmp_path: Path) -> None:
    report = convert(stock_folder(), tmp_path / "out", [Bhyt()], **QUIET)
    assert "lossless: a norm's outputs are within 1.0e-05 of the source's" in report.table()
    assert "calibrated on" not in report.table()
    assert set(report.tensors["computed"].values()) == {"1 / a", "lambda"}
    stored = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert stored["patches"][0]["options"]["second_site"] == "exact"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "arXiv:2601.09719" in card
    assert "nothing is bounded." in card
    assert inspect(tmp_path / "out").model_type == "hfe_bhyt"
