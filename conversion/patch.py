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

# A patch knows the configuration of the family that it takes.
ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig, contravariant=True)


@dataclass(frozen=True)
class NewTensor:
    """A tensor that the patched checkpoint has and the source has not: its shape, dtype and how it is made."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str


@dataclass(frozen=True)
class ExpectedChoice:
    """What `choose` will return, before anything is measured.

    Attributes:
        fields: configuration fields of a result of the expected size; of several sizes, the largest.
        measured: fields that the measurement will decide, each with what is known of it before.
    """

    fields: dict[str, Any]
    measured: dict[str, str]


@dataclass
class TensorChanges:
    """What a patch does to the tensors of a checkpoint: the ones it adds, by name, and the ones it drops."""

    added: dict[str, NewTensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def bibtex(key: str, title: str, authors: str, arxiv: str) -> str:
    """The BibTeX entry of a paper on arXiv; its number begins with the year."""
    fields = {"title": title, "author": authors, "year": f"20{arxiv[:2]}", "eprint": arxiv, "archivePrefix": "arXiv"}
    return "\n".join([f"@misc{{{key},", *(f"  {name} = {{{value}}}," for name, value in fields.items()), "}"])


class Patch(Protocol[ConfigT]):
    """A change of architecture, with the options that a user chose for it.

    The converter calls `check`, then `choose` (which may run the source model on calibration text), then `changes`,
    then `tensors`. With `needs_calibration` False the calibration argument is None.
    """

    name: ClassVar[str]
    # What a reader of the model card must know before using a converted checkpoint.
    card_note: ClassVar[str]
    # BibTeX entry of the paper that describes the method.
    citation: ClassVar[str]

    @property
    def needs_calibration(self) -> bool:
        """True when the patch measures the source model on text."""

    @property
    def measures_choice(self) -> bool:
        """True when `choose` runs the source model, which takes longer than computing the tensors."""

    def check(self, config: ConfigT) -> None:
        """Raise `UsageError` for an option that this model cannot take, before any weight is read."""

    def choose(self, config: ConfigT, calibration: Calibration | None) -> dict[str, Any]:
        """Configuration fields of the patched model, e.g. the layers that it replaces."""

    def changes(self, config: ConfigT, dtype: torch.dtype) -> TensorChanges:
        """Tensors added and dropped, for the patched configuration and the checkpoint's dtype. Reads no weight."""

    def tensors(self, config: ConfigT, calibration: Calibration | None) -> Iterator[tuple[str, Tensor]]:
        """Every added tensor in the order of `changes`, one at a time: each is written before the next is computed.

        One with a row for each token has all rows of the result's vocabulary; those of tokens that another patch adds
        are overwritten.
        The same options give the same bits, since a resumed conversion calls this again.
        """

    def report(self) -> Mapping[str, Any]:
        """What the patch measured, for the report. Called after `choose`, and when `tensors` is exhausted.

        Each patch annotates it with a `TypedDict`: verification accepts these keys in a report and no others.

        A `summary`, texts by label, is shown in the report's table.
        """


@runtime_checkable
class MeasuringPatch(Patch[ConfigT], Protocol[ConfigT]):
    """A patch whose `measures_choice` may be True; then a plan that is to measure nothing calls `expected_choice`."""

    def expected_choice(self, config: ConfigT) -> ExpectedChoice:
        """What is known of the result of `choose` before anything is measured."""


@runtime_checkable
class VocabularyPatch(Patch[ConfigT], Protocol[ConfigT]):
    """A patch that adds tokens; a conversion may have one. The converter calls `vocabulary` after `check`."""

    def vocabulary(self, source: Source) -> VocabularyChange:
        """The tokens and their rows, from the source's tokenizer, and what generation is to suppress."""


def is_number(value: Any) -> bool:
    """True for a finite int or float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def layer_indices(layers: str | Sequence[int]) -> list[int] | None:
    """The whole numbers of a text such as `1,4,7`, or of a list, sorted; None unless they are such, and different."""
    try:
        parsed = [int(part) for part in layers.split(",")] if isinstance(layers, str) else [*layers]
    except ValueError:
        return None
    integers = all(isinstance(index, int) and not isinstance(index, bool) for index in parsed)
    return sorted(parsed) if integers and len(set(parsed)) == len(parsed) else None
