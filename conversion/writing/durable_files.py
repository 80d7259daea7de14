"""Writes files so that they are complete or absent after a crash: under a temporary name, fsynced, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hf_efficient.errors import HFEError

_FULL_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a limit on file size is reached",
}


class DiskFullError(HFEError):
    """A full disk, a quota or a limit on file size stopped a write. Shards that were finished before are kept."""


@dataclass(frozen=True)
class FinishedFile:
    """Size in bytes and SHA-256 of a finished file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FinishedFile:
        """Size and SHA-256 of the current content of a file, which is read completely."""
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return cls(path.stat().st_size, digest.hexdigest())


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Context: the OSError of a full disk, a quota or a limit on file size becomes `DiskFullError`.

    So does an `HFEError` whose cause is such an OSError. Other errors pass through. `folder` is on the disk whose free
    space the message gives.
    """
    try:
        yield
    except (OSError, HFEError) as error:
        # Writing the code raises HFEError with the file's name; its cause is the OSError.
        os_error = error.__cause__ if isinstance(error, HFEError) else error
        if (
            isinstance(error, DiskFullError)
            or not isinstance(os_error, OSError)
            or os_error.errno not in _FULL_DISK_ERRORS
        ):
            raise
        free = format_bytes(shutil.disk_usage(folder).free)
        raise DiskFullError(
            f"the result cannot be written: {_FULL_DISK_ERRORS[os_error.errno]} ({free} free); OUTPUT was not touched",
            "free some space and repeat the command with --resume",
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically: a reader finds the old content or the new.

    Raises:
        DiskFullError: the disk is full; `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with disk_errors(path.parent):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)


def sync(path: Path) -> None:
    """fsync a file or a folder (its list of entries)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def format_bytes(count: float) -> str:
    """A number of bytes as text such as `1.5 GB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
