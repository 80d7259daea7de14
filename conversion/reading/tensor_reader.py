"""`TensorReader`, what every reader of a checkpoint's tensors does."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class TensorReader(Protocol):
    """Tensors of a checkpoint by stock name. Headers are parsed once; data is read by byte range, never mapped."""

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the files."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` gives (GGUF: float32)."""

    def read(self, name: str) -> Tensor:
        """The whole tensor, a CPU copy that the caller owns. NaN or infinity is an error."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Entries `start` to `stop` of the first dimension, without reading the others."""
