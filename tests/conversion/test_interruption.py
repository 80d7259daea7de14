"""An interrupted conversion is resumed without repeating finished work, and gives the same bytes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hf_efficient.conversion.reading.source import SafetensorsReader
from hf_efficient.conversion.writing import checkpoint_writer
from hf_efficient.conversion.writing.durable_files import DiskFullError
from hf_efficient.conversion.writing.workspace import partial_folder
from hf_efficient.convert_checkpoint import convert
from hf_efficient.errors import HFEError

QUIET: dict[str, Any] = {"evaluate": False, "progress": False, "max_shard_size": "20KB"}
Hashes = Callable[[Path], dict[str, str]]


@pytest.fixture
def stock(stock_folder: Callable[..., Path]) -> Path:
    return stock_folder("llama")


def test_resuming_continues_after_the_finished_shards(
    stock: Path, tmp_path: Path, tables: Any, folder_hashes: Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(stock, tmp_path / "whole", [tables], **QUIET)

    def interrupt(name: str) -> None:
        if "layers.2" in name:
            raise KeyboardInterrupt

    first = type(tables)()
    first.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        convert(stock, tmp_path / "out", [first], **QUIET)
    assert not (tmp_path / "out").exists()

    read: list[str] = []
    read_tensor = SafetensorsReader.read

    def noted(reader: SafetensorsReader, name: str) -> Any:
        read.append(name)
        return read_tensor(reader, name)

    monkeypatch.setattr(SafetensorsReader, "read", noted)
    second = type(tables)()
    report = convert(stock, tmp_path / "out", [second], resume=True, **QUIET)
    # All copied tensors are in finished shards except those in the shard of the first computed one.
    assert len(read) < 5 and second.choices == 0
    assert first.made == ["model.layers.1.mlp.stem_embed.weight"] and len(second.made) == 2
    assert folder_hashes(tmp_path / "out") == folder_hashes(tmp_path / "whole")
    assert report.patches[0]["measured"] == {"tables": 2}


def test_a_finished_patch_is_not_computed_again(
    stock: Path, tmp_path: Path, tables: Any, folder_hashes: Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(stock, tmp_path / "whole", [tables], **QUIET)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_writer, "index_text", lambda shards: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(stock, tmp_path / "out", [type(tables)()], **QUIET)
    second = type(tables)()
    report = convert(stock, tmp_path / "out", [second], resume=True, **QUIET)
    assert second.made == [] and report.patches[0]["measured"] == {"tables": 2}
    assert folder_hashes(tmp_path / "out") == folder_hashes(tmp_path / "whole")


def test_a_changed_source_is_not_continued(stock: Path, tmp_path: Path, tables: Any) -> None:
    tables.before = lambda name: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(stock, tmp_path / "out", [tables], **QUIET)
    os.utime(stock / "model.safetensors", (1, 1))
    with pytest.raises(HFEError, match="had other options: source files changed at"):
        convert(stock, tmp_path / "out", [type(tables)()], resume=True, **QUIET)


def test_other_patch_options_are_not_continued(stock: Path, tmp_path: Path, tables: Any) -> None:
    tables.before = lambda name: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(stock, tmp_path / "out", [tables], **QUIET)
    with pytest.raises(HFEError, match=r"had other options: patches was .*\[1, 2\].*, now .*\[1\]"):
        convert(stock, tmp_path / "out", [type(tables)(layers=[1])], resume=True, **QUIET)


def test_a_full_disk_can_be_resumed(stock: Path, tmp_path: Path, folder_hashes: Hashes) -> None:
    convert(stock, tmp_path / "whole", evaluate=False, progress=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(DiskFullError, match="a limit on file size is reached .*repeat the command with --resume"):
            convert(stock, tmp_path / "out", evaluate=False, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
    convert(stock, tmp_path / "out", evaluate=False, resume=True, progress=False)
    assert folder_hashes(tmp_path / "out") == folder_hashes(tmp_path / "whole")


def test_ctrl_c_exits_with_130_and_can_be_resumed(stock: Path, tmp_path: Path, folder_hashes: Hashes) -> None:
    script = (
        "import signal, sys, time\n"
        "from hf_efficient.cli.main import run\n"
        "from hf_efficient.conversion.writing import checkpoint_writer as convert\n"
        # A shell that starts the tests in the background has SIGINT ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        # Sent to this thread, with time to arrive: a signal to the process may be handled by another thread.
        "convert.index_text = lambda shards: (signal.raise_signal(signal.SIGINT), time.sleep(60))\n"
        "run(['convert', *sys.argv[1:], '--patch', 'none', '--no-evaluate', '--max-shard-size', '20KB', '--json'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, stock, tmp_path / "out"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    convert(stock, tmp_path / "out", resume=True, **QUIET)
    convert(stock, tmp_path / "whole", **QUIET)
    assert folder_hashes(tmp_path / "out") == folder_hashes(tmp_path / "whole")


# A process that has imported everything and forks a child for each conversion, since the imports alone take seconds.
_SERVER = """
import importlib.util, os, sys
import torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("tiny", sys.argv[1])
tiny = sys.modules["tiny"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
from hf_efficient.convert_checkpoint import convert

def run(source, output, resume, overwrite):
    convert(source, output, [tiny.RandomTables()], evaluate=False, progress=False, max_shard_size="20KB",
            resume=bool(resume), overwrite=bool(overwrite))

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            run(*line.rstrip().split(":"))
            os._exit(0)
        finally:
            os._exit(1)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class ConversionServer:
    """Runs conversions in child processes, which can be killed."""

    def __init__(self) -> None:
        tiny = str(Path(__file__).with_name("conftest.py"))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, tiny],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Of the tests, since the fixtures import shapes from there.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def convert(
        self, source: Path, output: Path, *, resume: bool = False, overwrite: bool = False, seconds: float | None = None
    ) -> int:
        """Convert, and kill the process after `seconds`; returns its wait status, 0 for success."""
        assert self._process.stdin and self._process.stdout
        flags = ":".join("yes" if flag else "" for flag in (resume, overwrite))
        self._process.stdin.write(f"{source}:{output}:{flags}\n")
        self._process.stdin.flush()
        child = int(self._process.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def server() -> Iterator[ConversionServer]:
    server = ConversionServer()
    yield server
    server.close()


def test_sigkill_at_random_moments(
    server: ConversionServer, stock: Path, tmp_path: Path, folder_hashes: Hashes
) -> None:
    """At any moment OUTPUT is the old or the complete new one; resuming gives the bytes of an uninterrupted run."""
    output, old = tmp_path / "out", {"mine": "precious"}
    assert server.convert(stock, tmp_path / "whole") == 0
    started = time.perf_counter()
    assert server.convert(stock, tmp_path / "whole", overwrite=True) == 0
    duration = time.perf_counter() - started
    expected = folder_hashes(tmp_path / "whole")

    chance = random.Random(0)
    kills = 0
    for attempt in range(16):
        # Every other time there is an old OUTPUT to replace.
        replaces = attempt % 2 == 1
        shutil.rmtree(output, ignore_errors=True)
        if replaces:
            output.mkdir()
            (output / "mine").write_text(old["mine"])
        status = server.convert(stock, output, overwrite=replaces, seconds=chance.uniform(0.1, 1.05) * duration)
        kills += status == signal.SIGKILL
        partial = partial_folder(output)
        found = {path.name: path.read_text() for path in output.iterdir()} if (output / "mine").exists() else None
        if found is not None:
            assert replaces and found == old
        elif output.exists():
            assert folder_hashes(output) == expected
        else:
            assert partial.is_dir() or status == signal.SIGKILL
            assert not replaces or (partial / "replaced" / "mine").read_text() == old["mine"]
        # Nothing in the working folder can be loaded as a checkpoint.
        assert not (partial / "config.json").exists()
        if status == signal.SIGKILL and partial.exists():
            assert server.convert(stock, output, resume=True, overwrite=replaces) == 0
            assert folder_hashes(output) == expected
        assert not partial.exists()
    assert kills >= 5, f"only {kills} of 16 kills met a running conversion"
