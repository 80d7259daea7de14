"""A full disk during any write gives a one-line error, and the same command with --resume finishes the conversion."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_efficient.conversion.writing.durable_files import DiskFullError
from hf_efficient.conversion.writing.workspace import partial_folder
from hf_efficient.convert_checkpoint import convert

QUIET = {"evaluate": False, "progress": False, "max_shard_size": "20KB"}


def _full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_every_file_that_a_conversion_renames_into_place(
    stock_folder: Callable[..., Path],
    folder_hashes: Callable[[Path], dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace, done = os.replace, []
    monkeypatch.setattr(os, "replace", lambda *paths: done.append(replace(*paths)))
    convert(stock_folder(), tmp_path / "whole", **QUIET)
    whole, count = folder_hashes(tmp_path / "whole"), len(done)
    assert count > 15  # weights, state, index, code, configuration, report
    for full_at in range(0, count, max(1, count // 4)):
        output = tmp_path / f"out{full_at}"
        done.clear()

        def fills(*paths: Path, at: int = full_at) -> None:
            if len(done) == at:
                raise _full()
            done.append(replace(*paths))

        monkeypatch.setattr(os, "replace", fills)
        with pytest.raises(DiskFullError, match="the disk is full .* repeat the command with --resume") as error:
            convert(stock_folder(), output, **QUIET)
        assert "\n" not in str(error.value) and not output.exists()
        monkeypatch.setattr(os, "replace", replace)
        convert(stock_folder(), output, resume=True, **QUIET)
        assert folder_hashes(output) == whole and not partial_folder(output).exists()


@pytest.mark.parametrize("method", ["write_text", "write_bytes", "mkdir"])
def test_code_and_card_and_folders(
    method: str, stock_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise _full()

    with monkeypatch.context() as full:
        full.setattr(Path, method, refuse)
        with pytest.raises(DiskFullError, match="the disk is full"):
            convert(stock_folder(), tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()
    convert(stock_folder(), tmp_path / "out", resume=True, **QUIET)
    assert (tmp_path / "out" / "README.md").is_file()
