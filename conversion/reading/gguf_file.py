"""The GGUF container: metadata, and tensors dequantised to float32 one at a time.

Layout: magic, version, counts, metadata pairs, tensor table, then the tensors, each at an aligned offset. Quantised
tensors are rows of blocks; the `gguf` package knows the arithmetic of each block type.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from hf_efficient.conversion.reading.tensor_file import CHUNK_ELEMENTS, check_finite, read_tensor
from hf_efficient.errors import HFEError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GGUFTensor:
    """Entry of the tensor table; `shape` in PyTorch's order, the last dimension running fastest."""

    offset: int
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    row_bytes: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


class GGUFFile:
    """Metadata and tensors of one GGUF file, by the names that the file gives them.

    `metadata` holds scalars and strings as they are, arrays of numbers as lists, and of an array of strings (the
    vocabulary) only its length.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        with path.open("rb") as file:
            try:
                self._parse(file)
            except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
                raise HFEError(
                    f"{path.name} breaks off or is damaged at byte {file.tell()} of its header ({error})",
                    "download or copy it again",
                ) from error
        size = path.stat().st_size
        for name, tensor in self.tensors.items():
            end = tensor.offset + tensor.rows * tensor.row_bytes
            if end > size:
                raise HFEError(
                    f"{path.name} is truncated: tensor {name} ends at byte {end}, the file at {size}",
                    "download or copy it again",
                )

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor seen as [rows, last dimension], in float32."""
        dequantize = _gguf().dequantize
        tensor = self.tensors[name]
        width = tensor.shape[-1]
        out = torch.empty((stop - start, width), dtype=torch.float32)
        step = max(1, CHUNK_ELEMENTS // width)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            offset = tensor.offset + first * tensor.row_bytes
            blocks = read_tensor(self.path, offset, (last - first, tensor.row_bytes), torch.uint8)
            rows = torch.from_numpy(dequantize(blocks.numpy(), tensor.kind))
            out[first - start : last - start] = rows.view(last - first, width)
        return check_finite(name, out, self.path)

    def read(self, name: str) -> Tensor:
        """The whole tensor in float32."""
        tensor = self.tensors[name]
        return self.read_rows(name, 0, tensor.rows).view(tensor.shape)

    def _parse(self, file: BinaryIO) -> None:
        magic, version, tensor_count, pair_count = _unpack(file, "4sIQQ")
        if magic != b"GGUF" or version not in _VERSIONS:
            what = f"GGUF version {version}" if magic == b"GGUF" else "not a GGUF file"
            raise HFEError(
                f"{self.path.name} is {what}; this reader takes little-endian GGUF, versions {_VERSIONS}",
                "write it again with a current llama.cpp",
            )
        for _ in range(pair_count):
            key = _string(file)
            self.metadata[key] = _value(file, *_unpack(file, "I"))
        entries = []
        for _ in range(tensor_count):
            name = _string(file)
            (dimensions,) = _unpack(file, "I")
            shape = tuple(reversed(_unpack(file, f"{dimensions}Q")))
            entries.append((name, shape, *_unpack(file, "IQ")))
        alignment = int(self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
        data = math.ceil(file.tell() / alignment) * alignment
        for name, shape, kind_number, offset in entries:
            kind, row_bytes = self._row_bytes(name, shape, kind_number)
            self.tensors[name] = GGUFTensor(data + offset, shape, kind, row_bytes)

    def _row_bytes(self, name: str, shape: tuple[int, ...], number: int) -> tuple[GGMLQuantizationType, int]:
        package = _gguf()
        try:
            kind = package.GGMLQuantizationType(number)
            block_elements, block_bytes = package.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise HFEError(
                f"tensor {name} in {self.path.name} has the unknown GGUF type {number}", "update the package gguf"
            ) from error
        if not shape or shape[-1] % block_elements:
            raise HFEError(
                f"tensor {name} in {self.path.name} has shape {list(shape)}; rows of type {kind.name} hold a "
                f"multiple of {block_elements} elements",
                "download or copy the file again",
            )
        return kind, shape[-1] // block_elements * block_bytes


def _gguf() -> Any:
    """The package gguf, which only GGUF sources need."""
    try:
        import gguf
    except ImportError as error:
        raise HFEError("a GGUF source needs the package gguf", "pip install gguf") from error
    return gguf


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    form = "<" + form
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    text = file.read(length)
    if len(text) < length:
        raise struct.error(f"a string of {length} bytes has {len(text)}")
    return text.decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind in _SCALARS:
        return _unpack(file, _SCALARS[kind])[0]
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        raise struct.error(f"unknown metadata type {kind}")
    element, count = _unpack(file, "IQ")
    if element in _SCALARS:
        return list(_unpack(file, f"{count}{_SCALARS[element]}"))
    for _ in range(count):
        _value(file, element)
    return count
