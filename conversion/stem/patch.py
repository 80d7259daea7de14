"""The STEM patch: the up-projections of chosen layers become embedding tables with one row for each token.

The conversion is lossy, because a row does not depend on the token's context. The formulas are in
`conversion/stem/tables.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from hf_efficient.conversion.measuring.calibration import Calibration, required_calibration
from hf_efficient.conversion.measuring.layerwise import BatchState, LayerwisePass
from hf_efficient.conversion.measuring.token_counts import Bucket, occurrences
from hf_efficient.conversion.patch import ExpectedChoice, NewTensor, TensorChanges, bibtex, is_number, layer_indices
from hf_efficient.conversion.stem.layer_choice import FitLayer, LayerProbe, Round, cheapest, greedy
from hf_efficient.conversion.stem.tables import (
    INITIALISERS,
    EmbeddingRegression,
    FittedTable,
    Quantity,
    TableError,
    fit_table,
    observe_feed_forward,
    run_layer_and_sum,
    stem_feed_forward,
)
from hf_efficient.errors import UsageError
from hf_efficient.json_file import is_whole
from hf_efficient.logging import get_logger
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig
from hf_efficient.modeling.decoder.decoder_layer import DecoderLayer

# Values of `layers` for which the layers are chosen by measurement.
_CHOICES = ("auto", "greedy")
# Held-out tokens on which each layer's errors are measured.
_ERROR_TOKENS = 2_048


class LayerMeasurements(TypedDict, total=False):
    """Relative errors of one layer's table on held-out text, over all tokens and by count in the calibration text.

    For the quantities and for `within_token_share` see `conversion/stem/tables.py`.
    """

    relative_error: dict[Quantity, float]
    relative_error_by_count: dict[Bucket, dict[Quantity, float]]
    within_token_share: dict[Quantity, float]


class RoundMeasurements(TypedDict, total=False):
    """One step of the greedy choice: the fields of `Round`."""

    layer: int
    delta_nll: float
    candidates: dict[int, float]


class StemMeasurements(TypedDict, total=False):
    """What `Stem.report` returns; layers are keys of `single_layer_delta_nll`, in nats per token, and of `layers`."""

    init: str
    shrinkage: float
    ridge: float
    sequential: bool
    single_layer_delta_nll: dict[int, float]
    greedy_rounds: list[RoundMeasurements]
    summary: dict[str, str]
    layers: dict[int, LayerMeasurements]


@dataclass
class Stem:
    """Options of the STEM patch.

    Raises:
        UsageError: an option is invalid. (`check` raises it for options that do not suit the model.)
    """

    name: ClassVar[str] = "stem"
    needs_calibration: ClassVar[bool] = True
    card_note: ClassVar[str] = (
        "STEM replaces the up-projection of the feed-forward in chosen layers by a table with one row for each token "
        "of the vocabulary (arXiv:2601.10639). **Converting a trained model to STEM is lossy**: the up-projection "
        "depends on the context and a table row does not, so no choice of rows reproduces the source model. Expect a "
        "clear loss of quality until the model has been recovered by training."
    )

    citation: ClassVar[str] = bibtex(
        "sadhukhan2026stem",
        "STEM: Scaling Transformers with Embedding Modules",
        "Sadhukhan, Ranajoy and Cao, Sheng and Dong, Harry and Zhao, Changsheng and Purpura-Pontoniere, Attiano and "
        "Tian, Yuandong and Liu, Zechun and Chen, Beidi",
        "2601.10639",
    )

    layers: str | list[int] = field(
        default="auto",
        metadata={
            "help": "layers to convert, such as 1,4,7; auto: those whose conversion costs least, measured one by one; "
            "greedy: added one by one, by the measured loss of all together (slower)"
        },
    )
    init: str = field(
        default="gated_mean",
        metadata={"help": f"how rows are computed: {', '.join(INITIALISERS)}"},
    )
    shrinkage: float = field(
        default=4.0, metadata={"help": "weight of the prior of a row, in average occurrences of a token"}
    )
    ridge: float = field(
        default=0.05, metadata={"help": "ridge of the prior, as a share of the mean diagonal of its Gram matrix"}
    )
    sequential: bool = field(
        default=True,
        metadata={"help": "fit each layer with the gates of the converted model, not with the source's"},
    )
    max_layers: int | None = field(
        default=None,
        metadata={"help": "with auto and greedy: largest number of layers (default: a third of the model's)"},
    )
    max_delta: float | None = field(
        default=None,
        metadata={
            "help": "largest increase in the loss in nats per token: with auto the sum of the layers' single costs, "
            "with greedy the measured increase with all layers"
        },
    )
    keep_up_proj: bool = field(
        default=False, metadata={"help": "keep the stock up-projections beside the tables, as a teacher for training"}
    )

    def __post_init__(self) -> None:
        if not self.measures_choice:
            self.layers = _parse_layers(self.layers)
        if self.init not in INITIALISERS:
            raise UsageError(f"stem init={self.init!r} is unknown", f"choose one of {', '.join(INITIALISERS)}")
        if not (is_number(self.shrinkage) and self.shrinkage >= 0):
            raise UsageError(f"stem shrinkage={self.shrinkage!r} must be 0 or more, and finite", "the default is 4")
        if not (is_number(self.ridge) and self.ridge > 0):
            raise UsageError(f"stem ridge={self.ridge!r} must be positive and finite", "the default is 0.05")
        if self.max_layers is not None and not is_whole(self.max_layers, 1):
            raise UsageError(
                f"stem max_layers={self.max_layers!r} must be at least 1, and whole", "leave it out for a third"
            )
        if self.max_delta is not None and not (is_number(self.max_delta) and self.max_delta > 0):
            raise UsageError(
                f"stem max_delta={self.max_delta!r} must be positive nats, and finite", "leave it out for no limit"
            )
        if not self.measures_choice and not (self.max_layers is None and self.max_delta is None):
            raise UsageError("stem max_layers and max_delta choose among layers, and layers are named", "leave one out")
        self._costs: dict[int, float] = {}
        self._rounds: list[Round] = []
        self._layer_reports: dict[int, LayerMeasurements] = {}

    @property
    def measures_choice(self) -> bool:
        """True if the layers are chosen by running the source model."""
        return self.layers in _CHOICES

    def check(self, config: DecoderConfig) -> None:
        """Raise `UsageError` if the source already has STEM layers or `layers` does not suit it; warn about layer 0."""
        count = config.num_hidden_layers
        if getattr(config, "stem_layers", None):
            raise UsageError(
                f"the source is a STEM checkpoint already (layers {config.stem_layers})",
                "convert its stock source again, with all the layers you want",
            )
        if count < 2 and self.measures_choice:
            raise UsageError(f"the model has one layer, and {self.layers} leaves layer 0 as it is", "name it: layers=0")
        if isinstance(self.layers, list):
            outside = [i for i in self.layers if not 0 <= i < count]
            if outside:
                raise UsageError(f"stem layers {outside} do not exist", f"the model has layers 0 to {count - 1}")
            if 0 in self.layers:
                get_logger().warning("STEM in layer 0: its rows are needed first, so they cannot be prefetched")

    def choose(self, config: DecoderConfig, calibration: Calibration | None) -> dict[str, Any]:
        """The configuration fields `stem_layers` and `stem_keep_up_proj`; `auto` and `greedy` measure layers on text.

        Raises:
            UsageError: the layers are to be measured and `calibration` is None.
            HFEError: no layer is within `max_delta`, a weight cannot be read or holds NaN or infinity, or `output_ls`
                would take more than 8 GiB.
        """
        layers = self._choose(required_calibration(calibration)) if self.measures_choice else self.layers
        return {"stem_layers": list(layers), "stem_keep_up_proj": self.keep_up_proj}

    def expected_choice(self, config: DecoderConfig) -> ExpectedChoice:
        """The fields that `choose` will return, with the largest possible number of layers. For `auto` and `greedy`."""
        most = min(self._limit(config), config.num_hidden_layers - 1)
        count = f"{most} layer{'s' if most > 1 else ''}"
        if self.max_delta is not None and most > 1:
            count = f"1 to {count}; sizes are those of {most}"
        # All layers have the same size, so any choice gives the sizes.
        fields = {"stem_layers": list(range(1, most + 1)), "stem_keep_up_proj": self.keep_up_proj}
        return ExpectedChoice(fields, {"stem_layers": count})

    def changes(self, config: DecoderConfig, dtype: torch.dtype) -> TensorChanges:
        """The tables [vocab_size, intermediate_size] that are added, and the up-projections that are dropped.

        With `keep_up_proj` none is dropped.
        """
        changes = TensorChanges()
        shape = (config.vocab_size, config.intermediate_size)
        for index in config.stem_layers:
            changes.added[_table_name(index)] = NewTensor(shape, dtype, f"STEM table, {self.init}")
            if not self.keep_up_proj:
                parts = ("weight", "bias") if config.mlp_bias else ("weight",)
                changes.dropped += [f"model.layers.{index}.mlp.up_proj.{part}" for part in parts]
        return changes

    def tensors(self, config: DecoderConfig, calibration: Calibration | None) -> Iterator[tuple[str, Tensor]]:
        """(name, table) of each STEM layer, ascending; runs the calibration text through the model layer by layer.

        Also measures each table's errors on held-out text, for `report`.

        Raises:
            UsageError: `calibration` is None.
            HFEError: a weight cannot be read or holds NaN or infinity, or `output_ls` would take more than 8 GiB.
        """
        calibration = required_calibration(calibration)
        sequences = max(_ERROR_TOKENS // calibration.held_out.shape[1], 1)
        run = calibration.start(calibration.fit, calibration.held_out[:sequences])
        fit, held_out = run.batches
        converted: BatchState | None = None
        regression = self._regression(run, fit)
        last = max(config.stem_layers)
        for index, layer in run.layers():
            if index not in config.stem_layers:
                for batch in filter(None, (fit, held_out, converted)):
                    run.run_layer(index, layer, batch)
            else:
                if self.sequential and converted is None:
                    converted = fit.clone()
                sums = run_layer_and_sum(self.init, run, index, layer, fit, converted)
                table = fit_table(self.init, self.shrinkage, layer, run, sums, regression)
                rows = table.at(run.vocabulary, run.embeddings)
                errors = TableError(layer.mlp, rows, sums.count)
                with observe_feed_forward(layer.mlp, errors.add):
                    run.run_layer(index, layer, held_out)
                self._layer_reports[index] = {
                    "relative_error": errors.overall(),
                    "relative_error_by_count": errors.by_count(),
                    "within_token_share": sums.within_token_share(layer.mlp.up_proj),
                }
                if converted is not None:
                    with stem_feed_forward(run, layer, rows):
                        run.run_layer(index, layer, converted)
                dtype = config.dtype or torch.float32
                yield _table_name(index), table.write(calibration.reader, config.vocab_size, dtype)
            calibration.progress("calibrating", index + 1, last + 1)
            if index == last:
                return

    def report(self) -> StemMeasurements:
        """The options, and what was measured for the choice of layers and for each table."""
        rounds = ", ".join(f"{r.layer} {r.delta_nll:+.3f}" for r in self._rounds)
        return {
            "init": self.init,
            "shrinkage": self.shrinkage,
            "ridge": self.ridge,
            "sequential": self.sequential,
            "single_layer_delta_nll": self._costs,
            "greedy_rounds": [
                {"layer": r.layer, "delta_nll": r.delta_nll, "candidates": r.candidates} for r in self._rounds
            ],
            "summary": {"added, Δ nll of all": rounds} if rounds else {},
            "layers": self._layer_reports,
        }

    def _regression(self, run: LayerwisePass, batch: BatchState) -> EmbeddingRegression:
        """The regression on the embeddings of the batch's tokens, by which tables get rows for all other tokens."""
        count, _ = occurrences(batch.local_ids, len(run.vocabulary))
        return EmbeddingRegression.of(count, run.embeddings, self.shrinkage, self.ridge)

    def _fitter(self, run: LayerwisePass) -> FitLayer:
        """A function (index, layer) -> table, which runs the layer on the only batch of `run` and fits its table."""
        (batch,) = run.batches
        regression = self._regression(run, batch)

        def fit(index: int, layer: DecoderLayer) -> FittedTable:
            sums = run_layer_and_sum(self.init, run, index, layer, batch)
            return fit_table(self.init, self.shrinkage, layer, run, sums, regression)

        return fit

    def _limit(self, config: DecoderConfig) -> int:
        """Largest number of layers to choose: `max_layers`, or a third of the model's."""
        return self.max_layers or max(config.num_hidden_layers // 3, 1)

    def _choose(self, calibration: Calibration) -> list[int]:
        """Choose the layers by `auto` or `greedy`, sorted; stores the measurements for `report`. Errors: `choose`."""
        limit = self._limit(calibration.config)
        probe = LayerProbe(calibration, self._fitter, rounds=limit if self.layers == "greedy" else 0)
        self._costs = probe.costs
        if self.layers == "auto":
            return cheapest(probe.costs, limit, self.max_delta)
        self._rounds = greedy(probe, limit, self.max_delta)
        return sorted(r.layer for r in self._rounds)


def _parse_layers(layers: str | list[int]) -> list[int]:
    """`layers` as a sorted list of indices; `UsageError` if it is empty, or one is no integer or occurs twice."""
    parsed = layer_indices(layers)
    if not parsed:
        raise UsageError(
            f"stem layers={layers!r} must be auto, greedy, or different whole numbers separated by commas",
            "for example 1,4,7",
        )
    return parsed


def _table_name(index: int) -> str:
    """Name of the table's weight in layer `index`."""
    return f"model.layers.{index}.mlp.stem_embed.weight"
