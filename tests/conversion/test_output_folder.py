"""Every kind of OUTPUT works, or is refused before the conversion starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_efficient.conversion.writing.output_folder import resolve_output
from hf_efficient.convert_checkpoint import convert
from hf_efficient.errors import UsageError


def test_the_target_of_a_link_is_created(stock_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "large" / "disk").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "large" / "disk")
    convert(stock_folder(), tmp_path / "link", evaluate=False, progress=False)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "large" / "disk" / "config.json").is_file() and os.listdir(tmp_path / "large") == ["disk"]


def test_the_target_of_a_link_need_not_exist(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("three")
    assert resolve_output(tmp_path / "one") == (tmp_path / "three").resolve()
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UsageError, match="leads back to itself"):
        resolve_output(tmp_path / "round")


@pytest.mark.parametrize("output", [".", "./", "..", "../here", "link"])
def test_the_current_folder_is_refused(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to("../here")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="is or holds the current folder") as error:
        convert("nowhere", output, progress=False)
    assert error.value.exit_code == 2 and os.listdir(tmp_path) == ["here"]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("/", "is a mount point"),
        ("/proc", r"is a mount point, .*; name a folder in it: /proc/model"),
        ("a" * 250, "is too long"),
        ("a\0b", "NUL"),
        ("", "OUTPUT is empty"),
    ],
)
def test_impossible_names_are_refused(output: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        convert("nowhere", output, progress=False)
    assert not os.listdir(tmp_path)
