"""`TensorReader`, the protocol of all readers of checkpoints."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class TensorReader(Protocol):
    """Tensors of a checkpoint, by their names in our model (those of transformers).

    Headers are parsed by the constructor; data is read when a tensor is.
    """

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the files."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor. This and the other methods raise KeyError for an unknown name."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` gives (GGUF: float32)."""

    def read(self, name: str) -> Tensor:
        """A copy of the tensor, on the CPU.

        Raises:
            HFEError: it holds NaN or infinity, or the file cannot be read or is truncated.
        """

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """A copy of ``read(name)[start:stop]``, with the errors of `read`; where possible no other entries are read.

        The tensor has a dimension, and ``0 <= start <= stop``; `stop` may exceed its length.
        """
