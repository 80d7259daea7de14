"""A fuzzing run: `python -m pytest tests/fuzz --fuzz-seconds 60 --fuzz-seed 1`.

Bytes and values of valid files are changed at random, by a seed, and each reader reads the changed files within limits
of time and memory. It may raise only `HFEError`, and may leave no file. An input that breaks a rule is shrunk and shown
with the command that repeats it. An ordinary run of the tests tries a few inputs of each kind.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from hf_efficient.errors import HFEError

# Inputs of each kind in an ordinary run of all tests.
ORDINARY_INPUTS = 12
SECONDS = 20.0
# Memory allowed beyond six times the size of the files, for libraries that are used for the first time.
MEMORY_FACTOR, MEMORY_CONSTANT = 6, 512 << 20
_BATCH = 50

# Values that replace others: wrong types, ends of ranges, names that lead elsewhere, unprintable texts.
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1 << 31, 1 << 63, -(1 << 63), 1 << 70, 10**30),
    *(0.0, -0.0, 0.5, 1e-300, 1e300, [], [[]], [0], [-1], [1 << 40], ["a"], [None], [0.5, "x", None]),
    *("", "a", "0", "default", "llama", "auto", "../x", "/etc/passwd", "a\0b", "a\nb", "\x1b[2J", "é" * 300, "{{"),
    *("none", "mrope", "linear", "silu", "snake", "F64", "I8", "float16", "nn", "bhyt", "bhytstar", "rms", "approx"),
    *({}, {"a": 1}, {"": {}}, {"rope_type": "yarn"}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
]
# What is not JSON, or is read differently by different parsers.
ODD_TEXTS = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, r'"\ud800"', "[" * 500 + "]" * 500, '{"a":1,"a":2}']


def odd_values() -> st.SearchStrategy[Any]:
    """A copy of the odd values, since the changes may alter them in turn."""
    return st.sampled_from(ODD_VALUES).map(copy.deepcopy)


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with a few bytes replaced, removed, inserted, repeated or cut off, mostly near the beginning."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        near = draw(st.booleans())
        end = min(len(changed), 512) if near else len(changed)
        at = draw(st.integers(0, max(end - 1, 0)))
        kind = draw(st.sampled_from(("flip", "set", "insert", "delete", "cut", "repeat", "number")))
        if kind == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            changed[at : at + 1] = bytes([draw(st.sampled_from((0, 1, 9, 34, 44, 93, 123, 125, 127, 128, 255)))])
        elif kind == "insert":
            changed[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del changed[at : at + draw(st.integers(1, 16))]
        elif kind == "cut":
            del changed[at:]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + draw(st.integers(1, 64))]
        else:
            number = draw(st.sampled_from((0, 1, 2, 0x7F, 0xFF, 0xFFFF, 0xFFFFFFFF, 1 << 31, 1 << 40, (1 << 63) - 1)))
            width = draw(st.sampled_from((1, 2, 4, 8)))
            changed[at : at + width] = (number & ((1 << (8 * width)) - 1)).to_bytes(width, "little")
    return bytes(changed)


@st.composite
def changed_json(draw: st.DrawFn, value: dict[str, Any], extra_keys: tuple[str, ...] = ()) -> bytes:
    """The JSON of `value` with a few entries changed, renamed or removed; sometimes not JSON at all."""
    changed = copy.deepcopy(value)
    marks: dict[str, str] = {}
    for _ in range(draw(st.integers(1, 3))):
        here: Any = changed
        while True:
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            inner = [key for key in keys if isinstance(here[key], dict | list) and here[key]]
            if not inner or draw(st.integers(0, 2)) == 0:
                break
            here = here[draw(st.sampled_from(inner))]
        key = draw(st.sampled_from(keys)) if keys else None
        kind = draw(st.sampled_from(("value", "value", "value", "text", "drop", "rename", "extra")))
        if isinstance(here, dict) and (kind == "extra" or key is None):
            here[draw(st.sampled_from((*extra_keys, "to_dict", "__class__", "a", "_x")))] = draw(odd_values())
        elif key is None or kind == "drop":
            if key is not None:
                del here[key]
        elif kind == "rename" and isinstance(here, dict):
            here[draw(st.sampled_from(("", "a\0b", "../x", "é", key + "x")))] = here.pop(key)
        elif kind == "text":
            mark = f"@odd{len(marks)}@"
            marks[mark] = draw(st.sampled_from(ODD_TEXTS))
            here[key] = mark
        else:
            here[key] = draw(odd_values() | st.integers() | st.floats(allow_nan=False, allow_infinity=False, width=32))
    text = json.dumps(changed)
    for mark, odd in marks.items():
        text = text.replace(f'"{mark}"', odd)
    return text.encode()


def changed_file(data: bytes, extra_keys: tuple[str, ...] = ()) -> st.SearchStrategy[bytes]:
    """Changes of a file's bytes and, if it holds a JSON object, of its values."""
    try:
        value = json.loads(data)
    except ValueError:
        return changed_bytes(data)
    if not isinstance(value, dict):
        return changed_bytes(data)
    return changed_json(value, extra_keys) | changed_json(value, extra_keys) | changed_bytes(data)


_written: list[str] = []
_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Records every path that Python opens for writing, creates, renames or removes."""
    if not _watching:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if isinstance(path, str | bytes | os.PathLike) and writes:
            _written.append(os.fsdecode(path))
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.symlink", "os.rename", "os.link"):
        _written.extend(os.fsdecode(p) for p in arguments[:2] if isinstance(p, str | bytes | os.PathLike))


sys.addaudithook(_watch)


@contextmanager
def bounds(size: int) -> Iterator[None]:
    """Context in which the process may use at most six times `size` bytes and a constant more memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MEMORY_FACTOR * size + MEMORY_CONSTANT
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Inputs:
    """A folder with a subfolder for each input, and the rules that every input must obey."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tried = self.refused = 0
        self.slowest = 0.0
        self.failed = False

    def run(self, reads: Reads, folder: Path, size: int) -> None:
        """Call `reads` on `folder`: it may raise only `HFEError`, and may leave no file."""
        global _watching
        before = _entries(self.folder)
        _written.clear()
        self.tried += 1
        self.failed = True  # replaced at the end of this function
        # Processor time, since the machine may be busy.
        start = time.process_time()
        _watching = True
        try:
            with bounds(size):
                reads(folder)
        except HFEError as error:
            assert "\n" not in str(error) and len(str(error)) < 4000, f"not one line: {str(error)[:400]!r}"
            cause = error.__cause__
            assert not isinstance(cause, MemoryError) and "allocate" not in str(cause), f"too much memory: {cause}"
            self.refused += 1
        finally:
            _watching = False
        seconds = time.process_time() - start
        self.slowest = max(self.slowest, seconds)
        assert seconds < SECONDS, f"took {seconds:.1f} s"
        places = (str(self.folder), os.devnull)
        # Temporary files were removed by now.
        outside = [path for path in _written if os.path.lexists(path) and not os.path.abspath(path).startswith(places)]
        assert not outside, f"wrote outside of its folder: {outside[:3]}"
        assert _entries(self.folder) == before, f"left behind: {sorted(_entries(self.folder) ^ before)[:3]}"
        self.failed = False


def _entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


Reads = Callable[[Path], Any]
Fuzz = Callable[..., None]


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    """`fuzz(kind, reads, valid, names, …)`: change one file of a folder after another and call `reads` on it."""
    option = request.config.getoption
    first = option("--fuzz-seed", 0)
    kinds = sum("fuzz" in getattr(item, "fixturenames", ()) for item in request.session.items)
    seconds = None if option("--fuzz-seconds", None) is None else option("--fuzz-seconds") / max(kinds, 1)
    count = option("--fuzz-inputs", None) or ORDINARY_INPUTS

    def run(
        kind: str,
        reads: Reads,
        valid: Path,
        names: list[str],
        extra_keys: tuple[str, ...] = (),
        more: dict[str, st.SearchStrategy[bytes]] | None = None,
        shrink: bool = True,
    ) -> None:
        """See `fuzz`.

        Args:
            kind: name in the count of inputs.
            reads: called with the folder, which it must leave unchanged.
            valid: a folder that `reads` accepts.
            names: the files to change.
            extra_keys: keys that are inserted into JSON.
            more: file -> a strategy of other contents than changes of its own.
            shrink: search for the smallest failing input, which calls `reads` many times.
        """
        inputs = Inputs(valid.parent)
        # So that a file written under a relative name is found too.
        request.getfixturevalue("monkeypatch").chdir(valid.parent)
        reads(valid)  # the unchanged files must be accepted
        originals = {name: (valid / name).read_bytes() for name in {*names, *(more or {})}}
        size = sum(path.stat().st_size for path in valid.rglob("*") if path.is_file())
        choices = [(name, changed_file(originals[name], extra_keys)) for name in names]
        choices += list((more or {}).items())
        stop = None if seconds is None else time.monotonic() + seconds
        left, number = count, 0
        while left > 0 if stop is None else time.monotonic() < stop:
            batch = _BATCH if stop is not None else min(_BATCH, left)

            @seed(first * 1_000_003 + number)
            @settings(
                max_examples=batch,
                database=None,
                deadline=None,
                phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
                suppress_health_check=list(HealthCheck),
            )
            @given(st.data())
            def one_round(data: st.DataObject) -> None:
                name, contents = choices[data.draw(st.integers(0, len(choices) - 1), label="file")]
                content = data.draw(contents, label=f"content of {name}")
                # Not before: every call must draw the same inputs, and shrinking a failure is not limited in time.
                if stop is not None and time.monotonic() > stop and not inputs.failed:
                    return
                path = valid / name
                try:
                    path.write_bytes(content)
                    inputs.run(reads, valid, size + len(content))
                finally:
                    path.write_bytes(originals[name])

            try:
                one_round()
            except BaseException:
                again = f"-k {kind} --fuzz-seed {first} --fuzz-inputs {_BATCH * (number + 1)}"
                print(f"try it again: python -m pytest tests/fuzz {again}", file=sys.stderr)  # noqa: T201
                raise
            number += 1
            left -= batch
        request.node.user_properties.append((kind, (inputs.tried, inputs.refused, round(inputs.slowest, 2))))

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=None, help="seconds to fuzz, shared by all kinds of input")
    parser.addoption("--fuzz-inputs", type=int, default=None, help="inputs of each kind, instead of a time")
    parser.addoption("--fuzz-seed", type=int, default=0, help="seed of the inputs; the same seed gives the same ones")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = [value for report in terminalreporter.getreports("passed") for value in report.user_properties]
    for kind, (tried, refused, slowest) in counts:
        terminalreporter.write_line(
            f"fuzz: {kind:<22} {tried:>6} inputs, {refused:>6} refused, slowest {slowest:.2f} s"
        )
    if counts:
        terminalreporter.write_line(f"fuzz: {sum(tried for _, (tried, _, _) in counts)} inputs in all")
