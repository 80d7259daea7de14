"""The STEM patch: options, what it changes, how it chooses layers, what it reports."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from hf_efficient.conversion.measuring.evaluation import CausalEvaluator, checkpoint_logits
from hf_efficient.conversion.stem.patch import Stem
from hf_efficient.errors import HFEError, UsageError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ""}, "layers=''.*commas"),
        ({"layers": "1,x"}, "layers='1,x'"),
        ({"layers": [1, 1]}, "different whole numbers"),
        ({"layers": [1.5]}, "whole numbers"),
        ({"layers": [True]}, "whole numbers"),
        ({"layers": 3}, "layers=3 must be auto, greedy, or different whole numbers"),
        ({"init": "median"}, "init='median'.*gated_mean"),
        ({"shrinkage": -1.0}, "shrinkage=-1.0 must be 0 or more"),
        ({"shrinkage": math.nan}, "shrinkage=nan"),
        ({"shrinkage": math.inf}, "shrinkage=inf must be 0 or more, and finite"),
        ({"shrinkage": "4"}, "shrinkage='4'"),
        ({"ridge": 0.0}, "ridge=0.0 must be positive"),
        ({"ridge": math.inf}, "ridge=inf must be positive and finite"),
        ({"max_layers": 1.5}, "max_layers=1.5 must be at least 1, and whole"),
        ({"max_delta": math.inf}, "max_delta=inf"),
        ({"max_layers": 0}, "max_layers=0 must be at least 1"),
        ({"max_delta": 0.0}, "max_delta=0.0 must be positive"),
        ({"layers": [1], "max_layers": 2}, "layers are named"),
    ],
)
def test_a_wrong_option_is_named_before_any_source_is_read(options, message):
    with pytest.raises(UsageError, match=message):
        Stem(**options)


def test_layers_may_be_written_as_on_the_command_line():
    assert Stem(layers="7, 1,4").layers == [1, 4, 7] == Stem(layers=(4, 7, 1)).layers


def test_every_field_has_help_for_the_command_line():
    assert all(field.metadata.get("help") for field in dataclasses.fields(Stem))


def test_layers_that_the_model_has_not_are_named(tiny_source):
    with pytest.raises(UsageError, match=r"\[4, 9\] do not exist.*0 to 3"):
        Stem(layers=[1, 4, 9]).check(tiny_source().config)


def test_a_stem_checkpoint_is_no_source(tiny_source, text):
    source = tiny_source()
    patched = source.convert(Stem(layers=[1]), source.calibration(text))
    with pytest.raises(UsageError, match=r"STEM checkpoint already.*stock source"):
        Stem(layers=[2]).check(patched.config)


def test_layer_zero_is_warned_about(tiny_source, caplog):
    config = tiny_source().config
    with caplog.at_level("WARNING", "hf_efficient"):
        Stem(layers=[1]).check(config)
        assert not caplog.records
        Stem(layers=[0]).check(config)
    assert "layer 0" in caplog.text


@pytest.mark.parametrize("keep", [False, True])
def test_up_projections_are_dropped_unless_they_are_kept(tiny_source, text, keep):
    source = tiny_source("llama-biased")
    patched = source.convert(Stem(layers=[1, 3], keep_up_proj=keep), source.calibration(text))
    added = set(patched.reader.tensors) - set(source.reader.tensors)
    dropped = set(source.reader.tensors) - set(patched.reader.tensors)
    assert added == {f"model.layers.{i}.mlp.stem_embed.weight" for i in (1, 3)}
    projections = {f"model.layers.{i}.mlp.up_proj.{part}" for i in (1, 3) for part in ("weight", "bias")}
    assert dropped == (set() if keep else projections)
    assert patched.config.stem_layers == [1, 3]
    assert patched.config.stem_keep_up_proj is keep


def test_tables_come_in_the_checkpoints_dtype(tiny_source, text):
    source = tiny_source()
    source.config.dtype = torch.bfloat16
    patched = source.convert(Stem(layers=[1]), source.calibration(text))
    assert patched.reader.tensors["model.layers.1.mlp.stem_embed.weight"].dtype == torch.bfloat16


def test_automatic_choice_takes_the_layers_that_cost_least_by_themselves(tiny_source, text):
    """The costs of one traversal are those of converting each layer alone and evaluating it."""
    source = tiny_source(num_hidden_layers=6)
    probe = torch.randint(97, (3, 16))
    calibration = source.calibration(text, probe=probe)
    patch = Stem(max_layers=2)
    chosen = patch.choose(source.config, calibration)["stem_layers"]
    costs = patch.report()["single_layer_delta_nll"]
    assert set(costs) == {1, 2, 3, 4, 5}
    assert chosen == sorted(sorted(costs, key=costs.get)[:2])
    for layer, cost in costs.items():
        alone = source.convert(Stem(layers=[layer]), calibration)
        report = CausalEvaluator().evaluate(
            probe,
            "probe",
            checkpoint_logits(alone.config, alone.reader),
            checkpoint_logits(source.config, source.reader),
        )
        assert cost == pytest.approx(report.delta_nll.mean, abs=1e-5)


def test_automatic_choice_is_a_third_of_the_layers_by_default(tiny_source, text):
    source = tiny_source(num_hidden_layers=6)
    assert len(Stem().choose(source.config, source.calibration(text))["stem_layers"]) == 2


def test_automatic_choice_keeps_within_its_budget(tiny_source, text):
    source = tiny_source(num_hidden_layers=6)
    calibration = source.calibration(text)
    patch = Stem(max_layers=5)
    patch.choose(source.config, calibration)
    costs = sorted(max(cost, 0.0) for cost in patch.report()["single_layer_delta_nll"].values())
    budget = sum(costs[:3]) + costs[3] / 2
    assert costs[3] > 0
    assert len(Stem(max_layers=5, max_delta=budget).choose(source.config, calibration)["stem_layers"]) == 3


def test_a_budget_that_allows_no_layer_is_named(tiny_source, text):
    source = tiny_source(num_hidden_layers=4)
    # On text of the model's own making every conversion loses, even if the model is random.
    probe = source.stock.generate(text[:, :4], max_new_tokens=20, do_sample=False, eos_token_id=None)
    calibration = source.calibration(text, probe=probe)
    patch = Stem()
    patch.choose(source.config, calibration)
    cheapest = min(patch.report()["single_layer_delta_nll"].values())
    assert cheapest > 0
    with pytest.raises(HFEError, match="allows no layer: the cheapest costs") as caught:
        Stem(max_delta=cheapest / 2).choose(source.config, calibration)
    assert caught.value.exit_code == 1


def test_the_report_has_errors_by_layer_and_by_calibration_count(tiny_source, text):
    source = tiny_source()
    held_out = torch.cat((text[:1], torch.randint(60, 97, (1, 32))))
    patch = Stem(layers=[1, 2])
    source.convert(patch, source.calibration(text, held_out))
    report = patch.report()
    assert set(report["layers"]) == {1, 2}
    for layer in report["layers"].values():
        assert all(0 < error < 2 for error in layer["relative_error"].values())
        assert all(0 < share < 1 for share in layer["within_token_share"].values())
        shares = {name: bucket["share_of_tokens"] for name, bucket in layer["relative_error_by_count"].items()}
        assert shares["0"] == pytest.approx(0.5)  # the second sequence holds no token of the calibration text
        assert sum(shares.values()) == pytest.approx(1)
        assert layer["relative_error_by_count"]["0"]["up"] > layer["relative_error_by_count"]["4-31"]["up"]


def test_the_floor_is_what_the_best_table_leaves(tiny_source, text):
    """On its own calibration text, without shrinkage, the error squared is the within-token share."""
    source = tiny_source()
    for init, quantity in (("mean", "up"), ("gated_mean", "gated_up")):
        # First positions do not count for the error, so the text has a token there that counts nowhere else.
        ids = torch.cat((torch.full((6, 1), 90), text), 1)
        patch = Stem(layers=[2], init=init, shrinkage=0.0)
        source.convert(patch, source.calibration(ids))
        layer = patch.report()["layers"][2]
        assert layer["relative_error"][quantity] ** 2 == pytest.approx(layer["within_token_share"][quantity], abs=0.02)
