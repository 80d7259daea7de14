"""Reads GGUF files: the metadata, and tensors that are dequantised to float32 one at a time.

Layout: magic, version, counts, metadata pairs, tensor table, then the tensors, each at an aligned offset. Quantised
tensors are rows of blocks; the package gguf dequantises each block type.
"""

from __future__ import annotations

import io
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from hf_efficient.conversion.reading.tensor_file import CHUNK_ELEMENTS, check_finite, read_tensor
from hf_efficient.errors import HFEError
from hf_efficient.json_file import is_whole, open_file

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
# Largest number of tensors, and of metadata entries; the largest models have a few thousand tensors.
_MAX_ENTRIES = 1 << 16
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = (1 << 16) - 1
_MAX_TEXT_BYTES = 1 << 24
# Of a longer array of numbers, such as the scores of a vocabulary, only the length is stored.
_MAX_KEPT_NUMBERS = 1 << 12


@dataclass(frozen=True)
class GGUFTensor:
    """Entry of the tensor table: byte offset in the file, shape in PyTorch's order, block type, bytes of a row."""

    offset: int
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    row_bytes: int

    @property
    def rows(self) -> int:
        """Number of rows of the tensor viewed as [rows, last dimension]."""
        return math.prod(self.shape[:-1])


class GGUFFile:
    """Metadata and tensors of one GGUF file, by the names that the file gives them.

    Attributes:
        metadata: scalars and strings as values, short arrays of numbers as lists; of an array of strings (the
            vocabulary) or a long array only the length.
        tensors: the tensor table.

    Raises:
        HFEError: the file cannot be read, is truncated, or its header is damaged or larger than any model's; a block
            type is not supported (see `_row_bytes`); or the package gguf is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        with open_file(path) as unbuffered, io.BufferedReader(unbuffered) as file:
            self._parse(_Header(path, file))
        size = path.stat().st_size
        for name, tensor in self.tensors.items():
            end = tensor.offset + tensor.rows * tensor.row_bytes
            if end > size:
                raise HFEError(
                    f"{path.name} is truncated: tensor {name} ends at byte {end}, the file at {size}",
                    "download or copy it again",
                )

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor viewed as [rows, last dimension], dequantised to float32.

        Raises:
            HFEError: the rows hold NaN or infinity, or the file cannot be read or is truncated.
        """
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
        """The whole tensor, dequantised to float32, with the errors of `read_rows`."""
        tensor = self.tensors[name]
        return self.read_rows(name, 0, tensor.rows).view(tensor.shape)

    def _parse(self, header: _Header) -> None:
        """Read the header into `metadata` and `tensors`; `HFEError` if it is damaged or beyond the limits above."""
        magic, version = header.unpack("4sI")
        if magic != b"GGUF" or version not in _VERSIONS:
            what = f"GGUF version {version}" if magic == b"GGUF" else "not a GGUF file"
            raise HFEError(
                f"{self.path.name} is {what}; this reader supports little-endian GGUF, versions {_VERSIONS}",
                "write it again with a current llama.cpp",
            )
        tensor_count, pair_count = header.unpack("QQ")
        if max(tensor_count, pair_count) > _MAX_ENTRIES:
            raise header.damaged(f"{tensor_count} tensors and {pair_count} metadata, of each at most {_MAX_ENTRIES}")
        for _ in range(pair_count):
            key = header.name()
            if key in self.metadata:
                raise header.damaged(f"the metadata {key} twice")
            self.metadata[key] = header.value()
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not is_whole(alignment, 1, 1 << 20) or alignment & (alignment - 1):
            raise header.damaged(f"general.alignment={str(alignment)[:80]}, not a power of two")
        entries = {}
        for _ in range(tensor_count):
            name = header.name()
            (dimensions,) = header.unpack("I")
            if name in entries or not 0 < dimensions <= _MAX_DIMENSIONS:
                what = "twice" if name in entries else f"with {dimensions} dimensions"
                raise header.damaged(f"the tensor {name} {what}")
            entries[name] = (tuple(reversed(header.unpack(f"{dimensions}Q"))), *header.unpack("IQ"))
        data = math.ceil(header.position / alignment) * alignment
        for name, (shape, kind_number, offset) in entries.items():
            kind, row_bytes = self._row_bytes(name, shape, kind_number)
            if offset % alignment:
                raise header.damaged(f"the tensor {name} at byte {offset} of the data, no multiple of {alignment}")
            self.tensors[name] = GGUFTensor(data + offset, shape, kind, row_bytes)

    def _row_bytes(self, name: str, shape: tuple[int, ...], number: int) -> tuple[GGMLQuantizationType, int]:
        """(block type, bytes of a row) of a tensor whose type has the `number` of the file format.

        Raises:
            HFEError: the type is unknown or cannot be dequantised, `shape` has a dimension of 0, its rows are not whole
                blocks, or the package gguf is not installed.
        """
        package = _gguf()
        try:
            kind = package.GGMLQuantizationType(number)
            block_elements, block_bytes = package.GGML_QUANT_SIZES[kind]
            package.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), kind)
        except NotImplementedError as error:
            raise HFEError(
                f"tensor {name} in {self.path.name} has the type {kind.name}, which the package gguf does not convert",
                "use a file with another quantisation",
            ) from error
        except (ValueError, KeyError) as error:
            raise HFEError(
                f"tensor {name} in {self.path.name} has the unknown GGUF type {number}", "update the package gguf"
            ) from error
        if not all(shape) or shape[-1] % block_elements:
            raise HFEError(
                f"tensor {name} in {self.path.name} has shape {list(shape)}; rows of type {kind.name} hold a "
                f"multiple of {block_elements} elements",
                "download or copy the file again",
            )
        return kind, shape[-1] // block_elements * block_bytes


def _gguf() -> Any:
    """The package gguf, which is imported only for GGUF sources; `HFEError` if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise HFEError("a GGUF source needs the package gguf", "pip install gguf") from error
    return gguf


class _Header:
    """Reads the values of a GGUF header one after the other.

    Every length is compared with the bytes left in the file before anything is read or allocated.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self.position = 0

    def damaged(self, what: str) -> HFEError:
        """The error (not raised) for a header that has `what` at the current position."""
        return HFEError(
            f"{self._path.name} is truncated or damaged at byte {self.position} of its header: it has {what}",
            "download or copy it again",
        )

    def unpack(self, form: str) -> tuple[Any, ...]:
        """The next values by a format of `struct`, little-endian; `HFEError` if the file is too short."""
        form = "<" + form
        return struct.unpack(form, self._take(struct.calcsize(form)))

    def name(self) -> str:
        """The next string, a metadata key or the name of a tensor; errors as for `_text`."""
        return self._text(_MAX_NAME_BYTES)

    def value(self) -> Any:
        """The next metadata value, which its type precedes; of long arrays and those of strings the length.

        Raises:
            HFEError: the type, or that of an array's elements, is unknown, or as for `_text`.
        """
        (kind,) = self.unpack("I")
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._text(_MAX_TEXT_BYTES)
        if kind != _ARRAY:
            raise self.damaged(f"a value of the unknown type {kind}")
        element, count = self.unpack("IQ")
        if element in _SCALARS:
            if count <= _MAX_KEPT_NUMBERS:
                return list(self.unpack(f"{count}{_SCALARS[element]}"))
            self._skip(count * struct.calcsize("<" + _SCALARS[element]))
        elif element == _STRING:
            for _ in range(count):
                self._skip(self.unpack("Q")[0])
        else:
            raise self.damaged(f"an array of values of the type {element}")
        return count

    def _text(self, limit: int) -> str:
        """A string of at most `limit` bytes, which its length precedes.

        Raises:
            HFEError: it is longer or not UTF-8, or the file is too short.
        """
        (length,) = self.unpack("Q")
        if length > limit:
            raise self.damaged(f"a text of {length} bytes where at most {limit} are allowed")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text that is not UTF-8 ({error})") from error

    def _take(self, count: int) -> bytes:
        """The next `count` bytes; `HFEError` if the file has fewer."""
        self._check(count)
        self.position += count
        return self._file.read(count)

    def _skip(self, count: int) -> None:
        """Move `count` bytes forward; `HFEError` if the file has fewer."""
        self._check(count)
        self.position += count
        self._file.seek(self.position)

    def _check(self, count: int) -> None:
        """Raise `HFEError` if fewer than `count` bytes are left."""
        left = self._size - self.position
        if count > left:
            raise self.damaged(f"{left} bytes left where {count} are needed")
