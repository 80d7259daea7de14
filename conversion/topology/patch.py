"""Stock checkpoint -> Multiverse or MedVerse: control tokens, and a configuration that reads a topology from them.

No weight changes. The tokenizer gets the grammar's twelve control tokens, and the embedding (and a head of its own) a
row for each: see `vocabulary`. Without control tokens in the text the model is its source. Such a row is often the copy
of a word's (`Path`, `Plan`), so the model would write control tokens as readily as these words; until training has
taught it when to, they are suppressed in generation.

A checkpoint whose tokenizer has all twelve tokens was trained with them: it keeps rows, tokenizer and settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from hf_efficient.conversion.measuring.calibration import Calibration
from hf_efficient.conversion.patch import TensorChanges, bibtex
from hf_efficient.conversion.reading.source import Source
from hf_efficient.conversion.vocabulary import VocabularyChange, add_tokens
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig, length_dependent_rope
from hf_efficient.modeling.topology.grammar.control_tokens import CONTROL_TOKENS, MODES

_TRAINED_HELP = (
    "the model has learnt when to write control tokens; by default so where its tokenizer has them (until then they "
    "are suppressed in generation)"
)
_CARD_END = (
    "Converted from a stock model the weights are the source's, and the control tokens are suppressed in generation: "
    "the model is its source until it has been trained on structured text, after which "
    "`hf_efficient.mark_topology_trained(model)` lets it write them."
)


class TopologyMeasurements(TypedDict, total=False):
    """What `report` returns: `token_rows` gives, by the id of each new token, the ids whose rows it got the mean of."""

    token_rows: dict[int, list[int]]
    summary: dict[str, str]


@dataclass
class _TopologyPatch:
    """What both grammars have in common. The name of the patch is that of the grammar."""

    name: ClassVar[str]
    needs_calibration: ClassVar[bool] = False
    measures_choice: ClassVar[bool] = False

    trained: bool | None = field(default=None, metadata={"help": _TRAINED_HELP})

    def __post_init__(self) -> None:
        if self.trained not in (None, True, False):
            raise UsageError(f"{self.name} trained={self.trained!r} must be True, False or None", "leave it out")
        self._vocabulary: VocabularyChange | None = None
        self._is_trained = False

    def check(self, config: DecoderConfig) -> None:
        present = [patch for patch in config.active_patches if patch in CONTROL_TOKENS]
        if present:
            raise UsageError(
                f"the source is a {present[0]} checkpoint already, so {self.name} cannot be added",
                "convert its stock source again, with the options you want",
            )
        windowed = [index for index, kind in enumerate(config.layer_types or []) if kind == "sliding_attention"]
        if windowed:
            raise UsageError(
                f"layer {windowed[0]} has a sliding window of {config.sliding_window} positions, and {self.name} needs "
                "attention to all tokens that a segment may see",
                "choose a model without a window; where its texts are never longer, set sliding_window to null",
            )
        rope = length_dependent_rope(config.rope_parameters)
        if rope is not None:
            raise UsageError(
                f"the rotary embedding {rope!r} changes with the longest position so far, so keys in the cache would "
                f"not fit later ones; {self.name} takes default, linear, llama3 and yarn",
                "choose a model with one of these",
            )

    def vocabulary(self, source: Source) -> VocabularyChange:
        change = add_tokens(source, CONTROL_TOKENS[self.name])
        if self.trained and change.tokenizer is not None:
            lacking = [token for token, token_id in change.token_ids.items() if token_id in change.rows]
            raise HFEError(
                f"{self.name} trained=True, but the tokenizer of {source.name} lacks {' '.join(lacking)}",
                "leave it out, or name the tokenizer that the model was trained with",
            )
        self._is_trained = change.tokenizer is None if self.trained is None else self.trained
        if not self._is_trained:
            change = replace(change, suppressed=tuple(sorted({*change.token_ids.values(), *change.unused})))
        self._vocabulary = change
        return change

    def choose(self, config: DecoderConfig, calibration: Calibration | None) -> dict[str, Any]:
        return {
            "vocab_size": self._added.new_size,
            "topology": {
                "grammar": self.name,
                "mode": self._mode(),
                "token_ids": self._added.token_ids,
                "trained": self._is_trained,
            },
        }

    def changes(self, config: DecoderConfig, dtype: torch.dtype) -> TensorChanges:
        return TensorChanges()

    def tensors(self, config: DecoderConfig, calibration: Calibration | None) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def report(self) -> TopologyMeasurements:
        change = self._added
        new = sorted(change.rows)
        tokens = f"{len(new)} added, ids {new[0]} to {new[-1]}" if new else "all known to the tokenizer"
        state = "trained" if self._is_trained else "untrained, so suppressed in generation"
        return {
            "token_rows": {token_id: list(parts) for token_id, parts in change.rows.items()},
            "summary": {f"{self.name}, control tokens": f"{tokens}; {state}"},
        }

    @property
    def _added(self) -> VocabularyChange:
        if self._vocabulary is None:
            raise UsageError(f"{self.name} has not seen the source's tokenizer", "call vocabulary(source) first")
        return self._vocabulary

    def _mode(self) -> str:
        return "dag"


@dataclass
class Multiverse(_TopologyPatch):
    """Options of the Multiverse patch: blocks of parallel paths, which may be nested.

    Raises:
        UsageError: an option is malformed here, or the model is not suitable in `check`.
    """

    name: ClassVar[str] = "multiverse"
    card_note: ClassVar[str] = (
        "Multiverse (arXiv:2506.09991) thinks in blocks of parallel paths: paths do not see each other, what follows a "
        f"block sees all of them, and `generate` decodes them at the same time. {_CARD_END}"
    )
    citation: ClassVar[str] = bibtex(
        "yang2025multiverse",
        "Multiverse: Your Language Models Secretly Decide How to Parallelize and Merge Generation",
        "Yang, Xinyu and An, Yuwei and Liu, Hongyi and Chen, Tianqi and Chen, Beidi",
        "2506.09991",
    )


@dataclass
class MedVerse(_TopologyPatch):
    """Options of the MedVerse patch: a plan of steps with dependencies, carried out as a graph.

    Raises:
        UsageError: an option is malformed here, or the model is not suitable in `check`.
    """

    name: ClassVar[str] = "medverse"
    card_note: ClassVar[str] = (
        "MedVerse (arXiv:2602.07529) writes a plan of steps with their dependencies and carries it out as a graph: a "
        f"step sees the steps it needs, and `generate` decodes independent steps at the same time. {_CARD_END}"
    )
    citation: ClassVar[str] = bibtex(
        "chen2026medverse",
        "MedVerse: Efficient and Reliable Medical Reasoning via DAG-Structured Parallel Execution",
        "Chen, Jianwen and Yang, Xinyu and Xia, Peng and others",
        "2602.07529",
    )

    mode: str = field(
        default="auto",
        metadata={
            "help": "what a step sees: dag (what it needs), layers (all earlier layers), flat (no other step); auto: "
            "dag, and layers for a checkpoint that comes trained, since the released training code does so"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("auto", *MODES):
            raise UsageError(f"medverse mode={self.mode!r} is unknown", f"choose one of auto, {', '.join(MODES)}")

    def _mode(self) -> str:
        if self.mode != "auto":
            return self.mode
        return "layers" if self._is_trained else "dag"
