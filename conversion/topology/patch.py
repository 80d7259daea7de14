"""The patches multiverse and medverse: they add control tokens and a configuration that reads a topology from them.

Existing weights do not change. The tokenizer gets the grammar's twelve control tokens, and the embedding (and an untied
head) a row for each: see `vocabulary`. On text without control tokens the model computes what its source does. A new
row is often a copy of a word's row (`Path`, `Plan`), so an untrained model would generate control tokens as often as
these words; therefore generation suppresses them until the model has been trained.

A checkpoint whose tokenizer has all twelve tokens was trained with them: its rows, tokenizer and settings are kept.
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
    "the model was trained to write control tokens; by default true where its tokenizer has them (otherwise they are "
    "suppressed in generation)"
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
    """Base class of the two patches; the name of the patch is that of its grammar.

    Attributes:
        trained: see the help text.
    """

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
        """Raise `UsageError` where the source has a topology, sliding windows or length-dependent rotary embeddings."""
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
                "choose a model without a window, or set sliding_window to null if its texts are never longer",
            )
        rope = length_dependent_rope(config.rope_parameters)
        if rope is not None:
            raise UsageError(
                f"the rotary embedding {rope!r} changes with the longest position so far, so cached keys would not "
                f"match later ones; {self.name} supports default, linear, llama3 and yarn",
                "choose a model with one of these",
            )

    def vocabulary(self, source: Source) -> VocabularyChange:
        """The source's tokenizer and embedding rows with the control tokens added, suppressed unless trained.

        Raises:
            HFEError: `trained=True`, and the tokenizer lacks a control token; or as for `add_tokens`: the source has no
                tokenizer, or one that does not support the tokens.
        """
        change = add_tokens(source, CONTROL_TOKENS[self.name])
        if self.trained and change.tokenizer is not None:
            lacking = [token for token, token_id in change.token_ids.items() if token_id in change.rows]
            # Without rows to add, the tokens are in the vocabulary, but text is not encoded to them.
            what = f"lacks {' '.join(lacking)}" if lacking else "does not encode the control tokens as single tokens"
            raise HFEError(
                f"{self.name} trained=True, but the tokenizer of {source.name} {what}",
                "leave it out, or name the tokenizer that the model was trained with",
            )
        self._is_trained = change.tokenizer is None if self.trained is None else self.trained
        if not self._is_trained:
            change = replace(change, suppressed=tuple(sorted({*change.token_ids.values(), *change.unused})))
        self._vocabulary = change
        return change

    def choose(self, config: DecoderConfig, calibration: Calibration | None) -> dict[str, Any]:
        """The configuration fields `vocab_size` and `topology`; `UsageError` before `vocabulary` was called."""
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
        """No tensor is removed or added."""
        return TensorChanges()

    def tensors(self, config: DecoderConfig, calibration: Calibration | None) -> Iterator[tuple[str, Tensor]]:
        """No new tensors: the rows of the control tokens come from `vocabulary`."""
        return iter(())

    def report(self) -> TopologyMeasurements:
        """For each added token, the tokens whose rows it was made from; and a summary of the control tokens.

        Raises:
            UsageError: `vocabulary` was not called before.
        """
        change = self._added
        new = sorted(change.rows)
        tokens = f"{len(new)} added, ids {new[0]} to {new[-1]}" if new else "all in the tokenizer already"
        state = "trained" if self._is_trained else "untrained, so suppressed in generation"
        return {
            "token_rows": {token_id: list(parts) for token_id, parts in change.rows.items()},
            "summary": {f"{self.name}, control tokens": f"{tokens}; {state}"},
        }

    @property
    def _added(self) -> VocabularyChange:
        """The result of `vocabulary`; `UsageError` if it was not called before."""
        if self._vocabulary is None:
            raise UsageError(f"{self.name} has no vocabulary of the source yet", "call vocabulary(source) first")
        return self._vocabulary

    def _mode(self) -> str:
        """`topology["mode"]`; Multiverse does not use it."""
        return "dag"


@dataclass
class Multiverse(_TopologyPatch):
    """The Multiverse patch: blocks of parallel paths, which may be nested.

    Raises:
        UsageError: an option is invalid (on construction), or the model is unsuitable (in `check`).
    """

    name: ClassVar[str] = "multiverse"
    card_note: ClassVar[str] = (
        "Multiverse (arXiv:2506.09991) reasons in blocks of parallel paths: paths do not see each other, what follows "
        f"a block sees all of them, and `generate` decodes them at the same time. {_CARD_END}"
    )
    citation: ClassVar[str] = bibtex(
        "yang2025multiverse",
        "Multiverse: Your Language Models Secretly Decide How to Parallelize and Merge Generation",
        "Yang, Xinyu and An, Yuwei and Liu, Hongyi and Chen, Tianqi and Chen, Beidi",
        "2506.09991",
    )


@dataclass
class MedVerse(_TopologyPatch):
    """The MedVerse patch: a plan of steps with dependencies, executed as a graph.

    Attributes:
        mode: what a step sees; see the help text.

    Raises:
        UsageError: an option is invalid (on construction), or the model is unsuitable (in `check`).
    """

    name: ClassVar[str] = "medverse"
    card_note: ClassVar[str] = (
        "MedVerse (arXiv:2602.07529) writes a plan of steps with their dependencies and executes it as a graph: a "
        f"step sees the steps it depends on, and `generate` decodes independent steps at the same time. {_CARD_END}"
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
            "help": "what a step sees: dag (its dependencies), layers (all earlier layers), flat (no other step); "
            "auto: dag, and layers for a trained checkpoint, as in the released training code"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("auto", *MODES):
            raise UsageError(f"medverse mode={self.mode!r} is unknown", f"choose one of auto, {', '.join(MODES)}")

    def _mode(self) -> str:
        """The option `mode`; for `auto`, `layers` if the model is trained, else `dag`."""
        if self.mode != "auto":
            return self.mode
        return "layers" if self._is_trained else "dag"
