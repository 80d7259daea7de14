"""Reads safetensors checkpoints, in one file or in shards, one tensor at a time."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_efficient.conversion.reading.tensor_file import check_finite, read_tensor
from hf_efficient.errors import HFEError
from hf_efficient.json_file import MAX_JSON_BYTES, is_whole, open_file, parse_json

# Name of a dtype in the format -> torch dtype. Weights have those of the first row; buffers, which a conversion leaves
# out, may have the others.
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
_MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class TensorEntry:
    """Location of a tensor: file, offset of its first byte in the file, shape and dtype."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_elements(self) -> int:
        """Number of elements in one entry of the first dimension."""
        return math.prod(self.shape[1:])


def read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header as parsed JSON, length of the header in bytes, size of the file in bytes) of a safetensors file.

    Raises:
        HFEError: the file cannot be read, is shorter than its header claims, has a header of more than
            `MAX_JSON_BYTES`, or one that is not the JSON that `parse_json` accepts.
    """
    # huggingface_hub's parser accepts a tensor listed twice and bytes that are not UTF-8, and compares offsets neither
    # with shapes nor with the size of the file.
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise HFEError(
                f"{path.name} has {size} bytes, fewer than its header claims: it is truncated or not safetensors",
                "download or copy it again",
            )
        if length > MAX_JSON_BYTES:
            raise HFEError(
                f"the header of {path.name} has {length} bytes; this reader supports at most {MAX_JSON_BYTES}",
                "save the checkpoint in more shards",
            )
        text = file.read(length)
    return parse_json(f"the header of {path.name}", text), length, size


def parse_header(path: Path) -> dict[str, TensorEntry]:
    """Name -> location of the tensors of one safetensors file, in the order of their bytes. Reads the header only.

    Raises:
        HFEError: the file cannot be read, is truncated, or breaks a rule of the format: the tensors are contiguous
            from the end of the header to the end of the file.
    """
    header, length, size = read_header(path)
    header.pop("__metadata__", None)
    described = [(name, *_parse_entry(path, name, entry)) for name, entry in header.items()]

    entries = {}
    position = 0
    for name, kind, shape, start, stop in sorted(described, key=lambda entry: entry[3:]):
        expected = math.prod(shape) * DTYPES[kind].itemsize
        if stop - start != expected:
            raise HFEError(
                f"tensor {name} in {path.name} has shape {list(shape)} and dtype {kind}, which is {expected} bytes, "
                f"but its header gives it bytes {start} to {stop}",
                "download or copy the file again",
            )
        if 8 + length + stop > size:
            raise HFEError(
                f"{path.name} is truncated: tensor {name} ends at byte {8 + length + stop}, the file at {size}",
                "download or copy it again",
            )
        if start != position:
            raise HFEError(
                f"tensor {name} in {path.name} begins at byte {start} of the data and the tensor before it ends at "
                f"{position}",
                "download or copy the file again",
            )
        entries[name] = TensorEntry(path, 8 + length + start, shape, DTYPES[kind])
        position = stop
    if 8 + length + position != size:
        raise HFEError(
            f"the last tensor of {path.name} ends at byte {8 + length + position}, the file at {size}",
            "download or copy it again",
        )
    return entries


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype name, shape, offset of the first byte, offset of the end) of a header's entry; `HFEError` if malformed.

    Offsets count from the end of the header.
    """
    fields = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str):
        raise HFEError(f"the header of {path.name} is not valid safetensors (at tensor {name})", "download it again")
    if kind not in DTYPES:
        raise HFEError(
            f"tensor {name} in {path.name} has dtype {kind[:80]}, which is not one of {', '.join(DTYPES)}",
            "use a checkpoint in float32, float16 or bfloat16",
        )
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(is_whole, shape)):
        raise HFEError(
            f"the header of {path.name} is not valid safetensors (tensor {name} has the shape {str(shape)[:80]})",
            "download it again",
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_whole, offsets)):
        raise HFEError(
            f"the header of {path.name} is not valid safetensors (tensor {name} has the bytes {str(offsets)[:80]})",
            "download it again",
        )
    return kind, tuple(shape), offsets[0], offsets[1]


class SafetensorsReader:
    """A `TensorReader` (see `tensor_reader.py`) for the given safetensors files. Creating it reads their headers.

    Raises:
        HFEError: a file cannot be read or is damaged (see `parse_header`), or two files have a tensor of the same name.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._entries: dict[str, TensorEntry] = {}
        for path in paths:
            entries = parse_header(path)
            twice = sorted(self._entries.keys() & entries.keys())
            if twice:
                first = self._entries[twice[0]].path.name
                raise HFEError(f"tensor {twice[0]} is both in {first} and in {path.name}", "remove the stale shard")
            self._entries.update(entries)

    def names(self) -> list[str]:
        """Names of the tensors, in the order of the files."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which the tensor is stored."""
        return self._entries[name].dtype

    def read(self, name: str) -> Tensor:
        """A copy of the tensor in its stored dtype, on the CPU.

        Raises:
            HFEError: it holds NaN or infinity, or the file cannot be read or is truncated.
        """
        entry = self._entries[name]
        return check_finite(name, read_tensor(entry.path, entry.offset, entry.shape, entry.dtype), entry.path)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the tensor, with ``0 <= start <= stop``; `stop` may exceed the number of rows.

        Only the bytes of these rows are read and checked; errors as for `read`.
        """
        entry = self._entries[name]
        stop = min(stop, entry.shape[0])
        offset = entry.offset + start * entry.row_elements * entry.dtype.itemsize
        rows = read_tensor(entry.path, offset, (stop - start, *entry.shape[1:]), entry.dtype)
        return check_finite(name, rows, entry.path)
