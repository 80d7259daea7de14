"""Reads tensors by byte range into new tensors.

Files are not memory-mapped: a mapping counts towards a limit on address space, and its pages as memory in use.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.json_file import open_file

# Elements that are processed at a time where temporary memory is needed, to keep it small compared with a tensor.
CHUNK_ELEMENTS = 1 << 22


def read_bytes(path: Path, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes of `path` from `offset` on; `HFEError` if the file ends before or cannot be read."""
    filled = 0
    with open_file(path) as file:
        file.seek(offset)
        while filled < len(buffer):
            count = file.readinto(buffer[filled:])
            if not count:
                raise HFEError(
                    f"{path.name} ends after {offset + filled} bytes, inside a tensor that needs {len(buffer)} bytes "
                    f"from byte {offset} on: the file is truncated",
                    "download or copy it again",
                )
            filled += count


def read_tensor(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Read the tensor whose little-endian elements begin at byte `offset` of `path`, into a new one on the CPU.

    Raises:
        HFEError: the file cannot be read or is truncated. A tensor without elements is not read.
    """
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        read_bytes(path, offset, tensor.view(-1).view(torch.uint8).numpy().data)
    return tensor


def check_finite(name: str, tensor: Tensor, path: Path) -> Tensor:
    """`tensor` unchanged; `HFEError` if it holds NaN or infinity, whose message names it as `name` in `path`."""
    # Minimum and maximum of a tensor with NaN are NaN, so no mask of the tensor's size is needed.
    if tensor.numel() and not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
        bad = "NaN" if tensor.isnan().any() else "infinity"
        raise HFEError(
            f"tensor {name} in {path.name} holds {bad}; weights must be finite",
            "use an undamaged checkpoint: one NaN spreads to every logit",
        )
    return tensor
