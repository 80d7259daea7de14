"""Reads files of `torch.save`, which are pickles, without running code that they may hold.

`torch.load` opens them with `weights_only=True`, which creates only tensors and plain containers, and with `mmap=True`,
so that only the tensors that are read take memory.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_efficient.conversion.reading.safetensors_reader import DTYPES
from hf_efficient.conversion.reading.tensor_file import check_finite
from hf_efficient.errors import HFEError, error_text


def load_torch_file(path: Path) -> dict[Any, Any]:
    """The dict saved in `path`, with memory-mapped tensors.

    Raises:
        HFEError: the file is damaged, contains objects that `weights_only=True` refuses, or is not a dict.
    """
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise HFEError(
            f"{path.name} is damaged or has more than tensors and plain containers, so it is not opened: it could "
            "execute arbitrary code",
            "copy it again, or, if you trust it, load it and save its tensors again with torch.save",
        ) from error
    # A damaged pickle can raise any exception.
    except Exception as error:
        cause = error_text(error, named=True)
        raise HFEError(f"{path.name} cannot be read ({cause})", "copy it again") from error
    if not isinstance(content, dict):
        raise HFEError(f"{path.name} has a {type(content).__name__}, not tensors by name", "copy it again")
    return content


def checked_tensor(name: str, tensor: Tensor, path: Path) -> Tensor:
    """`tensor`, detached; `HFEError` unless it is dense, contiguous, of a known dtype and not larger than the file."""
    is_dense_cpu = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not is_dense_cpu or not tensor.is_contiguous() or tensor.dtype not in DTYPES.values():
        raise HFEError(
            f"tensor {name} in {path.name} is a {tensor.dtype} tensor of layout {tensor.layout} on {tensor.device}, or "
            "not contiguous; a checkpoint needs contiguous dense tensors",
            "save it again with torch.save, each tensor as .contiguous()",
        )
    if tensor.numel() * tensor.itemsize > path.stat().st_size:
        raise HFEError(f"tensor {name} in {path.name} is larger than the file", "copy it again")
    return tensor.detach()


class TorchFileReader:
    """A `TensorReader` (see `tensor_reader.py`) for the memory-mapped tensors of one file.

    Args:
        tensors: name -> tensor, each from `checked_tensor`.
        path: the file, for error messages.
    """

    def __init__(self, tensors: dict[str, Tensor], path: Path) -> None:
        self._tensors = tensors
        self._path = path

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the tensor."""
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """A copy of the tensor; `HFEError` if it holds NaN or infinity."""
        return check_finite(name, self._tensors[name].clone(), self._path)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """A copy of ``read(name)[start:stop]``; `HFEError` if it holds NaN or infinity."""
        return check_finite(name, self._tensors[name][start:stop].clone(), self._path)
