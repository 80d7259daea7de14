"""What is fitted to text: gains and lines against brute force, and on the streams they are meant for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_efficient.conversion.bhyt.fits import ChannelGains, MeanSquareLine, after_attention, mean_square
from hf_efficient.conversion.bhyt.patch import Bhyt
from hf_efficient.conversion.measuring.calibration import prepare_calibration
from hf_efficient.conversion.measuring.evaluation import checkpoint_logits
from hf_efficient.conversion.measuring.layerwise import LayerwisePass
from hf_efficient.conversion.reading.source import open_source
from hf_efficient.convert_checkpoint import convert

A, EPS = 0.1, 1e-5
QUIET: dict[str, Any] = {"progress": False, "evaluate": False, "calibration_tokens": 2048}


def normalised(x: Tensor) -> Tensor:
    return x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)


def tokens(x: Tensor) -> Tensor:
    """[B, S, ...] without first positions -> [N, ...]."""
    return x[:, 1:].flatten(0, 1)


# Gains


def test_gains_are_least_squares_of_the_sources_normalised_rows() -> None:
    source, own = 3 * torch.randn(4, 20, 16), 5 * torch.randn(4, 20, 16)
    own = own + 4 * source  # alike, as the streams of two models are
    fit = ChannelGains.fit(A, EPS, source, own)
    z, t = tokens(normalised(source)), tokens(torch.tanh(A * normalised(own)))
    for j in range(16):
        best = torch.linalg.lstsq(t[:, j, None], z[:, j, None]).solution.item()
        assert fit.gain[j].item() == pytest.approx(min(max(best, 1 / A), 4 / A), rel=1e-6)
    error = (fit.gain.double() * t - z).norm() / z.norm()
    assert fit.report["relative_error"] == pytest.approx(error.item(), rel=1e-5)


def test_gains_of_its_own_stream_beat_the_plain_ones() -> None:
    x = torch.randn(4, 64, 32)
    x[:, 5] *= torch.linspace(1, 30, 32)
    z, t = tokens(normalised(x)), tokens(torch.tanh(1.0 * normalised(x)))
    fit = ChannelGains.fit(1.0, EPS, x, x)
    assert fit.report["relative_error"] < 0.8 * float((t - z).norm() / z.norm())


def test_gains_stay_between_one_and_four_times_the_plain_one() -> None:
    x = torch.randn(2, 50, 8)
    backwards = x.clone()
    backwards[..., 0] *= -1  # its best gain is negative
    assert ChannelGains.fit(A, EPS, x, backwards).gain[0].item() == pytest.approx(1 / A)
    shrunk = x.clone()
    shrunk[..., 1] *= 0.01
    assert ChannelGains.fit(A, EPS, x, shrunk).gain[1].item() == pytest.approx(4 / A)


def test_a_silent_channel_keeps_the_plain_gain() -> None:
    x = torch.randn(2, 50, 8)
    x[..., 3] = 0
    fit = ChannelGains.fit(A, EPS, x, x)
    assert fit.gain[3].item() == pytest.approx(1 / A)
    assert fit.gain.isfinite().all()


def test_first_positions_do_not_count() -> None:
    x = torch.randn(3, 30, 16)
    parked = x.clone()
    parked[:, 0] = 0
    parked[:, 0, 2] = 1e4
    assert torch.equal(ChannelGains.fit(A, EPS, x, x).gain, ChannelGains.fit(A, EPS, parked, parked).gain)
    v, target = mean_square(x), mean_square(2 * x + 1)
    plain, changed = (
        MeanSquareLine.fit(torch.cat((first, v[:, 1:]), 1), target) for first in (v[:, :1], 1e6 * v[:, :1])
    )
    # The order in which a product sums varies with where its operands lie in memory.
    assert astuple(changed) == pytest.approx(astuple(plain), rel=1e-12)


def test_outliers_and_saturation_are_counted() -> None:
    x = torch.randn(3, 30, 64)
    x[1, 7, 5] = 500.0
    fit = ChannelGains.fit(0.5, EPS, x, x)
    z = tokens(normalised(x))
    assert fit.report["max_over_rms"] == pytest.approx(z.abs().max().item(), rel=1e-6)
    assert 7.9 < fit.report["max_over_rms"] <= 8  # sqrt(64), which nothing exceeds
    assert fit.report["saturated"] == pytest.approx((torch.tanh(0.5 * z).abs() > 0.9).double().mean().item())


# Lines


def test_a_line_is_recovered_whatever_the_scale_of_the_tokens() -> None:
    v = 10 ** torch.empty(4, 50, dtype=torch.float64).uniform_(-2, 6)
    line = MeanSquareLine.fit(v, 1.3 * v + 0.7)
    assert line.slope == pytest.approx(1.3, rel=1e-6)
    assert line.intercept == pytest.approx(0.7, rel=1e-4)
    assert not line.through_origin
    assert line.miss < 1e-4


@pytest.mark.parametrize(("slope", "intercept"), [(-1.0, 5.0), (1.5, -1.0)])
def test_a_line_that_falls_or_begins_below_zero_is_replaced_by_the_best_from_zero(
    slope: float, intercept: float
) -> None:
    v = torch.linspace(1, 3, 40, dtype=torch.float64).repeat(2, 1)
    target = slope * v + intercept
    line = MeanSquareLine.fit(v, target)
    assert line.through_origin
    assert line.intercept == 0
    ratio = tokens(v) / tokens(target)

    def error(slope: float) -> float:
        return float((slope * ratio - 1).square().sum())

    assert line.slope > 0
    assert error(line.slope) <= min(error(line.slope * 0.99), error(line.slope * 1.01))
    assert line.miss == pytest.approx(float(((line.slope * ratio).sqrt() - 1).square().mean().sqrt()))


# On a model


@pytest.fixture(scope="module")
def bounded(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with every norm bounded and every second site but that of layer 1 estimated."""
    output = tmp_path_factory.mktemp("bounded") / "out"
    patch = Bhyt(bound=2.0, kappa=4.0, second_site="affine", exact_layers=[1], final="bhyt")
    convert(tiny_llama, output, [patch], calibration=text, **QUIET)
    return output


@pytest.fixture(scope="module")
def fit_ids(tiny_llama: Path, text: Path) -> Tensor:
    return prepare_calibration(open_source(str(tiny_llama)), str(text), tokens=2048).fit


@torch.no_grad()
def streams(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """The residual stream in front of every norm [B, S, D]."""
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        # Ours may be given what is still to be added; the stock norm gets the sum.
        return lambda _, given, __: seen.update({name: sum(x for x in given[:2] if isinstance(x, Tensor))})

    norms = {name: module for name, module in model.named_modules() if name.endswith("norm")}
    handles = [module.register_forward_hook(remember(name)) for name, module in norms.items()]
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


def test_each_gain_draws_the_converted_stream_to_the_source(bounded: Path, tiny_llama: Path, fit_ids: Tensor) -> None:
    """Brute force on the finished model: what a site is fitted to is what it meets when the whole model runs."""
    stock, model = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tiny_llama, bounded))
    before, after = streams(stock, fit_ids), streams(model, fit_ids)
    tensors = load_file(bounded / "model.safetensors")
    eps = stock.config.rms_norm_eps
    assert len(before) == 9
    for site in before:
        expected = ChannelGains.fit(0.5, eps, before[site], after[site]).gain
        torch.testing.assert_close(tensors[f"{site}.out_scale"], expected, rtol=1e-4, atol=0)
    # Not so for the streams of the source alone, nor for those of the converted model alone.
    last = "model.norm"
    for other in (before[last], before[last]), (after[last], after[last]):
        assert (ChannelGains.fit(0.5, eps, *other).gain / tensors[f"{last}.out_scale"] - 1).abs().max() > 0.01


def test_a_pass_layer_by_layer_gives_the_logits_of_the_whole_model(bounded: Path, fit_ids: Tensor) -> None:
    """Lines, scales and a bounded final norm are read too where a BHyT checkpoint is itself a source."""
    source = open_source(str(bounded))
    model = AutoModelForCausalLM.from_pretrained(bounded).eval()
    with torch.no_grad():
        found = torch.cat(list(checkpoint_logits(source.config, source.reader)(fit_ids)))
        torch.testing.assert_close(found, model(fit_ids).logits.flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_each_line_is_fitted_to_the_converted_stream(bounded: Path, fit_ids: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(bounded).eval()
    seen = streams(model, fit_ids)
    tensors = load_file(bounded / "model.safetensors")
    assert "model.layers.1.post_attention_layernorm.affine" not in tensors
    for index in (0, 2, 3):
        first, second = (seen[f"model.layers.{index}.{leaf}_layernorm"] for leaf in ("input", "post_attention"))
        line = MeanSquareLine.fit(mean_square(first), mean_square(second))
        found = tensors[f"model.layers.{index}.post_attention_layernorm.affine"]
        torch.testing.assert_close(found, line.tensor, rtol=1e-3, atol=1e-4)


def test_weights_are_the_sources_and_outputs_are_bounded(bounded: Path, tiny_llama: Path, fit_ids: Tensor) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llama, bounded))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: after[name].item() for name in after if name.endswith(".lam")} == {
        f"{name.removesuffix('.weight')}.lam": 2.0 for name in before if "norm" in name
    }
    model = AutoModelForCausalLM.from_pretrained(bounded).eval()
    checked = 0
    for module in model.modules():
        if type(module).__name__ == "BhytNorm":
            limit = (module.weight * module.out_scale).abs()
            x = torch.randn(5, 32)
            x[:, 3] = 1e4
            statistic = (x.square().mean(-1), module.lam)
            assert (module(x, None, statistic)[0].abs() <= limit * (1 + 1e-6)).all()
            checked += 1
    assert checked == 9


def test_a_bounded_model_with_fitted_gains_is_nearer_to_its_source(
    tiny_llama: Path, text: Path, tmp_path: Path, fit_ids: Tensor
) -> None:
    patch = Bhyt(bound=1.0, kappa=1.0)
    report = convert(tiny_llama, tmp_path / "out", [patch], calibration=text, **QUIET)
    stock, model = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tiny_llama, tmp_path / "out"))
    with torch.no_grad():
        expected = stock(fit_ids).logits
        fitted = (model(fit_ids).logits - expected).norm() / expected.norm()
        for name, buffer in model.named_buffers():
            if name.endswith("out_scale"):
                buffer.fill_(1.0)
        plain = (model(fit_ids).logits - expected).norm() / expected.norm()
    assert fitted < 0.6 * plain
    sites = report.patches[0]["measured"]["sites"]
    assert len(sites) == 8
    for found in sites.values():
        assert 0 < found["relative_error"] < 0.5
        assert 1 < found["max_over_rms"] <= math.sqrt(32)
        assert 0 < found["saturated"] < 1
        least, median, most = found["gain_times_a"]
        assert 1 <= least <= median <= most <= 4
    table = report.table()
    assert "bhyt, error of a norm" in table
    assert "bhyt, |tanh| above 0.9" in table
    assert "calibrated on" in table


def test_gains_go_with_the_lambda_that_the_checkpoint_stores(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    """1.234 is 1.2344 in bfloat16; the plain gain of a silent channel shows which of the two was taken."""
    convert(tiny_llama, tmp_path / "out", [Bhyt(bound=1.234)], dtype="bfloat16", calibration=text, **QUIET)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    lam = tensors["model.layers.0.input_layernorm.lam"]
    assert lam.dtype == torch.bfloat16
    assert lam.item() != 1.234
    gains = torch.cat([t for name, t in tensors.items() if name.endswith("out_scale")])
    assert gains.dtype == torch.float32
    assert gains.min().item() >= 10 / lam.item() * (1 - 1e-6)
    assert gains.max().item() < 40 / lam.item()


def test_the_stream_after_the_attention_is_what_the_second_norm_sees(tiny_llama: Path, fit_ids: Tensor) -> None:
    source = open_source(str(tiny_llama))
    run = LayerwisePass(source.config, source.reader, [fit_ids])
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    seen = streams(stock, fit_ids)
    for index, layer in run.layers():
        (stream,) = run.batches
        before = stream.hidden.clone()
        found = after_attention(run, index, layer, stream)
        torch.testing.assert_close(found, seen[f"model.layers.{index}.post_attention_layernorm"], rtol=1e-4, atol=1e-5)
        assert torch.equal(stream.hidden, before)
        assert isinstance(layer.mlp.down_proj, nn.Linear)
        run.run_layer(index, layer, stream)
