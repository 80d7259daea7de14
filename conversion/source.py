"""A stock checkpoint as the converter sees it: a configuration and tensors that are read one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig


class TensorReader(Protocol):
    """Tensors of a checkpoint by their stock names. Headers are parsed once; data is read by byte range, never mapped."""

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the files."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` gives (GGUF: float32)."""

    def read(self, name: str) -> Tensor:
        """The whole tensor, a CPU copy that the caller owns. NaN or infinity is an error."""


@dataclass(frozen=True)
class Source:
    """A resolved source: Hub id, local folder or GGUF file.

    Attributes:
        location: what the user gave.
        files: local folder that holds configuration and tokenizer; for a GGUF file its folder.
        reader: the weights.
        stock_config: transformers' configuration of the source.
        config: the same model as a configuration of our decoder.
        base_model, license, revision: for the model card; None when the source does not say. Never a local path.
    """

    location: str
    files: Path
    reader: TensorReader
    stock_config: PreTrainedConfig
    config: EfficientDecoderConfig
    gguf_file: str | None = None
    base_model: str | None = None
    license: str | None = None
    revision: str | None = None

    def tokenizer(self) -> Any:
        """The source's tokenizer, special tokens set right for GGUF files too."""
        raise NotImplementedError
