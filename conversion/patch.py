"""The protocol of a patch: what a conversion calls.

A patch is a dataclass of options. The command line generates its flags from the fields (`--<patch>-<field>`), so each
field carries its help text in `metadata["help"]`.

To add a patch, write the model's folder in `modeling/`, the dataclass in `conversion/<architecture>/patch.py` with the
members of `Patch` below, and an entry in `hf_efficient/registry.py` whose `patch_options` names the dataclass. The
configuration fields that `choose` returns are those of the registered configuration class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from hf_efficient.conversion.measuring.calibration import Calibration
    from hf_efficient.conversion.reading.source import Source
    from hf_efficient.conversion.vocabulary import VocabularyChange

# Configuration class of the model family (decoders or encoders) that a patch supports.
ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig, contravariant=True)


@dataclass(frozen=True)
class NewTensor:
    """A tensor that the patched checkpoint has and the source does not have.

    Attributes:
        shape, dtype: of the stored tensor.
        origin: how it is computed, as text for the report.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str


@dataclass(frozen=True)
class ExpectedChoice:
    """What is known of the result of `Patch.choose` before the source model is run.

    Attributes:
        fields: configuration fields that give the result the expected size; of several possible sizes, the largest.
        to_measure: the fields that depend on a measurement -> what is known of each before, as text for the report.
    """

    fields: dict[str, Any]
    to_measure: dict[str, str]


@dataclass
class TensorChanges:
    """The tensors that a patch adds (name -> tensor) and the names of the source tensors that it drops."""

    added: dict[str, NewTensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def bibtex(key: str, title: str, authors: str, arxiv: str) -> str:
    """The BibTeX entry of a paper on arXiv; `arxiv` is its number, such as `2601.10639`, which begins with the year."""
    fields = {"title": title, "author": authors, "year": f"20{arxiv[:2]}", "eprint": arxiv, "archivePrefix": "arXiv"}
    return "\n".join([f"@misc{{{key},", *(f"  {name} = {{{value}}}," for name, value in fields.items()), "}"])


class Patch(Protocol[ConfigT]):
    """A change of architecture, with the options that a user chose for it.

    The converter calls `check`, then `choose` (which may run the source model on calibration text), then `changes`,
    then `tensors`. `calibration` holds the source model and calibration text; it is None if `needs_calibration` is
    False. `config` is the source's configuration for `check` and `choose`, the result's for `changes` and `tensors`,
    each of the project's own configuration class of the model family.
    """

    name: ClassVar[str]
    # Paragraph of the model card: what to know before using a converted checkpoint.
    card_note: ClassVar[str]
    # BibTeX entry of the paper that describes the method.
    citation: ClassVar[str]

    @property
    def needs_calibration(self) -> bool:
        """True if `choose` or `tensors` runs the source model on text."""

    @property
    def measures_choice(self) -> bool:
        """True if `choose` runs the source model, which takes longer than computing the tensors."""

    def check(self, config: ConfigT) -> None:
        """Raise `UsageError` for an option that this model does not support. Reads no weight."""

    def choose(self, config: ConfigT, calibration: Calibration | None) -> dict[str, Any]:
        """The patch's configuration fields of the result, e.g. the layers that it replaces.

        In a dry run without measuring, `calibration` is None, and for a `MeasuringPatch` that measures its choice
        `expected_choice` is called instead.

        Raises:
            UsageError: the choice needs to be measured and `calibration` is None.
            HFEError: the measurement gives no usable choice.
        """

    def changes(self, config: ConfigT, dtype: torch.dtype) -> TensorChanges:
        """The tensors that are added and dropped; `dtype` is that of most stored tensors. Reads no weight."""

    def tensors(self, config: ConfigT, calibration: Calibration | None) -> Iterator[tuple[str, Tensor]]:
        """(name, value) of every added tensor in the order of `changes`; each is written before the next is computed.

        A value has the planned shape and any floating-point dtype: it is converted when it is written.

        A tensor with a row for each token has `config.vocab_size` rows; the converter overwrites the rows of tokens
        that another patch adds. The same options give the same bits, since a resumed conversion calls this again.
        """

    def report(self) -> Mapping[str, Any]:
        """What the patch measured, as JSON values for the report. Called after `choose` and at the end of `tensors`.

        Each patch annotates the return type with a `TypedDict`: `hf-efficient verify` accepts only these keys. Under
        the key `summary`, label -> text, are lines for the report's table.
        """


@runtime_checkable
class MeasuringPatch(Patch[ConfigT], Protocol[ConfigT]):
    """A patch whose `measures_choice` may be True; a dry run without measuring calls `expected_choice` instead."""

    def expected_choice(self, config: ConfigT) -> ExpectedChoice:
        """What is known of the result of `choose` before the source model is run."""


@runtime_checkable
class VocabularyPatch(Patch[ConfigT], Protocol[ConfigT]):
    """A patch that adds tokens; at most one in a conversion. The converter calls `vocabulary` after `check`."""

    def vocabulary(self, source: Source) -> VocabularyChange:
        """The added tokens, how their rows are computed, and the ids that generation suppresses.

        Raises:
            HFEError: the source has no tokenizer, or the tokenizer does not support the tokens.
        """


def is_number(value: Any) -> bool:
    """True for a finite int or float, but not for a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def layer_indices(layers: str | Sequence[int]) -> list[int] | None:
    """The layer indices in a text such as `1,4,7` or in a list, sorted.

    None if one is no integer or occurs twice, or if the argument is neither text nor a list. Negative indices are
    returned, and so is an empty list; the caller checks the range.
    """
    try:
        parsed = [int(part) for part in layers.split(",")] if isinstance(layers, str) else [*layers]
    except (TypeError, ValueError):
        return None
    integers = all(isinstance(index, int) and not isinstance(index, bool) for index in parsed)
    return sorted(parsed) if integers and len(set(parsed)) == len(parsed) else None
