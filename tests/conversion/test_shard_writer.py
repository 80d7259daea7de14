"""The safetensors library reads shards written as a stream; a failed write leaves no shard."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_efficient.conversion.writing import shard_writer
from hf_efficient.conversion.writing.durable_files import DiskFullError, FinishedFile
from hf_efficient.conversion.writing.shard_writer import Shard, ShardWriter, StoredTensor, split_into_shards
from hf_efficient.errors import HFEError


def stored(**tensors: torch.Tensor) -> list[StoredTensor]:
    return [StoredTensor(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def test_the_library_reads_back_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "CHUNK_ELEMENTS", 7)
    tensors = {
        "strided": torch.randn(6, 8)[:, ::2],
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(5, 3).half(),
        "brain": torch.randn(9).bfloat16(),
    }
    writer = ShardWriter(tmp_path, Shard("x.safetensors", stored(**tensors)))
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    finished = writer.close()
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert finished == FinishedFile.of(tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_conversion_rounds_like_torch(tmp_path: Path) -> None:
    tensor = torch.randn(1000)
    writer = ShardWriter(tmp_path, Shard("x.safetensors", [StoredTensor("t", (1000,), torch.bfloat16)]))
    writer.add("t", tensor)
    writer.close()
    assert torch.equal(load_file(tmp_path / "x.safetensors")["t"], tensor.bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(tmp_path: Path, value: float) -> None:
    writer = ShardWriter(tmp_path, Shard("x.safetensors", [StoredTensor("t", (2,), torch.float32)]))
    with pytest.raises(HFEError, match="tensor t holds NaN, or values beyond the range of F32"):
        writer.add("t", torch.tensor([1.0, value]))


@pytest.mark.parametrize(("name", "shape"), [("b", (2,)), ("a", (3,))])
def test_a_tensor_out_of_order_or_shape_is_refused(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    writer = ShardWriter(tmp_path, Shard("x.safetensors", [StoredTensor(n, (2,), torch.float32) for n in "ab"]))
    with pytest.raises(HFEError, match=r"where its plan has a \[2\]"):
        writer.add(name, torch.zeros(shape))


def test_a_shard_with_a_tensor_missing_is_never_finished(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, Shard("x.safetensors", [StoredTensor(n, (2,), torch.float32) for n in "ab"]))
    writer.add("a", torch.zeros(2))
    with pytest.raises(HFEError, match="x.safetensors lacks tensor b"):
        writer.close()
    assert not (tmp_path / "x.safetensors").exists()


def test_shards_respect_the_limit() -> None:
    tensors = [StoredTensor(str(i), (size,), torch.float32) for i, size in enumerate([10, 10, 10, 100, 10, 30])]
    shards = split_into_shards(tensors, 120)
    assert [[tensor.name for tensor in shard.tensors] for shard in shards] == [["0", "1", "2"], ["3"], ["4"], ["5"]]
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    (single,) = split_into_shards(tensors, 10_000)
    assert single.name == "model.safetensors"


def test_every_tensor_is_aligned_to_its_element_size() -> None:
    tensors = [StoredTensor("narrow", (3,), torch.bfloat16), StoredTensor("wide", (2,), torch.float32)]
    assert len(split_into_shards(tensors, 10_000)) == 2
    assert len(split_into_shards(tensors[::-1], 10_000)) == 1


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EFBIG, "file size")]
)
def test_a_full_disk_gives_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    writer = ShardWriter(tmp_path, Shard("x.safetensors", [StoredTensor("t", (2,), torch.float32)]))

    def full(data: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writer, "_write", full)
    with pytest.raises(DiskFullError, match=f"{words}.* free\\); OUTPUT was not touched; free some space") as error:
        writer.add("t", torch.zeros(2))
    assert error.value.exit_code == 1 and "\n" not in str(error.value)


def test_other_os_errors_are_raised_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ShardWriter(tmp_path / "gone", Shard("x.safetensors"))
