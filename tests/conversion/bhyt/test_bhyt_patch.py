"""The BHyT patch: its options, the layers it leaves exact, and the models that it does not take."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_efficient
from hf_efficient.cli.options import build_patches
from hf_efficient.conversion.bhyt.patch import Bhyt
from hf_efficient.convert_checkpoint import convert
from hf_efficient.errors import HFEError, UsageError

QUIET: dict[str, Any] = {"progress": False, "evaluate": False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": 0.0}, "bound=0.0 must be a positive number"),
        ({"bound": -1.0}, "bound=-1.0"),
        ({"bound": math.nan}, "bound=nan"),
        ({"bound": math.inf}, "bound=inf"),
        ({"kappa": 0.0}, "kappa=0.0 must be a positive number"),
        ({"bound": "1"}, "bound='1'"),
        ({"kappa": math.nan}, "kappa=nan"),
        ({"kappa": None}, "kappa=None"),
        ({"second_site": "approx"}, "second_site='approx'.*exact, affine"),
        ({"final": "layernorm"}, "final='layernorm'.*rms, bhyt"),
        ({"exact_layers": [1]}, r"exact_layers=\[1\] goes with second_site=affine"),
        ({"exact_layers": "1,x", "second_site": "affine"}, "exact_layers='1,x'.*0,1"),
        ({"exact_layers": [-1], "second_site": "affine"}, r"exact_layers=\[-1\]"),
        ({"exact_layers": [1, 1], "second_site": "affine"}, "different whole numbers"),
        ({"exact_layers": [True], "second_site": "affine"}, "whole numbers"),
    ],
)
def test_a_wrong_option_is_named_before_any_source_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Bhyt(**options)


def test_layers_that_the_model_has_not_are_named(stock_folder: Callable[..., Path], tmp_path: Path) -> None:
    patch = Bhyt(second_site="affine", exact_layers="0,3,7")
    with pytest.raises(UsageError, match=r"exact_layers \[3, 7\] do not exist.*0 to 2"):
        convert(stock_folder(), tmp_path / "out", [patch], **QUIET)


def test_options_may_be_written_as_on_the_command_line() -> None:
    assert Bhyt(second_site="affine", exact_layers="2, 0").exact_layers == [0, 2]
    assert Bhyt(second_site="affine", exact_layers="none").exact_layers == []
    assert all(field.metadata.get("help") for field in dataclasses.fields(Bhyt))
    assert hf_efficient.Bhyt is Bhyt
    (patch,) = build_patches(["bhyt"], {"bhyt_bound": 1.5, "bhyt_second_site": "affine", "stem_layers": None})
    assert patch == Bhyt(bound=1.5, second_site="affine")


@pytest.mark.parametrize(
    ("options", "needs", "measures"),
    [
        ({}, False, False),
        ({"bound": 1.0}, True, False),
        ({"second_site": "affine"}, True, True),
        ({"second_site": "affine", "exact_layers": [0]}, True, False),
    ],
)
def test_text_is_needed_only_if_something_is_fitted(options: dict[str, Any], needs: bool, measures: bool) -> None:
    patch = Bhyt(**options)
    assert (patch.needs_calibration, patch.measures_choice) == (needs, measures)


def test_layers_whose_mean_square_follows_no_line_stay_exact(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    """0 and 1, and one whose attention adds what the hidden states before it do not predict."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stock = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        stock.model.layers[2].self_attn.o_proj.weight *= 0.01
        stock.model.layers[3].self_attn.o_proj.weight *= 100
    stock.save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "source")
    options: dict[str, Any] = {**QUIET, "calibration": text, "calibration_tokens": 2048}
    report = convert(tmp_path / "source", tmp_path / "out", [Bhyt(second_site="affine")], **options)
    measured = report.patches[0]["measured"]
    misses = {int(index): miss for index, miss in measured["line_misses"].items()}
    assert list(misses) == [0, 1, 2, 3]
    assert misses[2] < 0.03 < misses[3]
    assert report.patches[0]["choices"]["bhyt_exact_layers"] == [0, 1, 3]
    ((site, line),) = measured["sites"].items()
    assert site == "model.layers.2.post_attention_layernorm"
    assert line["miss"] < 0.03
    assert "bhyt, miss of a line" in report.table()
    named = Bhyt(second_site="affine", exact_layers="none")
    report = convert(tmp_path / "source", tmp_path / "named", [named], **options)
    assert report.patches[0]["choices"]["bhyt_exact_layers"] == []
    assert report.patches[0]["measured"]["line_misses"] == {}


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "olmo2", "phi"])
def test_models_with_other_norms_are_refused_as_families(
    stock_folder: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    """(1 + weight), LayerNorm, norms after the sub-layers: none of them is what a conversion takes for RMSNorm."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes((stock_folder() / "model.safetensors").read_bytes())
    fields = json.loads((stock_folder() / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**fields, "model_type": model_type}))
    with pytest.raises(HFEError, match=f"model_type '{model_type}' is not a supported family.*llama.*qwen3") as caught:
        convert(source, tmp_path / "out", [Bhyt()], **QUIET)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()
