"""Checkpoints whose tensors have other names than the model's, which transformers maps when it loads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_efficient.conversion.families.family import family_of_config, model_tensors

if TYPE_CHECKING:
    from hf_efficient.conversion.reading.tensor_reader import TensorReader


class RenamedReader:
    """A `TensorReader` that gives some tensors of another reader new names.

    Args:
        reader: the tensors by their names in the file.
        stored: new name -> name in the file, for each renamed tensor.
    """

    def __init__(self, reader: TensorReader, stored: dict[str, str]) -> None:
        self._reader = reader
        self._stored = stored
        self._given = {name: given for given, name in stored.items()}

    def names(self) -> list[str]:
        return [self._given.get(name, name) for name in self._reader.names()]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(self._stored.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(self._stored.get(name, name))

    def read(self, name: str) -> Tensor:
        return self._reader.read(self._stored.get(name, name))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._reader.read_rows(self._stored.get(name, name), start, stop)


def with_stock_names(reader: TensorReader, config: PreTrainedConfig) -> TensorReader:
    """The reader with the tensor names of the model of `config`, a configuration of ours.

    The family maps the names that its files may have. If the file has only the derived one of two tied tensors, it is
    read as the other.
    """
    names, tensors = set(reader.names()), model_tensors(config)
    stored = family_of_config(config).stored_names(names, set(tensors.shapes))
    for name, owner in tensors.tied.items():
        if name in names and owner not in names and owner not in stored:
            stored[owner] = name
    return RenamedReader(reader, stored) if stored else reader
