"""The greedy choice of layers: each round adds the layer with which the measured loss rises least."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_efficient.conversion.measuring.evaluation import CausalEvaluator, checkpoint_logits
from hf_efficient.conversion.stem import layer_choice
from hf_efficient.conversion.stem.layer_choice import cheapest, greedy
from hf_efficient.conversion.stem.patch import Stem
from hf_efficient.errors import HFEError


class StatedProbe:
    """A fake `LayerProbe`: each layer has a cost, and some pairs cost more together."""

    def __init__(self, own: dict[int, float], together: dict[tuple[int, int], float]) -> None:
        self.costs, self._together = own, together
        self.measured: list[tuple[int, ...]] = []

    def rise(self, layers: tuple[int, ...]) -> float:
        pairs = itertools.combinations(sorted(layers), 2)
        return sum(self.costs[i] for i in layers) + sum(self._together.get(pair, 0.0) for pair in pairs)

    def rises(self, chosen: list[int], candidates: list[int]) -> dict[int, float]:
        self.measured += [(*chosen, i) for i in candidates]
        return {i: self.rise((*chosen, i)) for i in candidates}


OWN = {1: 0.10, 2: 0.11, 3: 0.13, 4: 0.30, 5: 0.40, 6: 0.50, 7: 0.60, 8: 0.70, 9: 0.80}


def test_a_layer_that_is_cheap_alone_and_dear_beside_the_others_is_passed_over():
    probe = StatedProbe(OWN, {(1, 2): 0.5})
    rounds = greedy(probe, 3, None)
    assert [r.layer for r in rounds] == [1, 3, 4]
    assert [r.delta_nll for r in rounds] == pytest.approx([0.10, 0.23, 0.53])
    assert cheapest(OWN, 3, None) == [1, 2, 3]


def test_every_round_adds_the_best_of_all_candidates_and_measures_few_of_them():
    generator = torch.Generator().manual_seed(3)
    pairs = itertools.combinations(OWN, 2)
    probe = StatedProbe(OWN, {pair: float(torch.rand(1, generator=generator)) / 2 for pair in pairs})
    rounds = greedy(probe, 6, None)
    chosen: list[int] = []
    for found in rounds:
        rest = [i for i in OWN if i not in chosen]
        assert found.layer == min(rest, key=lambda i: probe.rise((*chosen, i)))
        assert found.delta_nll == pytest.approx(probe.rise((*chosen, found.layer)))
        assert found.candidates[found.layer] == found.delta_nll
        chosen.append(found.layer)
    every = sum(len(OWN) - done for done in range(1, 6))
    assert len(probe.measured) < every
    # The least additions come first, so the dearest layer is not looked at while cheap ones are left.
    assert (1, 9) not in probe.measured


def test_the_measured_rise_of_all_chosen_layers_stays_within_the_limit():
    probe = StatedProbe(OWN, {(1, 3): 0.2, (1, 2): 0.5})
    assert [r.delta_nll for r in greedy(probe, 9, None)][:3] == pytest.approx([0.10, 0.40, 0.73])
    # The costs alone would allow 1, 2 and 3.
    assert [r.layer for r in greedy(probe, 9, 0.39)] == [1]
    assert [r.layer for r in greedy(probe, 9, 0.41)] == [1, 4]


def test_a_limit_that_allows_no_layer_is_named():
    with pytest.raises(HFEError, match=r"max_delta=0\.05 allows no layer: the cheapest costs 0\.1000 nats"):
        greedy(StatedProbe(OWN, {}), 3, 0.05)


def test_all_layers_may_be_chosen_when_there_are_fewer_than_the_limit():
    assert sorted(r.layer for r in greedy(StatedProbe(OWN, {}), 40, None)) == list(OWN)


@pytest.fixture
def choosing(tiny_source, text):
    """A model of six layers, and its calibration with a probe of other text."""
    source = tiny_source(num_hidden_layers=6)
    return source, source.calibration(text, probe=torch.randint(97, (3, 16)))


def test_rises_are_those_of_converting_the_layers_and_measuring_the_whole_model(choosing):
    """In every round, for every candidate, against a conversion and an evaluation of their own."""
    source, calibration = choosing
    patch = Stem(layers="greedy", max_layers=3)
    chosen = patch.choose(source.config, calibration)["stem_layers"]
    rounds = patch.report()["greedy_rounds"]
    assert chosen == sorted(r["layer"] for r in rounds)
    assert len(rounds) == 3
    before: list[int] = []
    for found in rounds:
        assert found["candidates"][found["layer"]] == found["delta_nll"] == min(found["candidates"].values())
        for layer, rise in found["candidates"].items():
            # The probe's tables are fitted side by side.
            both = source.convert(Stem(layers=[*before, layer], sequential=False), calibration)
            report = CausalEvaluator().evaluate(
                calibration.probe,
                "probe",
                checkpoint_logits(both.config, both.reader),
                checkpoint_logits(source.config, source.reader),
            )
            assert rise == pytest.approx(report.delta_nll.mean, abs=1e-5)
        before.append(found["layer"])


def test_layers_whose_conversion_changes_nothing_are_found(choosing):
    """What no feed-forward gives, no table can lose."""
    source, calibration = choosing
    for layer in (2, 5):
        source.reader.tensors[f"model.layers.{layer}.mlp.down_proj.weight"].zero_()
    # On text of the model's own making every other conversion loses.
    probe = source.stock.generate(calibration.probe[:, :4], max_new_tokens=20, do_sample=False, eos_token_id=None)
    calibration = source.calibration(calibration.fit, probe=probe)
    patch = Stem(layers="greedy", max_delta=1e-4)
    assert patch.choose(source.config, calibration)["stem_layers"] == [2, 5]
    assert all(r["delta_nll"] == pytest.approx(0, abs=1e-6) for r in patch.report()["greedy_rounds"])


def test_the_choice_is_in_the_reports_table(choosing):
    source, calibration = choosing
    patch = Stem(layers="greedy", max_layers=2)
    patch.choose(source.config, calibration)
    one, two = patch.report()["greedy_rounds"]
    (line,) = patch.report()["summary"].values()
    assert line == f"{one['layer']} {one['delta_nll']:+.3f}, {two['layer']} {two['delta_nll']:+.3f}"


def test_the_progress_of_a_choice_ends_at_its_end_and_never_goes_back(choosing):
    source, calibration = choosing
    told: list[float] = []
    object.__setattr__(calibration, "progress", lambda stage, done, total: told.append(done / total))
    Stem(layers="greedy", max_layers=4).choose(source.config, calibration)
    assert told == sorted(told)
    assert told[-1] <= 1


def test_candidates_are_fitted_to_the_beginning_of_the_text(choosing, monkeypatch):
    source, calibration = choosing
    sequences, length = calibration.fit.shape
    monkeypatch.setattr(layer_choice, "FIT_TOKENS", length * (sequences // 2))
    short = source.calibration(calibration.fit[: sequences // 2], probe=calibration.probe)
    costs = []
    for text in (calibration, short):
        patch = Stem(max_layers=2)
        patch.choose(source.config, text)
        costs.append(patch.report()["single_layer_delta_nll"])
    assert costs[0] == costs[1]
