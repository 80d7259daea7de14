"""Reading tensors by byte range: an ordinary file read into a buffer that the caller owns.

No file is ever mapped into memory: a mapping counts against a limit on address space, and its pages look like use.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_efficient.errors import HFEError

# Elements handled at once where a step needs scratch memory, so that scratch stays small beside a tensor.
CHUNK_ELEMENTS = 1 << 22


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """An ordinary file opened for reading; what the operating system refuses becomes `HFEError`."""
    try:
        # Before it is opened, since a pipe would block.
        if not stat.S_ISREG(path.stat().st_mode):
            raise HFEError(f"{path.name} is not an ordinary file", "replace it by a copy of the file")
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise HFEError(f"{path.name} cannot be read: {error.strerror}", "check the file and its permissions") from error


def read_bytes(path: Path, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes of `path` from `offset` on."""
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
    """The tensor whose raw little-endian elements begin at byte `offset` of `path`."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        read_bytes(path, offset, tensor.view(-1).view(torch.uint8).numpy().data)
    return tensor


def check_finite(name: str, tensor: Tensor, path: Path) -> Tensor:
    """`tensor` itself, or `HFEError` when it holds NaN or infinity."""
    # The extremes of a tensor with a NaN are NaN, so no mask of the tensor's size is needed.
    if tensor.numel() and not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
        bad = "NaN" if tensor.isnan().any() else "infinity"
        raise HFEError(
            f"tensor {name} in {path.name} holds {bad}; weights must be finite",
            "use an undamaged checkpoint: one NaN spreads to every logit",
        )
    return tensor
