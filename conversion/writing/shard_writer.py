"""Writes safetensors shards as a stream: the header is written first, and each tensor as soon as it is available."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_efficient.conversion.reading.safetensors_reader import DTYPES
from hf_efficient.conversion.reading.tensor_file import CHUNK_ELEMENTS
from hf_efficient.conversion.writing.durable_files import FinishedFile, disk_errors, sync
from hf_efficient.errors import HFEError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class StoredTensor:
    """Name, shape and dtype of a tensor in a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Bytes of the data."""
        return self.elements * self.dtype.itemsize


@dataclass
class Shard:
    """One weight file: its name and tensors, in the order of their bytes."""

    name: str
    tensors: list[StoredTensor] = field(default_factory=list)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, without the header."""
        return sum(tensor.bytes for tensor in self.tensors)

    def header(self) -> bytes:
        """The first bytes of the file: the header's length, and the JSON header padded to a multiple of eight bytes."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.tensors:
            stop = offset + tensor.bytes
            entries[tensor.name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, stop],
            }
            offset = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def split_into_shards(tensors: list[StoredTensor], max_bytes: int, name: str = SAFE_WEIGHTS_NAME) -> list[Shard]:
    """Cut the tensors, in their order, into files of at most `max_bytes` of data; a larger tensor gets its own file.

    Readers view a file's bytes as elements, so each tensor must begin at a multiple of its element size; if it would
    not, a new file is begun. A single file has the `name`, such as model.safetensors; several files are named like
    model-00001-of-0000N.safetensors.
    """
    # Not huggingface_hub's split_state_dict_into_shards_factory: it continues the previous file after a tensor beyond
    # the limit, so that two files would be open, and it does not align tensors.
    groups: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and (size + tensor.bytes > max_bytes or size % tensor.dtype.itemsize):
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.bytes
    if len(groups) == 1:
        return [Shard(name, groups[0])]
    count, (base, suffix) = len(groups), os.path.splitext(name)
    return [Shard(f"{base}-{i:05d}-of-{count:05d}{suffix}", group) for i, group in enumerate(groups, start=1)]


class ShardWriter:
    """Writes one shard, tensor by tensor, under a temporary name; `close` renames it. Creating it writes the header.

    Tensors of another floating-point dtype than planned are converted in chunks, so that there is no second copy.

    Args:
        folder: the checkpoint folder.
        shard: name and tensors of the file.

    Raises:
        DiskFullError: the disk is full.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.shard = shard
        self._path = folder / shard.name
        self._temporary = folder / f".{shard.name}.partial"
        self._digest = hashlib.sha256()
        self._size = 0
        self._next = 0
        with disk_errors(folder):
            self._file = self._temporary.open("wb", buffering=0)
            self._write(shard.header())

    def add(self, name: str, tensor: Tensor, *, known_finite: bool = False) -> None:
        """Append the next tensor of the shard, converted to the planned dtype.

        Args:
            name: name of the tensor.
            tensor: its value, of the planned shape and any floating-point dtype.
            known_finite: True if `tensor` was checked for NaN and infinity; then only a changed dtype is checked.

        Raises:
            HFEError: the tensor is not the next one of the plan, has NaN or infinity, or exceeds the dtype's range.
            IndexError: all tensors of the shard were added before.
            DiskFullError: the disk is full.
        """
        planned = self.shard.tensors[self._next]
        if (name, tuple(tensor.shape)) != (planned.name, planned.shape):
            raise HFEError(
                f"the converter was given tensor {name} {list(tensor.shape)} where its plan has {planned.name} "
                f"{list(planned.shape)}",
                "this is an error in the patch, whose tensors must come in the order of its plan; please report it",
            )
        self._next += 1
        flat = tensor.detach().reshape(-1)
        with disk_errors(self._path.parent):
            for start in range(0, flat.numel(), CHUNK_ELEMENTS):
                chunk = flat[start : start + CHUNK_ELEMENTS].to("cpu", planned.dtype).contiguous()
                if not (known_finite and tensor.dtype == planned.dtype):
                    _check_range(name, chunk, planned.dtype)
                self._write(chunk.view(torch.uint8).numpy().data)

    def close(self) -> FinishedFile:
        """fsync the finished file and rename it to its final name; returns its size and hash.

        Raises:
            HFEError: a tensor of the plan was not added.
            DiskFullError: the disk is full.
        """
        if self._next != len(self.shard.tensors):
            raise HFEError(
                f"{self.shard.name} lacks tensor {self.shard.tensors[self._next].name}",
                "this is an error in the patch; please report it",
            )
        with disk_errors(self._path.parent):
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._path)
            sync(self._path.parent)
        return FinishedFile(self._size, self._digest.hexdigest())

    def abandon(self) -> None:
        """Close the file without finishing it; a resumed conversion overwrites it."""
        self._file.close()

    def _write(self, data: bytes | memoryview) -> None:
        """Write all of `data`, and add it to the hash and the size."""
        view = memoryview(data).cast("B")
        while view:
            count = self._file.write(view)
            self._digest.update(view[:count])
            self._size += count
            view = view[count:]


def _check_range(name: str, chunk: Tensor, dtype: torch.dtype) -> None:
    """Raise `HFEError` if the converted `chunk` has NaN or infinity, which values beyond the dtype's range become."""
    if chunk.numel() and not all(torch.isfinite(extreme) for extreme in chunk.aminmax()):
        raise HFEError(
            f"tensor {name} holds NaN, or values beyond the range of {_NAMES[dtype]}",
            "convert with --dtype bfloat16 or float32",
        )
