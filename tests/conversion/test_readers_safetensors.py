"""The safetensors reader gives what the safetensors library gives, and names what is wrong with a file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_efficient.conversion.reading.checkpoint_files import open_folder_reader, weight_files
from hf_efficient.conversion.reading.safetensors_reader import SafetensorsReader
from hf_efficient.conversion.reading.source import open_source
from hf_efficient.errors import HFEError


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "matrix": torch.randn(7, 5),
        "half": torch.randn(3, 4, 2).half(),
        "brain": torch.randn(11).bfloat16(),
        "double": torch.randn(2, 3).double(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "ids": torch.arange(6),
    }


def test_reads_what_the_library_reads(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    reader = SafetensorsReader([tmp_path / "model.safetensors"])
    expected = load_file(tmp_path / "model.safetensors")
    assert sorted(reader.names()) == sorted(expected)
    for name, tensor in expected.items():
        read = reader.read(name)
        assert torch.equal(read, tensor)
        assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), tensor.dtype)


def test_reads_rows_without_the_others(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    reader = SafetensorsReader([tmp_path / "model.safetensors"])
    for name in ("matrix", "half", "brain"):
        assert torch.equal(reader.read_rows(name, 1, 3), tensors[name][1:3])
    assert torch.equal(reader.read_rows("matrix", 5, 99), tensors["matrix"][5:])


def test_a_tensor_that_was_read_is_a_copy(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4)}, tmp_path / "model.safetensors")
    reader = SafetensorsReader([tmp_path / "model.safetensors"])
    reader.read("x").zero_()
    assert torch.equal(reader.read("x"), torch.ones(4))


def test_reads_all_shards(stock_folder: Callable[..., Path]) -> None:
    one, sharded = stock_folder("qwen3"), stock_folder("qwen3", max_shard_size="20KB")
    assert len(weight_files(sharded, {}, "name")) > 2
    whole, parts = open_folder_reader(one), open_folder_reader(sharded)
    assert set(whole.names()) == set(parts.names())
    assert all(torch.equal(whole.read(name), parts.read(name)) for name in whole.names())


@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (-float("inf"), "infinity")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_named(tmp_path: Path, value: float, word: str, dtype: torch.dtype) -> None:
    bad = torch.zeros(5, 3, dtype=dtype)
    bad[3, 1] = value
    save_file({"good": torch.zeros(2), "bad": bad}, tmp_path / "model.safetensors")
    reader = SafetensorsReader([tmp_path / "model.safetensors"])
    with pytest.raises(HFEError, match=f"tensor bad in model.safetensors holds {word}"):
        reader.read("bad")
    with pytest.raises(HFEError, match=word):
        reader.read_rows("bad", 3, 4)
    assert reader.read_rows("bad", 0, 3).sum() == 0


def test_every_truncation_is_an_error(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    whole = path.read_bytes()
    for length in [*range(0, 40), len(whole) // 2, *range(len(whole) - 9, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(HFEError, match=r"truncated|not valid safetensors"):
            SafetensorsReader([path])


def test_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(100)}, path)
    reader = SafetensorsReader([path])
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(HFEError, match="truncated"):
        reader.read("x")


def _write_header(path: Path, header: object, data: int = 64) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}, "16 bytes"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [-4, 12]}, r"has the bytes \[-4, 12\]"),
        ({"dtype": "F32", "shape": [40], "data_offsets": [0, 160]}, "truncated"),
        ({"dtype": "Q7", "shape": [4], "data_offsets": [0, 16]}, "dtype Q7"),
        ({"dtype": "F32", "shape": [4]}, "not valid safetensors"),
        ({"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}, "not valid safetensors"),
        ("F32", "not valid safetensors"),
    ],
)
def test_inconsistent_headers_are_refused(tmp_path: Path, entry: object, words: str) -> None:
    path = tmp_path / "model.safetensors"
    _write_header(path, {"x": entry})
    with pytest.raises(HFEError, match=words):
        SafetensorsReader([path])


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ((0, 16), (16, 32), "the last tensor .* ends at byte"),
        ((0, 16), (20, 36), "begins at byte 20"),
        ((0, 16),) * 2 + ("begins at",),
    ],
)
def test_gaps_and_overlaps_are_refused(
    tmp_path: Path, first: tuple[int, int], second: tuple[int, int], words: str
) -> None:
    entries = {n: {"dtype": "F32", "shape": [4], "data_offsets": [*at]} for n, at in (("a", first), ("b", second))}
    _write_header(tmp_path / "model.safetensors", entries)
    with pytest.raises(HFEError, match=words):
        SafetensorsReader([tmp_path / "model.safetensors"])


def test_header_that_is_not_an_object(tmp_path: Path) -> None:
    _write_header(tmp_path / "model.safetensors", [1, 2])
    with pytest.raises(HFEError, match="holds a list, not an object"):
        SafetensorsReader([tmp_path / "model.safetensors"])


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(HFEError, match=r"tensor x is both in a\.safetensors and in b\.safetensors"):
        SafetensorsReader([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def _index(folder: Path, *files: object) -> None:
    weight_map = {f"t{i}": file for i, file in enumerate(files)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["../model.safetensors", "sub/../../x.safetensors", "/etc/passwd"])
def test_an_index_may_not_leave_its_folder(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"t0": torch.zeros(2)}, tmp_path / "model.safetensors")
    _index(folder, name)
    with pytest.raises(HFEError, match="outside the checkpoint's folder|not a safetensors file"):
        weight_files(folder, {}, "name")


@pytest.mark.parametrize("name", [7, None, [], "", "a\0b", "a\nb", "\ud800", "n" * 300])
def test_an_index_with_invalid_file_names_is_refused(tmp_path: Path, name: object) -> None:
    _index(tmp_path, name)
    with pytest.raises(HFEError, match="which is no file name|half of a character"):
        weight_files(tmp_path, {}, "name")


def test_an_index_may_name_a_subfolder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save_file({"t0": torch.zeros(2)}, tmp_path / "sub" / "x.safetensors")
    _index(tmp_path, "sub/x.safetensors")
    assert open_folder_reader(tmp_path).names() == ["t0"]


def test_a_link_may_not_leave_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"x": torch.zeros(2)}, tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(HFEError, match="link that leads outside"):
        weight_files(folder, {}, "name")


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path, stock_folder: Callable[..., Path]) -> None:
    stock = stock_folder()
    repository = tmp_path / "models--maker--small"
    snapshot = repository / "snapshots" / "0123abc"
    blobs = repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in stock.iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    source = open_source(str(snapshot))
    assert (source.base_model, source.revision) == ("maker/small", "0123abc")
    assert torch.equal(source.reader.read("lm_head.weight"), open_folder_reader(stock).read("lm_head.weight"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    _index(tmp_path, "gone.safetensors")
    with pytest.raises(HFEError, match=r"names 'gone\.safetensors', which is missing"):
        weight_files(tmp_path, {}, "name")
