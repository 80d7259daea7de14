"""Choice of the layers to convert to STEM: those whose conversion raises the loss of a short probe text least.

No table is fitted to the probe. A table of every layer but 0 is fitted once, to the hidden states of the source model
on the beginning of the calibration text. Only its rows of the probe's R distinct tokens are kept, which are
``R * intermediate_size`` fp32 numbers per layer. Sets of layers are then compared by running the probe through the
model with these layers converted.
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
from hf_efficient.modeling.decoder.decoder_layer import DecoderLayer

# Largest number of calibration tokens that the candidates' tables are fitted to. On SmolLM2-135M, 6,144 took 50 seconds
# less of processor time, and the chosen layers had a KL of 0.255 instead of 0.228.
FIT_TOKENS = 18_432
# Candidates of a greedy round that are measured in one traversal of the layers.
_CANDIDATES_PER_TRAVERSAL = 4

# (index, layer) -> table. Applies the layer to the only batch of a pass and fits a STEM table to its hidden states.
FitLayer = Callable[[int, DecoderLayer], FittedTable]


@dataclass
class Round:
    """One step of the greedy choice.

    Attributes:
        layer: the layer that was added.
        delta_nll: increase in the probe's loss, in nats per token, with all layers chosen so far.
        candidates: the increase with the earlier layers and each of the layers that were measured in this round.
    """

    layer: int
    delta_nll: float
    candidates: dict[int, float]


class LayerProbe:
    """Measures the increase in the probe text's loss when layers are converted. Creating it runs the source model.

    Args:
        calibration: the source model and its texts.
        fitter: called with the pass of the calibration text through the source model; returns its `FitLayer`.
        rounds: expected number of traversals after the first, only used for the progress bar.

    Attributes:
        layers: the layers that may be chosen: all but 0, whose rows could not be prefetched.
        costs: increase in the loss with each of these layers converted alone, in nats per token.

    Raises:
        HFEError: a weight cannot be read or holds NaN or infinity, or the `fitter` raises it.
    """

    def __init__(self, calibration: Calibration, fitter: Callable[[LayerwisePass], FitLayer], rounds: int = 0) -> None:
        self._calibration = calibration
        self._steps, self._done = 2 + rounds, 0
        self.layers = range(1, calibration.config.num_hidden_layers)
        self._run = calibration.start(calibration.probe)
        (self._embedded,) = self._run.batches
        self._stock_nll = 0.0
        self._rows = self._fit_rows(fitter)
        self.costs = self.rises((), self.layers)

    def _fit_rows(self, fitter: Callable[[LayerwisePass], FitLayer]) -> dict[int, Tensor]:
        """Fit each layer's table; returns layer -> rows of the probe's distinct tokens [R, intermediate_size]."""
        fit_text = self._calibration.fit
        run = self._calibration.start(fit_text[: max(FIT_TOKENS // fit_text.shape[1], 1)])
        fit, rows = fitter(run), {}
        for index, layer in run.layers():
            table = fit(index, layer)
            if index in self.layers:
                rows[index] = table.at(self._run.vocabulary, self._run.embeddings)
            self._advance_progress()
        return rows

    def _advance_progress(self) -> None:
        """Advance the progress by one layer of a traversal; the number of traversals is an estimate."""
        layers = self._calibration.config.num_hidden_layers
        self._done = min(self._done + 1, self._steps * layers)
        self._calibration.progress("choose layers", self._done, self._steps * layers)

    @torch.no_grad()
    def rises(self, chosen: Collection[int], candidates: Collection[int]) -> dict[int, float]:
        """For each candidate, the increase in the loss, in nats per token, with it and the layers `chosen` converted.

        There is at least one candidate. All are measured in one traversal of the layers: a candidate has hidden states
        of its own from its layer on, and shares those of the other candidates below it. A call without `chosen` also
        stores the loss of the source model, which later calls compare with. Errors as for `LayerwisePass.layers`.
        """
        run, common = self._run, self._embedded.clone()
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
            self._advance_progress()
        if not chosen:
            (self._stock_nll,) = self._losses(common)
        return {i: loss - self._stock_nll for i, loss in zip(branches, self._losses(*branches.values()), strict=True)}

    def _losses(self, *batches: BatchState) -> list[float]:
        """Mean loss of the probe, in nats per token, for each of its final hidden states."""
        ids = self._calibration.probe
        return [float(nll_by_position(chunks, ids).double().mean()) for chunks in self._run.logits(*batches)]


def cheapest(costs: dict[int, float], max_layers: int, max_delta: float | None) -> list[int]:
    """The layers with the lowest costs, as many as the limits allow; of equal costs the lower layer first.

    Args:
        costs: by layer, in nats per token.
        max_layers: largest number of layers.
        max_delta: largest sum of the costs, negative ones counted as 0; None for no limit.

    Returns:
        The layers, sorted by index.

    Raises:
        HFEError: not even the cheapest layer is within `max_delta`.
    """
    chosen: list[int] = []
    total = 0.0
    for index in sorted(costs, key=lambda i: (costs[i], i))[:max_layers]:
        total += max(costs[index], 0.0)
        if max_delta is not None and total > max_delta:
            break
        chosen.append(index)
    if not chosen:
        _raise_budget_error(max_delta, min(costs.values()))
    return sorted(chosen)


def greedy(probe: LayerProbe, max_layers: int, max_delta: float | None) -> list[Round]:
    """Rounds that add one layer each: first the layer with the lowest cost, then the one that raises the loss least.

    Errors compound: the increase that a layer adds usually grows with the number of layers converted before it. So a
    candidate is measured again only if its last increase is less than that of the best layer of the round. Candidates
    are measured in groups of `_CANDIDATES_PER_TRAVERSAL`, so a few others are measured with it. Of layers that raise
    the loss equally, the lower one is added.

    Args:
        probe: measures the candidates.
        max_layers: largest number of rounds.
        max_delta: largest measured increase with all chosen layers together; None for no limit.

    Raises:
        HFEError: not even the cheapest layer is within `max_delta`, or as for `LayerProbe.rises`.
    """
    added = dict(probe.costs)
    rounds: list[Round] = []
    while added and len(rounds) < max_layers:
        before = rounds[-1].delta_nll if rounds else 0.0
        chosen = [r.layer for r in rounds]
        measured = {} if chosen else dict(added)
        unmeasured = sorted(added.keys() - measured.keys(), key=lambda i: (added[i], i))
        while unmeasured and (not measured or before + added[unmeasured[0]] < min(measured.values())):
            measured.update(probe.rises(chosen, unmeasured[:_CANDIDATES_PER_TRAVERSAL]))
            del unmeasured[:_CANDIDATES_PER_TRAVERSAL]
        added.update({index: rise - before for index, rise in measured.items()})
        best = min(measured, key=lambda i: (measured[i], i))
        if max_delta is not None and measured[best] > max_delta:
            break
        rounds.append(Round(best, measured[best], measured))
        del added[best]
    if not rounds:
        _raise_budget_error(max_delta, min(added.values()))
    return rounds


def _raise_budget_error(max_delta: float | None, cheapest_cost: float) -> NoReturn:
    """Raise the `HFEError` for a `max_delta` that is less than the cost of the cheapest layer."""
    raise HFEError(
        f"stem max_delta={max_delta} allows no layer: the cheapest costs {cheapest_cost:.4f} nats", "raise it"
    )
