"""Lists and reads the files of an untrusted folder, without following symbolic links or opening special files."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from hf_efficient.errors import HFEError
from hf_efficient.hub.findings import Finding

REMEDY = "delete it, or do not load this checkpoint with trust_remote_code"
_KINDS = {
    **{stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"},
    **{stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder"},
}
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# More files than any checkpoint has; bounds the time of a listing.
_MAX_FILES = 20_000


class UntrustedFolder:
    """The regular files in a folder and its subfolders, listed by the constructor.

    In the Hub's cache a snapshot's files are links to blobs of the same repository; any other link is a finding.

    Attributes:
        files: size in bytes of each file, by its path relative to the folder, with slashes.
        findings: one for each entry that is neither a regular file nor a folder, and each folder that cannot be listed.

    Raises:
        HFEError: it has more than 20,000 entries.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self.files: dict[str, int] = {}
        self.findings: list[Finding] = []
        self._folders: list[str] = []
        self._blobs: dict[str, Path] = {}
        for _ in self._walk(self._root, ""):
            if len(self.files) + len(self._folders) + len(self.findings) > _MAX_FILES:
                raise HFEError(f"{root} holds more than {_MAX_FILES:,} files", "name the folder of a checkpoint")

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def empty_folders(self) -> list[str]:
        """Names of the folders without files at any depth; `.git` is one of them, since its files are not listed."""
        return [name for name in self._folders if not any(file.startswith(f"{name}/") for file in self.files)]

    def path(self, name: str) -> Path:
        """The path of a listed file; for a link into the Hub's cache, that of the blob."""
        return self._blobs.get(name, self._root / name)

    def read(self, name: str, most: int) -> bytes:
        """The content of a listed file; `HFEError` if it has more than `most` bytes or cannot be read."""
        data = self.read_start(name, most + 1)
        if len(data) > most:
            raise HFEError(f"has {self.files[name]:,} bytes; such a file has at most {most:,}", REMEDY)
        return data

    def read_start(self, name: str, count: int) -> bytes:
        """The first `count` bytes of a listed file; `HFEError` if it cannot be read or is no longer a regular file."""
        # Without O_NONBLOCK, opening a named pipe that replaced the file would wait for a writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            with open(os.open(self.path(name), flags), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise HFEError("is not a regular file", REMEDY)
                return file.read(count)
        except OSError as error:
            raise HFEError(f"cannot be read: {error.strerror}", "make it readable") from None

    def _walk(self, directory: Path, prefix: str) -> Iterator[None]:
        """List a folder recursively into the attributes; yields after each entry, so that the caller can stop."""
        try:
            with os.scandir(directory) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            self.findings.append(Finding(prefix or ".", f"cannot be listed: {error.strerror}", "make it readable"))
            return
        for entry in entries:
            name = prefix + entry.name
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                self._folders.append(name)
                # git's own files may be many, and are neither loaded nor uploaded.
                if name != ".git":
                    yield from self._walk(directory / entry.name, f"{name}/")
            elif stat.S_ISREG(status.st_mode):
                self.files[name] = status.st_size
            elif (blob := self._blob(directory / entry.name)) is not None:
                self._blobs[name], self.files[name] = blob, blob.lstat().st_size
            else:
                kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
                if stat.S_ISLNK(status.st_mode):
                    kind = f"a link to {os.readlink(directory / entry.name)}"
                self.findings.append(Finding(name, f"is {kind}; a checkpoint holds regular files only", REMEDY))
            yield

    def _blob(self, link: Path) -> Path | None:
        """The blob that `link`, a file of a snapshot in the Hub's cache, points to; None for any other link."""
        if self._root.parent.name != "snapshots" or not link.is_symlink():
            return None
        blobs = self._root.parent.parent / "blobs"
        target = Path(os.path.normpath(link.parent / os.readlink(link)))
        is_blob = target.parent == blobs and _BLOB.fullmatch(target.name) and not blobs.is_symlink()
        return target if is_blob and target.exists() and stat.S_ISREG(target.lstat().st_mode) else None
