"""The working folder: one process at a time, resumed only with the same options, published by a rename."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_efficient.conversion.writing import workspace as workspace_module
from hf_efficient.conversion.writing.durable_files import DiskFullError, FinishedFile
from hf_efficient.conversion.writing.workspace import Workspace, check_output, partial_folder
from hf_efficient.errors import HFEError, UsageError


def open_workspace(output: Path, *, resume: bool = False, overwrite: bool = False, **options: object) -> Workspace:
    return Workspace(output, {"dtype": "float32", **options}, resume=resume, overwrite=overwrite)


def interrupted(output: Path, **options: object) -> None:
    """Leave a working folder with one finished and one unfinished file."""
    with pytest.raises(KeyboardInterrupt), open_workspace(output, **options) as workspace:
        (workspace.checkpoint / "done").write_text("done")
        workspace.record_shard("done", FinishedFile.of(workspace.checkpoint / "done"))
        workspace.record_result("choice", {"layers": [1]})
        (workspace.checkpoint / "half").write_text("half")
        raise KeyboardInterrupt


def test_publishing_leaves_only_the_output(tmp_path: Path) -> None:
    with open_workspace(tmp_path / "deep" / "out") as workspace:
        (workspace.checkpoint / "a").write_text("new")
        assert not (tmp_path / "deep" / "out").exists()
        workspace.publish()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "a").read_text() == "new"


def test_interruption_keeps_finished_work_for_resume(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    with open_workspace(tmp_path / "out", resume=True) as workspace:
        assert workspace.resumed and workspace.finished_shard("done") and not workspace.finished_shard("half")
        assert workspace.result("choice") == {"layers": [1]}
        assert [path.name for path in workspace.checkpoint.iterdir()] == ["done"]


def test_a_finished_file_that_was_changed_is_not_trusted(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    (partial_folder(tmp_path / "out") / "checkpoint" / "done").write_text("dome")
    with open_workspace(tmp_path / "out", resume=True) as workspace:
        assert not workspace.finished_shard("done")


def test_other_options_are_named(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", seed=0)
    with pytest.raises(HFEError, match="had other options: seed was 0, now 1; repeat the options") as error:
        open_workspace(tmp_path / "out", resume=True, seed=1).__enter__()
    assert error.value.exit_code == 1
    with open_workspace(tmp_path / "out", resume=True, seed=0) as workspace:
        assert workspace.resumed


def test_overwrite_starts_again(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    with open_workspace(tmp_path / "out", overwrite=True) as workspace:
        assert not workspace.resumed and list(workspace.checkpoint.iterdir()) == []


def test_an_error_in_the_data_removes_the_working_folder(tmp_path: Path) -> None:
    with pytest.raises(HFEError), open_workspace(tmp_path / "out"):
        raise HFEError("NaN")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [DiskFullError("full"), MemoryError(), OSError(5, "input/output error")])
def test_an_error_of_the_machine_can_be_resumed(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), open_workspace(tmp_path / "out") as workspace:
        workspace.record_result("choice", {"layers": [1]})
        raise error
    assert partial_folder(tmp_path / "out").is_dir() and not (tmp_path / "out").exists()


def test_resuming_without_a_state_file_starts_from_the_beginning(tmp_path: Path) -> None:
    partial_folder(tmp_path / "out").mkdir()
    with open_workspace(tmp_path / "out", resume=True) as workspace:
        assert not workspace.resumed


def test_too_little_space_is_an_error_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match=r"needs .* TB of disk"), open_workspace(tmp_path / "out") as workspace:
        workspace.check_space(10**18)
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from hf_efficient.conversion.writing.workspace import *; from hf_efficient.errors import *\n"
        "for step in (lambda o: check_output(o, o.parent / 'stock', resume=True, overwrite=True),\n"
        "             lambda o: Workspace(o, {}, resume=True, overwrite=True).__enter__()):\n"
        "    try: step(Path(sys.argv[1]))\n"
        "    except HFEError as error: print(error.exit_code, error)\n"
    )
    with open_workspace(tmp_path / "out"):
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "out"], capture_output=True, text=True, check=True
        )
    line = "1 another process is converting to out now; wait for it, or name another OUTPUT"
    assert done.stdout.splitlines() == [line, line]


@pytest.mark.parametrize("resume", [False, True])
def test_an_output_with_something_in_it_is_refused(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out", tmp_path / "stock", resume=resume, overwrite=False)
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(UsageError, match="exists and is not empty.*--overwrite") as error:
        check_output(tmp_path / "out", tmp_path / "stock", resume=resume, overwrite=False)
    assert error.value.exit_code == 2
    check_output(tmp_path / "out", tmp_path / "stock", resume=resume, overwrite=True)


def test_an_output_that_holds_the_source_is_refused(tmp_path: Path) -> None:
    stock = tmp_path / "models" / "stock"
    stock.mkdir(parents=True)
    (tmp_path / "link").symlink_to(stock)
    for output in (stock, tmp_path / "models", tmp_path / "link"):
        with pytest.raises(UsageError, match="is or holds the source stock; name another folder"):
            check_output(output, stock, resume=False, overwrite=True)
    check_output(stock / "inside", stock, resume=False, overwrite=False)


def test_an_error_after_resuming_keeps_the_earlier_work(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    with pytest.raises(HFEError), open_workspace(tmp_path / "out", resume=True):
        raise HFEError("the Hub cannot be reached")
    with open_workspace(tmp_path / "out", resume=True) as workspace:
        assert workspace.finished_shard("done")


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "out", tmp_path / "stock", resume=False, overwrite=True)
    with pytest.raises(UsageError, match="cannot be made in"):
        check_output(tmp_path / "out" / "deep" / "er", tmp_path / "stock", resume=False, overwrite=True)


def test_an_unfinished_conversion_names_both_ways_out(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    with pytest.raises(UsageError, match="continue it with --resume, or discard it with --overwrite"):
        check_output(tmp_path / "out", tmp_path / "stock", resume=False, overwrite=False)


class Killed(BaseException):
    """Simulates SIGKILL: nothing runs after it, not even the cleanup of the workspace."""


@pytest.mark.parametrize("renames_before_the_kill", [0, 1, 2])
@pytest.mark.parametrize("again", ["resume", "overwrite"])
def test_a_kill_while_publishing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames_before_the_kill: int, again: str
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    workspace = open_workspace(output, overwrite=True).__enter__()
    (workspace.checkpoint / "model").write_text("new")
    workspace.record_shard("model", FinishedFile.of(workspace.checkpoint / "model"))
    rename, done = workspace_module.os.rename, []

    def counted(*paths: Path) -> None:
        if len(done) == renames_before_the_kill:
            raise Killed
        done.append(rename(*paths))

    with monkeypatch.context() as patched:
        patched.setattr(workspace_module.os, "rename", counted)
        patched.setattr(workspace, "discard", lambda: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            workspace.publish()
    workspace._release()

    published = renames_before_the_kill == 2
    files = [path.name for folder in (output, partial_folder(output)) for path in folder.rglob("*") if path.is_file()]
    assert "model" in files and "old" in files
    check_output(output, tmp_path / "stock", resume=again == "resume", overwrite=True)
    with open_workspace(output, resume=again == "resume", overwrite=True) as workspace:
        assert workspace.published == (published and again == "resume")
        assert [path.name for path in output.iterdir()] == ["model" if published else "old"]
        if again == "resume" and not published:
            assert workspace.finished_shard("model")
            workspace.publish()
        else:
            workspace.discard()
    expected = "model" if published or again == "resume" else "old"
    assert [path.name for path in output.iterdir()] == [expected]
    assert not partial_folder(output).exists()


def test_the_state_is_written_atomically(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    state = partial_folder(tmp_path / "out") / "state.json"
    assert set(json.loads(state.read_text())["shards"]) == {"done"}
    state.write_text(state.read_text()[:-20])
    with open_workspace(tmp_path / "out", resume=True) as workspace:
        assert not workspace.resumed


# Working folders as another user could prepare them


PLANTED: dict[str, Callable[[Path], object]] = {
    "a link to the checkpoint": lambda p: (p / "checkpoint").symlink_to(p.parent / "home"),
    "a link to the old output": lambda p: (p / "replaced").symlink_to(p.parent / "home"),
    "a link for the lock": lambda p: (p / "lock").symlink_to(p.parent / "precious"),
    "a link for the state": lambda p: (p / "state.json").symlink_to(p.parent / "precious"),
    "a link for a temporary file": lambda p: (p / ".state.json.partial").symlink_to(p.parent / "precious"),
    "a second name for the lock": lambda p: os.link(p.parent / "precious", p / "lock"),
    "a pipe for the lock": lambda p: os.mkfifo(p / "lock"),
    "a folder for the state": lambda p: (p / "state.json").mkdir(),
    "a link in the checkpoint": lambda p: (
        (p / "checkpoint").mkdir(),
        (p / "checkpoint" / ".model.safetensors.partial").symlink_to(p.parent / "precious"),
    ),
    "a link deep in the checkpoint": lambda p: (
        (p / "checkpoint" / "custom_generate").mkdir(parents=True),
        (p / "checkpoint" / "custom_generate" / "more").symlink_to(p.parent / "home"),
    ),
    "a second name in the checkpoint": lambda p: (
        (p / "checkpoint").mkdir(),
        os.link(p.parent / "precious", p / "checkpoint" / "x"),
    ),
    "others may write": lambda p: p.chmod(0o777),
    "a group may write": lambda p: p.chmod(0o775),
    "the folder itself is a link": lambda p: (p.rmdir(), p.symlink_to(p.parent / "home")),
    "the folder itself is a dangling link": lambda p: (p.rmdir(), p.symlink_to(p.parent / "nowhere")),
    "the folder itself is a file": lambda p: (p.rmdir(), p.write_text("precious")),
    "the folder itself is a pipe": lambda p: (p.rmdir(), os.mkfifo(p)),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize(("resume", "overwrite"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_folder_prepared_by_another_user_is_refused_and_unchanged(
    tmp_path: Path, name: str, resume: bool, overwrite: bool
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "file").write_text("precious")
    (tmp_path / "precious").write_text("precious")
    partial = partial_folder(tmp_path / "out")
    partial.mkdir(mode=0o755)
    PLANTED[name](partial)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(HFEError, match="remove it by hand, or name another OUTPUT") as error:
        check_output(tmp_path / "out", tmp_path / "stock", resume=resume, overwrite=overwrite)
    assert "--overwrite" not in str(error.value) and "--resume" not in str(error.value)
    with pytest.raises(HFEError, match="remove it by hand, or name another OUTPUT"):
        open_workspace(tmp_path / "out", resume=resume, overwrite=overwrite).__enter__()
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "precious").read_text() == (tmp_path / "home" / "file").read_text() == "precious"


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path / "out")
    monkeypatch.setattr(workspace_module.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(HFEError, match=f"belongs to the user {os.getuid()}, not to you"):
        check_output(tmp_path / "out", tmp_path / "stock", resume=True, overwrite=True)


def test_links_in_the_old_output_are_not_followed(tmp_path: Path) -> None:
    """They are moved back or removed with it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "file").write_text("precious")
    interrupted(tmp_path / "out")
    replaced = partial_folder(tmp_path / "out") / "replaced"
    replaced.mkdir()
    (replaced / "link").symlink_to(tmp_path / "home")
    with open_workspace(tmp_path / "out", overwrite=True):
        assert (tmp_path / "out" / "link").is_symlink()
    assert (tmp_path / "home" / "file").read_text() == "precious"


def test_the_folder_is_private_and_the_output_is_not(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with open_workspace(tmp_path / "out") as workspace:
            assert workspace.folder.stat().st_mode & 0o777 == 0o700
            workspace.publish()
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    "change",
    [
        {"shards": {"../x": {"size": 1, "sha256": "0" * 64}}},
        {"shards": {"x": {"size": "1", "sha256": "0" * 64}}},
        {"shards": {"x": {"size": 1, "sha256": "0", "path": "/etc"}}},
        {"shards": []},
        {"results": None},
        {"options": "x"},
        {"complete": "yes"},
    ],
)
def test_a_state_of_another_structure_is_ignored(tmp_path: Path, change: dict[str, object]) -> None:
    """Even if its checksum is right: everything is computed again."""
    interrupted(tmp_path / "out")
    path = partial_folder(tmp_path / "out") / "state.json"
    state = {**json.loads(path.read_text()), **change}
    state.pop(workspace_module._CHECKSUM)
    path.write_text(json.dumps({**state, workspace_module._CHECKSUM: workspace_module._checksum(state)}))
    with open_workspace(tmp_path / "out", resume=True) as workspace:
        assert not workspace.resumed
