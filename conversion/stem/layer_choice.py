"""Which layers of a model become STEM layers: the ones whose conversion raises the loss of a little text least.

The probe is text that no table is fitted to. A table of every layer but 0 is fitted once, to the source's own stream of
the calibration text's beginning, and only its rows of the probe's tokens are kept: ``R * intermediate_size`` fp32
numbers a layer, R distinct tokens.
Sets of layers are then compared by running the probe through the model with these layers converted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from hf_efficient.conversion.measuring.calibration import Calibration
from hf_efficient.conversion.measuring.evaluation import nll_by_position
from hf_efficient.conversion.measuring.layerwise import BatchState, LayerwisePass
from hf_efficient.conversion.stem.tables import FittedTable, stem_feed_forward
from hf_efficient.errors import HFEError
from hf_efficient.modeling.decoder.modeling_decoder import DecoderLayer

# At most so many calibration tokens fit the tables of the candidates. On SmolLM2-135M, 6,144 took 50 seconds less of
# processor time and chose layers with a KL of 0.255 instead of 0.228.
FIT_TOKENS = 18_432
# Candidates of a round of the greedy choice that are measured together; the round ends when no other can be better.
_TOGETHER = 4

# Moves the only stream of a pass through the next layer, by index, and fits the layer's table to what it saw.
FitLayer = Callable[[int, DecoderLayer], FittedTable]


@dataclass
class Round:
    """One step of the greedy choice.

    Attributes:
        layer: the layer that was added.
        delta_nll: rise of the probe's loss, in nats per token, with all layers chosen so far.
        candidates: the same for every layer that was measured in this round.
    """

    layer: int
    delta_nll: float
    candidates: dict[int, float]


class LayerProbe:
    """Rise of the probe's loss when layers are converted.

    Args:
        calibration: the source model and its texts.
        fitter: for a pass of the calibration text alone, what fits its layers in turn.
        rounds: traversals to be expected after the first, for the progress alone.

    Attributes:
        layers: the layers that may be chosen: all but 0, whose rows could not be fetched ahead.
        costs: rise of the loss with each of them converted alone, in nats per token.
    """

    def __init__(self, calibration: Calibration, fitter: Callable[[LayerwisePass], FitLayer], rounds: int = 0) -> None:
        self._calibration = calibration
        self._steps, self._done = 2 + rounds, 0
        self.layers = range(1, calibration.config.num_hidden_layers)
        self._run = calibration.start(calibration.probe)
        (self._start,) = self._run.batches
        self._stock_nll = 0.0
        self._rows = self._fit_rows(fitter)
        self.costs = self.rises((), self.layers)

    def _fit_rows(self, fitter: Callable[[LayerwisePass], FitLayer]) -> dict[int, Tensor]:
        fit_text = self._calibration.fit
        run = self._calibration.start(fit_text[: max(FIT_TOKENS // fit_text.shape[1], 1)])
        fit, rows = fitter(run), {}
        for index, layer in run.layers():
            table = fit(index, layer)
            if index in self.layers:
                rows[index] = table.at(self._run.vocabulary, self._run.embeddings)
            self._tell()
        return rows

    def _tell(self) -> None:
        """Move the progress on by a layer of a traversal; how many traversals there will be is a guess."""
        layers = self._calibration.config.num_hidden_layers
        self._done = min(self._done + 1, self._steps * layers)
        self._calibration.progress("choose layers", self._done, self._steps * layers)

    @torch.no_grad()
    def rises(self, chosen: Collection[int], candidates: Collection[int]) -> dict[int, float]:
        """Rise of the loss, in nats per token, when `chosen` and one candidate more are converted, for each candidate.

        One traversal: a candidate's branch leaves the common stream at its layer.
        """
        run, common = self._run, self._start.clone()
        branches: dict[int, BatchState] = {}
        last = max(candidates)
        for index, layer in run.layers():
            with stem_feed_forward(run, layer, self._rows[index] if index in chosen else None):
                for branch in branches.values():
                    run.run_layer(index, layer, branch)
                if index in candidates:
                    branches[index] = common.clone()
                if index < last or not chosen:
                    run.run_layer(index, layer, common)
            if index in candidates:
                with stem_feed_forward(run, layer, self._rows[index]):
                    run.run_layer(index, layer, branches[index])
            self._tell()
        if not chosen:
            (self._stock_nll,) = self._losses(common)
        return {i: loss - self._stock_nll for i, loss in zip(branches, self._losses(*branches.values()), strict=True)}

    def _losses(self, *streams: BatchState) -> list[float]:
        ids = self._calibration.probe
        return [float(nll_by_position(pieces, ids).double().mean()) for pieces in self._run.logits(*streams)]


def cheapest(costs: dict[int, float], max_layers: int, max_delta: float | None) -> list[int]:
    """Layers in the order of their own costs, while their number and the sum of the costs stay within the limits.

    Returns:
        The layers, sorted by index.
    """
    chosen: list[int] = []
    spent = 0.0
    for index in sorted(costs, key=lambda i: (costs[i], i))[:max_layers]:
        spent += max(costs[index], 0.0)
        if max_delta is not None and spent > max_delta:
            break
        chosen.append(index)
    if not chosen:
        _refuse_budget(max_delta, min(costs.values()))
    return sorted(chosen)


def greedy(probe: LayerProbe, max_layers: int, max_delta: float | None) -> list[Round]:
    """Start with the layer that costs least by itself, and add, round by round, the one that raises the loss least.

    Errors compound: what a layer adds grows, as a rule, with the layers converted already. So a candidate is measured
    again only while what it added when last measured is less than what the best of the round adds.

    Args:
        max_layers: rounds, at most.
        max_delta: the measured rise with all chosen layers together stays within this; None for no limit.
    """
    added = dict(probe.costs)
    rounds: list[Round] = []
    while added and len(rounds) < max_layers:
        before = rounds[-1].delta_nll if rounds else 0.0
        chosen = [r.layer for r in rounds]
        measured = {} if chosen else dict(added)
        waiting = sorted(added.keys() - measured.keys(), key=lambda i: (added[i], i))
        while waiting and (not measured or before + added[waiting[0]] < min(measured.values())):
            measured.update(probe.rises(chosen, waiting[:_TOGETHER]))
            del waiting[:_TOGETHER]
        added.update({index: rise - before for index, rise in measured.items()})
        best = min(measured, key=lambda i: (measured[i], i))
        if max_delta is not None and measured[best] > max_delta:
            break
        rounds.append(Round(best, measured[best], measured))
        del added[best]
    if not rounds:
        _refuse_budget(max_delta, min(added.values()))
    return rounds


def _refuse_budget(max_delta: float | None, cheapest_cost: float) -> NoReturn:
    raise HFEError(
        f"stem max_delta={max_delta} allows no layer: the cheapest costs {cheapest_cost:.4f} nats", "raise it"
    )
