"""Renames the tensors of checkpoints whose names differ from the model's, as transformers does when it loads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_efficient.conversion.families.family import family_of_config, model_tensors

if TYPE_CHECKING:
    from hf_efficient.conversion.reading.tensor_reader import TensorReader


class RenamedReader:
    """A `TensorReader` (see `tensor_reader.py`) that gives some tensors of another reader new names.

    Args:
        reader: the tensors by their names in the file.
        stored: new name -> name in the file, for each renamed tensor.
    """

    def __init__(self, reader: TensorReader, stored: dict[str, str]) -> None:
        self._reader = reader
        self._stored = stored
        self._new_names = {name: new for new, name in stored.items()}

    def names(self) -> list[str]:
        """New names of the tensors."""
        return [self._new_names.get(name, name) for name in self._reader.names()]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor with the new name."""
        return self._reader.shape(self._stored.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the tensor with the new name."""
        return self._reader.dtype(self._stored.get(name, name))

    def read(self, name: str) -> Tensor:
        """The tensor with the new name, see `TensorReader.read`."""
        return self._reader.read(self._stored.get(name, name))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the tensor with the new name, see `TensorReader.read_rows`."""
        return self._reader.read_rows(self._stored.get(name, name), start, stop)


def with_stock_names(reader: TensorReader, config: PreTrainedConfig) -> TensorReader:
    """`reader` with the tensor names of the model of `config`, a configuration of ours; `reader` itself if they agree.

    The model family maps other names that its checkpoints may have. If a checkpoint stores only the tied tensor (e.g.
    lm_head.weight), it is read under the name of the one that it is tied to (model.embed_tokens.weight).
    """
    names, tensors = set(reader.names()), model_tensors(config)
    stored = family_of_config(config).stored_names(names, set(tensors.shapes))
    for name, owner in tensors.tied.items():
        if name in names and owner not in names and owner not in stored:
            stored[owner] = name
    return RenamedReader(reader, stored) if stored else reader
