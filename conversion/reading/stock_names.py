"""Checkpoints whose tensors do not have the names of a causal language model, but are found by transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_efficient.conversion.families.decoder import expected_tensors
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig

if TYPE_CHECKING:
    from hf_efficient.conversion.reading.source import TensorReader

_PREFIX, _HEAD, _EMBEDDING = "model.", "lm_head.weight", "model.embed_tokens.weight"


class RenamedReader:
    """A `TensorReader` over another one, some of whose tensors go by other names.

    Args:
        reader: of the file's names.
        stored: the file's name of each renamed tensor.
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


def with_stock_names(reader: TensorReader, config: DecoderConfig) -> TensorReader:
    """The reader under the names of a causal language model.

    A base model's checkpoint has no `model.` before its names; of a tied pair the head alone may be stored.
    """
    names, expected = set(reader.names()), expected_tensors(config)
    stored = {
        _PREFIX + name: name
        for name in names
        if name not in expected and _PREFIX + name in expected and _PREFIX + name not in names
    }
    if config.tie_word_embeddings and _HEAD in names and _EMBEDDING not in names and _EMBEDDING not in stored:
        stored[_EMBEDDING] = _HEAD
    return RenamedReader(reader, stored) if stored else reader
