"""Checks that the output folder of a conversion can be replaced by a rename."""

from __future__ import annotations

import os
from pathlib import Path

from hf_efficient.conversion.writing.workspace import partial_folder
from hf_efficient.errors import UsageError

_NAME_MAX = 255


def resolve_output(output: str | Path) -> Path:
    """The absolute path of OUTPUT; if it is a symbolic link, the path that it points to. Creates nothing.

    The finished folder is renamed to OUTPUT, and a rename cannot replace every kind of folder.

    Raises:
        UsageError: OUTPUT is empty text, a mount point, the current folder or a parent of it, or a cycle of links, or
            its name is too long or has a NUL character.
    """
    if not str(output):
        raise UsageError("OUTPUT is empty", "name a folder that does not exist yet")
    if "\0" in str(output):
        raise UsageError(f"OUTPUT {str(output)!r} holds a NUL character", "name another folder")
    given = Path(os.path.abspath(Path(output).expanduser()))
    path = Path(os.path.realpath(given)) if given.is_symlink() else given
    if path.is_symlink():  # as far as realpath gets
        raise UsageError(f"OUTPUT {given} is a link that leads back to itself", "name another folder")
    if os.path.ismount(path):
        raise UsageError(
            f"OUTPUT {given} is a mount point, which cannot be replaced by the finished folder",
            f"name a folder in it: {given / 'model'}",
        )
    if len(os.fsencode(partial_folder(path).name)) > _NAME_MAX:
        raise UsageError(f"the name of OUTPUT, {path.name[:40]}…, is too long", "name a folder of a shorter name")
    if Path(os.path.realpath(os.curdir)).is_relative_to(os.path.realpath(path)):
        raise UsageError(
            f"OUTPUT {given} is or holds the current folder, so it cannot be replaced by the finished folder",
            "name a folder in the current one, or call the command from elsewhere",
        )
    return path
