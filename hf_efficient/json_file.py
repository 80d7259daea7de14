"""Reads the JSON files of a checkpoint within limits: every returned value can be traversed and written again.

All packages and the exported code use this module, so it imports only the standard library.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_efficient.errors import HFEError, error_text

# Default limit: Python objects need several times the bytes of their JSON. An index of 100,000 tensors has 10 MB.
MAX_JSON_BYTES = 1 << 24
# Vocabularies with their merges are larger than any other file.
MAX_TOKENIZER_BYTES = 1 << 27
_MAX_DEPTH = 64
_MAX_DIGITS = 64
_DAMAGED = "download it again"


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """Context: yields the regular file `path`, opened for unbuffered reading in binary mode.

    Raises:
        HFEError: it is not a regular file, or it cannot be opened or read inside the context.
    """
    try:
        # Checked before it is opened, since opening a pipe would block.
        if not stat.S_ISREG(path.stat().st_mode):
            raise HFEError(f"{path.name} is not an ordinary file", "replace it by a copy of the file")
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise HFEError(f"{path.name} cannot be read: {error.strerror}", "check the file and its permissions") from error


def read_bytes_of(path: Path, limit: int) -> bytes:
    """The content of a regular file; `HFEError` if it cannot be read or is larger than `limit` bytes."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise HFEError(f"{path.name} has {size} bytes; such a file may have at most {limit}", _DAMAGED)
        return file.read(size)


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        HFEError: the file cannot be read, is larger than `limit` bytes, or `parse_json` rejects its content.
    """
    return parse_json(path.name, read_bytes_of(path, limit))


def parse_json(name: str, data: bytes) -> dict[str, Any]:
    """Parse `data`, the content of the file `name`, as a JSON object.

    Raises:
        HFEError: `data` is not a JSON object in UTF-8, has NaN, infinity, a float that overflows, an integer of more
            than 64 characters, a key twice in an object, a text with a lone surrogate, or more than 64 levels of
            nesting.
    """
    value = _parse(name, data)
    if not isinstance(value, dict):
        raise HFEError(f"{name} holds a {type(value).__name__}, not an object", _DAMAGED)
    return value


def parse_json_list(name: str, data: bytes) -> list[Any]:
    """As `parse_json`, for a file that holds a list."""
    value = _parse(name, data)
    if not isinstance(value, list):
        raise HFEError(f"{name} holds a {type(value).__name__}, not a list", _DAMAGED)
    return value


def _parse(name: str, data: bytes) -> Any:
    """The value in `data`, with the errors of `parse_json` but for the kind of value."""
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_object,
            parse_constant=_reject_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except (ValueError, RecursionError) as error:
        cause = "it is nested too deeply" if isinstance(error, RecursionError) else error_text(error)
        raise HFEError(f"{name} cannot be read as JSON ({cause})", _DAMAGED) from error
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        level = [child for item in level for child in _children(item) if isinstance(child, dict | list)]
        if not level:
            break
    else:
        raise HFEError(f"{name} cannot be read as JSON (it is nested more than {_MAX_DEPTH} deep)", _DAMAGED)
    # A lone surrogate can only come from an escape: bytes that are UTF-8 hold none.
    if b"\\u" in data:
        bad = next((text for text in _texts(value) if not _can_be_encoded(text)), None)
        if bad is not None:
            raise HFEError(f"{name} holds the text {bad[:80]!r}, half of a character", _DAMAGED)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook`: the object as a dict; `ValueError` if a key occurs twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} comes twice in one object")
    return result


def _reject_constant(text: str) -> Any:
    """`parse_constant`: raise `ValueError` for NaN and infinity."""
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    """`parse_float`: the number; `ValueError` if it overflows."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:80]} is out of range")
    return number


def _whole(text: str) -> int:
    """`parse_int`: the number; `ValueError` if it has more than `_MAX_DIGITS` digits."""
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"the number {text[:20]}… has {len(text)} digits")
    return int(text)


def _children(item: Any) -> Any:
    """The values of a dict, or the items of a list."""
    return item.values() if isinstance(item, dict) else item


def _texts(value: Any) -> Iterator[str]:
    """Every key and text in a parsed value."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            yield from item
            pending += item.values()
        elif isinstance(item, list):
            pending += item


def _can_be_encoded(text: str) -> bool:
    """False for text with a lone surrogate, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def finite_or_null(value: Any) -> Any:
    """A copy of a value of dicts, lists, tuples (as lists) and plain values, with None for NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_whole(value: Any, minimum: int = 0, maximum: int = (1 << 63) - 1) -> bool:
    """True for an int between two bounds, both included; False for a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def is_file_name(value: Any) -> bool:
    """True for a printable string of 1 to 1,024 characters whose parts between slashes have at most 255 bytes.

    The path may be absolute or contain `..`, and need not exist: a caller that opens it must check that it is inside
    the checkpoint's folder.
    """
    if not isinstance(value, str) or not value.isprintable():
        return False
    return 0 < len(value) <= 1024 and all(len(part.encode()) <= 255 for part in value.split("/"))


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint.

    Raises:
        HFEError: the index cannot be read, has no `weight_map`, or maps a tensor to something that is no file name.
    """
    file_of = read_json(path).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise HFEError(f"{path.name} has no weight_map", _DAMAGED)
    wrong = next((name for name, file in file_of.items() if not is_file_name(file)), None)
    if wrong is not None:
        raise HFEError(
            f"{path.name} gives the tensor {wrong[:80]!r} the file {str(file_of[wrong])[:80]!r}, which is no file name",
            "do not use this checkpoint, or correct its index",
        )
    return file_of
