"""Checkpoints in the layout of their authors' own training code, and what a reader of such a layout offers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from hf_efficient.conversion.reading.tensor_reader import TensorReader


@dataclass(frozen=True)
class Release:
    """A checkpoint folder, opened: its headers are read, its weights are not.

    Attributes:
        reader: the tensors by the names of our model.
        stock_config: transformers' configuration of the model.
        config: the same model as a configuration of ours: see `ModelFamily.own_config`.
        weight_files: the files that hold the weights.
        fields: what config.json holds; empty for a layout without one.
        warnings: what the user should know about how it was read.
    """

    reader: TensorReader
    stock_config: PreTrainedConfig
    config: PreTrainedConfig
    weight_files: list[Path]
    fields: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class ReleaseReader(Protocol):
    """A `TensorReader` for the checkpoints of one training code."""

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """True for a folder in this layout, complete or not. Never raises for a damaged folder."""

    @classmethod
    def open(cls, folder: Path, name: str) -> Release:
        """The checkpoint in `folder`, which error messages call `name`.

        Raises:
            HFEError: the checkpoint is damaged, incomplete, or has a feature that our model does not have.
        """
