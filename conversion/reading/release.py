"""`Release`, an opened checkpoint, and `ReleaseReader`, the protocol for layouts of authors' own training code."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from hf_efficient.conversion.reading.tensor_reader import TensorReader


@dataclass(frozen=True)
class Release:
    """An opened checkpoint folder or file, of which headers are read but no weights.

    Attributes:
        reader: the tensors by the names of our model.
        stock_config: transformers' configuration of the model.
        config: the same model as one of our configurations, see `ModelFamily.own_config`.
        weight_files: the files that hold the weights.
        fields: the fields of config.json; empty for a layout without one.
        warnings: texts about how the checkpoint was read, for the user.
    """

    reader: TensorReader
    stock_config: PreTrainedConfig
    config: PreTrainedConfig
    weight_files: list[Path]
    fields: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class ReleaseReader(Protocol):
    """A `TensorReader` for checkpoints of one training code, with two more class methods."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """True for a folder, or a file that the user named, in this layout, complete or not.

        Does not raise for a damaged one.
        """

    @classmethod
    def open(cls, path: Path, name: str) -> Release:
        """Open the checkpoint at `path`; error messages refer to it as `name`.

        Raises:
            HFEError: the checkpoint is damaged, incomplete, or has a feature that our model does not have.
        """
