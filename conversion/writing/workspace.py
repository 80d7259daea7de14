"""The working folder of a conversion, next to OUTPUT, with a lock and a state file.

    OUTPUT.hfe-partial/
        lock          locked while a process works here
        state.json    what is finished, and under which options
        checkpoint/   renamed to OUTPUT when it is complete
        replaced/     the old OUTPUT, between two renames (--overwrite)

If the process is killed, OUTPUT is unchanged or the complete new one; finished shards stay here for `--resume`.
The working folder must be writable by its owner only: otherwise another user could have placed links to other files
in it. Any other folder of that name raises an error and is left unchanged.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from hf_efficient.conversion.writing.durable_files import (
    DiskFullError,
    FinishedFile,
    disk_errors,
    format_bytes,
    sync,
    write_text,
)
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.json_file import finite_or_null, is_whole, read_json

SUFFIX = ".hfe-partial"
_FORMAT = 1
# Room for tokenizer, code, report and the state file.
_SPARE_BYTES = 64_000_000
_LOCK, _STATE, _CHECKPOINT, _REPLACED = "lock", "state.json", "checkpoint", "replaced"
_CHECKSUM = "sha256"
_MAX_STATE_BYTES = 1 << 28
_NOT_OWN_REMEDY = "look at it and remove it by hand, or name another OUTPUT"


def check_output(output: Path, source: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise an error if OUTPUT must not be written or replaced. Reads no source and changes nothing.

    Raises:
        UsageError: OUTPUT is or contains the source, is a file, or cannot be created; or without `overwrite` it is a
            folder with files; or without `resume` and `overwrite` an unfinished conversion is next to it.
        HFEError: the working folder was not created by a conversion of this user, or another process is converting to
            OUTPUT.
    """
    if source.exists() and source.resolve().is_relative_to(output.resolve()):
        raise UsageError(f"OUTPUT {output} is or holds the source {source.name}", "name another folder")
    partial = partial_folder(output)
    if os.path.lexists(partial):
        with suppress(FileNotFoundError), _own_folder(partial) as folder, _open_lock(folder, os.O_RDWR) as lock:
            _lock_or_fail(lock, output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"OUTPUT {output} is a file", "name a folder that does not exist yet")
    parent = next(folder for folder in output.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"OUTPUT {output} cannot be made in {parent}", "name a folder in a place you may write to")
    # After a crash between two renames the old OUTPUT is in the working folder, so that is checked first.
    if partial.exists() and not (resume or overwrite):
        raise UsageError(
            f"there is an unfinished conversion in {partial.name} beside OUTPUT",
            "continue it with --resume, or discard it with --overwrite",
        )
    if output.is_dir() and any(output.iterdir()) and not overwrite and not (resume and partial.exists()):
        raise UsageError(
            f"OUTPUT {output} exists and is not empty", "name another folder, or replace this one with --overwrite"
        )


def partial_folder(output: Path) -> Path:
    """The working folder of a conversion to `output`."""
    return output.with_name(output.name + SUFFIX)


class Workspace:
    """The working folder of one conversion, locked while this object is open as a context.

    An error in the data (`HFEError`) removes the folder, since the same error would occur again. An interruption keeps
    it for `--resume`; so do a full disk after something was finished, and any error of a resumed conversion.

    Args:
        output: the folder to create.
        options: everything that determines the result. A conversion is resumed only with the same options.
        resume: continue an unfinished conversion; without one, start anew.
        overwrite: whether the user allowed that an unfinished conversion and `output` are replaced. `check_output`, to
            be called before, raises without it; this class discards (unless `resume`) and replaces either way.

    Attributes:
        checkpoint: the folder that `publish` renames to `output`.
        resumed: whether the state of an earlier run was loaded.
    """

    def __init__(self, output: Path, options: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.output = output
        self.folder = partial_folder(output)
        self.checkpoint = self.folder / _CHECKPOINT
        self.resumed = False
        self._replaced = self.folder / _REPLACED
        self._options = json.loads(json.dumps(options))
        self._resume = resume
        self._overwrite = overwrite
        self._state: dict[str, Any] = {
            "format": _FORMAT,
            "options": self._options,
            "shards": {},
            "results": {},
            "complete": False,
        }
        self._lock: TextIO | None = None

    def __enter__(self) -> Workspace:
        """Create and lock the folder, and load the state of an earlier run with `resume`.

        Raises:
            HFEError: another process uses the folder, it is not of this user, or the earlier run that is to be resumed
                had other options.
            DiskFullError: the disk is full.
        """
        parent = next(folder for folder in self.output.parents if folder.exists())
        with disk_errors(parent):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            try:
                self._restore_replaced()
                if self._resume:
                    self._load_state()
                if not self.published:
                    self._clear_checkpoint()
                self._save_state()
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Unlock the folder, and remove it after an `HFEError` (see the class for the exceptions)."""
        finished = bool(self._state["shards"] or self._state["results"])
        kept = self.resumed or (isinstance(error, DiskFullError) and finished)
        if isinstance(error, HFEError) and not kept:
            self.discard()
        self._release()

    @property
    def published(self) -> bool:
        """True if an earlier run was killed between the rename to OUTPUT and the removal of the working folder."""
        return bool(self._state["complete"]) and not self.checkpoint.exists() and self.output.exists()

    def check_space(self, needed: int) -> None:
        """Raise `DiskFullError` if there is no space for a result of `needed` bytes, finished shards not counted.

        64 MB more must be free, for the files beside the weights.
        """
        finished = sum(file["size"] for file in self._state["shards"].values())
        free = shutil.disk_usage(self.folder).free
        if needed - finished + _SPARE_BYTES > free:
            raise DiskFullError(
                f"the result needs {format_bytes(needed - finished)} of disk beside {self.output.name}, and "
                f"{format_bytes(free)} are free",
                "free some space and repeat the command with --resume, or name an OUTPUT elsewhere",
            )

    def finished_shard(self, name: str) -> bool:
        """True if an earlier run finished this weight file and its size and SHA-256, computed here, are unchanged."""
        recorded = self._state["shards"].get(name)
        path = self.checkpoint / name
        if recorded is None or path.is_symlink() or not path.is_file():
            return False
        return FinishedFile.of(path) == FinishedFile(**recorded)

    def record_shard(self, name: str, file: FinishedFile) -> None:
        """Record a finished weight file in the state file."""
        self._state["shards"][name] = {"size": file.size, "sha256": file.sha256}
        self._save_state()

    def result(self, key: str) -> Any:
        """The result recorded under `key` by an earlier run or step, or None."""
        return self._state["results"].get(key)

    def record_result(self, key: str, value: Any) -> None:
        """Record a result that takes long to compute, so that a resumed run need not repeat it.

        Args:
            key: name of the result.
            value: dicts, lists and plain values; numbers that are not finite are recorded as None.
        """
        self._state["results"][key] = finite_or_null(value)
        self._save_state()

    def publish(self) -> None:
        """fsync the checkpoint, rename it to OUTPUT, and remove the working folder.

        An old OUTPUT is removed only after the new one is in place.

        Raises:
            DiskFullError: the disk is full.
        """
        self._state["complete"] = True
        self._save_state()
        with disk_errors(self.folder):
            for path in (self.checkpoint, *self.checkpoint.rglob("*")):
                sync(path)
            if self.output.exists():
                os.rename(self.output, self._replaced)
            os.rename(self.checkpoint, self.output)
            sync(self.output.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the working folder; an old OUTPUT in it is moved back first."""
        self._restore_replaced()
        # The lock is removed last, so that no other process starts in a folder that is being removed.
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _restore_replaced(self) -> None:
        """Move an old OUTPUT back if there is no new one, else remove it."""
        if self._replaced.exists() and not self.output.exists():
            os.rename(self._replaced, self.output)
        shutil.rmtree(self._replaced, ignore_errors=True)

    def _take_lock(self) -> None:
        """Create the working folder if needed and lock it; `HFEError` if it is in use or is not the user's own."""
        while True:
            with suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
            path = self.folder / _LOCK
            # The previous holder may remove the folder until the lock is taken here; then try again.
            with suppress(FileNotFoundError), ExitStack() as stack, _own_folder(self.folder) as folder:
                lock = stack.enter_context(_open_lock(folder, os.O_RDWR | os.O_CREAT))
                _lock_or_fail(lock, self.output)
                if os.path.samestat(path.lstat(), os.fstat(lock.fileno())):
                    stack.pop_all()
                    self._lock = lock
                    return

    def _release(self) -> None:
        """Unlock the working folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _load_state(self) -> None:
        """Load the state of an earlier run, if it is valid, and set `resumed`.

        Raises:
            HFEError: that run had other options, or its state is of another format version.
        """
        try:
            state = read_json(self.folder / _STATE, limit=_MAX_STATE_BYTES)
        except HFEError:
            return  # no shard was finished
        # A state file that was changed is ignored: everything is computed again.
        if state.pop(_CHECKSUM, None) != _checksum(state) or not _is_state(state):
            return
        differing = _differences(state.get("options", {}), self._options)
        if state.get("format") != _FORMAT or differing:
            raise HFEError(
                f"the unfinished conversion in {self.folder.name} had other options: {'; '.join(differing)}",
                "repeat the options it was started with, or start again with --overwrite and without --resume",
            )
        self._state = state
        self.resumed = True

    def _clear_checkpoint(self) -> None:
        """Create the checkpoint folder if it is missing, and remove everything from it but recorded weight files."""
        self.checkpoint.mkdir(exist_ok=True)
        for path in self.checkpoint.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in self._state["shards"]:
                path.unlink()

    def _save_state(self) -> None:
        """Write the state file with its checksum."""
        write_text(self.folder / _STATE, json.dumps({**self._state, _CHECKSUM: _checksum(self._state)}, indent=1))


def _checksum(state: dict[str, Any]) -> str:
    """SHA-256 of a state as sorted JSON, to detect a changed state file."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


@contextmanager
def _own_folder(path: Path) -> Iterator[int]:
    """Context: yields a file descriptor of a working folder that belongs to the user and only the user can write to.

    Raises:
        HFEError: it is a link, another user owns it or can write to it, or it has entries that no conversion creates.
        FileNotFoundError: there is none.
    """
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _not_own_error(path, f"cannot be opened as a folder ({error.strerror})") from None
    try:
        status = os.fstat(folder)
        if status.st_uid != os.geteuid():
            raise _not_own_error(path, f"belongs to the user {status.st_uid}, not to you")
        if status.st_mode & 0o022:
            raise _not_own_error(path, "may be written by others")
        _check_entries(path, folder)
        yield folder
    finally:
        os.close(folder)


def _check_entries(path: Path, folder: int) -> None:
    """Check the entries of a working folder: nothing in it may change files elsewhere or belong to another user.

    `checkpoint` and `replaced` must be folders, every other entry a regular file of this user with one hard link, of
    any name. In `checkpoint` only folders and such files are allowed; the content of `replaced` is not checked.

    Args:
        path: path of the folder, for messages.
        folder: descriptor of the open folder.

    Raises:
        HFEError: an entry is of another kind; the message names it.
        OSError: an entry disappeared or cannot be read.
    """
    with os.scandir(folder) as entries:
        statuses = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
    folders = (_CHECKPOINT, _REPLACED)
    for name, status in statuses.items():
        if not (stat.S_ISDIR(status.st_mode) if name in folders else _is_own_file(status)):
            raise _not_own_error(path, f"holds {name!r}, which is {_describe_entry(status)}")
    # The old OUTPUT may have any content, links included: it is moved or removed as a whole.
    if _CHECKPOINT not in statuses:
        return
    for _, names, files, inner in os.fwalk(_CHECKPOINT, dir_fd=folder, follow_symlinks=False):
        for name in [*names, *files]:
            status = os.lstat(name, dir_fd=inner)
            if not (stat.S_ISDIR(status.st_mode) or _is_own_file(status)):
                raise _not_own_error(path, f"holds {name!r}, which is {_describe_entry(status)}")


def _is_own_file(status: os.stat_result) -> bool:
    """True for the status of a regular file of this user with a single hard link."""
    # Writing to a file with a second hard link would change another file.
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid()


def _describe_entry(status: os.stat_result) -> str:
    """Description of an unexpected entry, for the message."""
    if stat.S_ISLNK(status.st_mode):
        return "a link"
    if stat.S_ISREG(status.st_mode):
        if status.st_nlink > 1:
            return "a file of several names"
        return "a file, not a folder" if _is_own_file(status) else f"a file of the user {status.st_uid}"
    return "neither an ordinary file nor a folder of a conversion"


def _not_own_error(path: Path, problem: str) -> HFEError:
    """The error (not raised) for a working folder that another program or user may have created."""
    return HFEError(f"{path.name} beside OUTPUT {problem}: it was not made by a conversion of yours", _NOT_OWN_REMEDY)


def _open_lock(folder: int, flags: int) -> TextIO:
    """Open the lock file in a working folder, given by its descriptor.

    Raises:
        FileNotFoundError: there is none, and `flags` do not create it.
        OSError: it is a symbolic link.
    """
    return os.fdopen(os.open(_LOCK, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=folder), "r+")


def _is_state(state: dict[str, Any]) -> bool:
    """Whether a state has the structure that `_save_state` writes."""
    shards: Any = state.get("shards")
    return (
        all(isinstance(state.get(key), dict) for key in ("options", "shards", "results"))
        and isinstance(state.get("complete"), bool)
        and all(
            name == Path(name).name
            and isinstance(file, dict)
            and set(file) == {"size", "sha256"}
            and is_whole(file["size"])
            and isinstance(file["sha256"], str)
            and re.fullmatch("[0-9a-f]{64}", file["sha256"]) is not None
            for name, file in shards.items()
        )
    )


def _lock_or_fail(lock: TextIO, output: Path) -> None:
    """Lock an open lock file until it is closed or the process ends; `HFEError` if another process has the lock."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HFEError(
            f"another process is converting to {output.name} now", "wait for it, or name another OUTPUT"
        ) from None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A text for each option of the `new` run that was different or missing in the `old` one."""
    return [f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in new if old.get(key) != new.get(key)]
