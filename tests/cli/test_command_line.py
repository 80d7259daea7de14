"""The command line: help, exit statuses, errors in one line, flags made from the patches."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_efficient.cli import main as command_line
from hf_efficient.cli.demo import source_model
from hf_efficient.cli.main import SUBCOMMANDS, run
from hf_efficient.cli.options import build_patches, patch_classes
from hf_efficient.data.topology_collator import mark_topology_trained
from hf_efficient.environment import TESTED_TORCH, TESTED_TRANSFORMERS
from hf_efficient.errors import HFEError, UsageError


def status_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        run(list(arguments))
    return left.value.code


@pytest.fixture(scope="module")
def converted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as STEM, made by the command line in a process of its own."""
    output = tmp_path_factory.mktemp("converted") / "tiny-stem"
    done = subprocess.run(
        [sys.executable, "-m", "hf_efficient.cli", "convert", str(tiny_llama), str(output), "--patch", "stem"]
        + ["--stem-layers", "1,3", "--calibration-tokens", "2048"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (output.parent / "stderr.txt").write_text(done.stderr, newline="")
    steps = [
        f'generate {output} "Hello"',
        f"evaluate {output} --reference {tiny_llama}",
        f"push {output} YOU/tiny-stem",
    ]
    shown = "".join(f"  hf-efficient {step}\n" for step in steps)
    assert done.stdout.endswith(f"{output} is complete. Next:\n{shown}")
    return output


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(name, "--help") == 0
    assert f"Example: hf-efficient {name}" in capsys.readouterr().out


def test_overview_lists_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in SUBCOMMANDS)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (HFEError("the file is torn", "fetch it again"), 1, "error: the file is torn; fetch it again"),
        (UsageError("3 is odd", "give an even number"), 2, "error: 3 is odd; give an even number"),
        (RuntimeError("two\nlines"), 1, "error (RuntimeError): two lines (--debug shows the traceback)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_statuses_and_errors_in_one_line(
    error: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(command_line, "app", fail)
    assert status_of("inspect", "x") == status
    assert capsys.readouterr().err == line + "\n"


def test_debug_shows_the_traceback_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("inspect", "/no/such.gguf", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "No such command"),
        (["convert", "source"], "Missing argument"),
        (["convert", "source", "out"], "no --patch"),
        (["convert", "source", "out", "--patch", "warp"], f"choose from {', '.join(patch_classes())}, none"),
        (["convert", "source", "out", "--patch", "none", "--stem-layers", "1"], "add --patch stem"),
        (["convert", "source", "out", "--patch", "stem", "--patch", "none"], "contradicts itself"),
        (["convert", "source", "out", "--patch", "stem", "--stem-layers", "one"], "stem"),
        (["convert", "source", "out", "--patch", "none", "--dtype", "int3"], "dtype"),
        (["convert", "source", "out", "--patch", "none", "--max-shard-size", "huge"], "huge"),
        (["convert", "source", "out", "--patch", "none", "--calibration-tokens", "0"], "calibration"),
        (["convert", "source", "out", "--patch", "stem", "--measure"], "requires dry_run=True (--dry-run)"),
        (["bench", "nothing"], "there is no benchmark"),
        (["generate", "model.gguf", "Hello"], "convert it first"),
    ],
)
def test_wrong_arguments_exit_with_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status_of(*arguments) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_existing_output_exits_with_2_and_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert status_of("convert", str(tiny_llama), str(tmp_path / "out"), "--patch", "none") == 2
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_every_field_of_every_patch_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    assert status_of("convert", "--help") == 0
    shown = capsys.readouterr().out
    for patch, cls in patch_classes().items():
        for field in dataclasses.fields(cls):
            assert f"--{patch}-{field.name.replace('_', '-')}" in shown
            assert field.metadata["help"], field.name


def test_flags_reach_the_patch() -> None:
    (stem,) = build_patches(["stem"], {"stem_layers": "1,4", "stem_sequential": True, "stem_init": None})
    assert (list(stem.layers), stem.sequential) == ([1, 4], True)


def test_converted_folder_is_inspected_verified_evaluated_and_run(
    converted: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of("inspect", str(converted), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model_type"], found["patches"]) == ("hfe_stem", ["stem"])
    assert found["patch_fields"] == {"STEM layers": [1, 3]}
    assert found["parameters"]["STEM tables"] == 2 * found["model"]["vocab_size"] * found["model"]["intermediate_size"]

    assert status_of("verify", str(converted)) == 0
    capsys.readouterr()

    reference = ["--reference", str(tiny_llama), "--tokens", "1024", "--json"]
    assert status_of("evaluate", str(converted), *reference) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured

    assert status_of("generate", str(converted), "Hello", "--max-new-tokens", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 3


def test_a_log_file_gets_a_few_plain_lines_and_nothing_else(converted: Path) -> None:
    log = (converted.parent / "stderr.txt").read_bytes().decode()
    assert "\r" not in log and "\x1b" not in log
    lines = log.splitlines()
    strange = [line for line in lines if not re.fullmatch(r" *\d+%  \d+:\d\d  [a-z ]+", line)]
    assert not strange
    stages = ["reading text", "choosing", "copying", "computing", "measuring", "finishing"]
    assert [line.split("  ")[-1] for line in lines][: len(stages)] == stages
    assert len(lines) <= len(stages) + 11
    assert lines[-1].startswith("100%")


def test_a_text_with_branches_keeps_its_tags(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    assert status_of("convert", str(tiny_llama), output, "--patch", "multiverse", "--no-evaluate") == 0
    shown = capsys.readouterr().out
    assert "12 token_ids, trained False" in shown and "'<Path>'" not in shown
    model = AutoModelForCausalLM.from_pretrained(output)
    mark_topology_trained(model)
    model.save_pretrained(output)
    prompt = "Q<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
    command = ["generate", output, prompt, "--no-chat", "--max-new-tokens", "90"]
    assert status_of(*command, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"].count("<Path>") >= 2 and "</Path>" in found["text"]
    assert found["parallelism"] > 1 and isinstance(found["warnings"], list)
    assert status_of(*command) == 0
    streamed = capsys.readouterr()
    assert "<Path>" in streamed.out and f"parallelism {found['parallelism']:.2f}" in streamed.err


def test_dry_run_shows_the_plan_and_writes_nothing(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "convert",
        str(tiny_llama),
        str(tmp_path / "out"),
        "--patch",
        "stem",
        "--stem-layers",
        "1",
        "--dry-run",
    ]
    assert status_of(*arguments) == 0
    shown = capsys.readouterr()
    assert "stem" in shown.out and not shown.err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_a_real_model_takes_seconds_whatever_is_to_be_measured(smollm_gguf: Path, tmp_path: Path) -> None:
    """With every choice that can be measured, in one command: four times the processor time of its imports at most.

    That is some ten seconds; measuring takes minutes. Processors differ in speed by more than a factor of two.
    """
    patches = ["--patch", "stem", "--patch", "bhyt", "--bhyt-second-site", "affine", "--patch", "medverse"]
    command = [sys.executable, "-m", "hf_efficient.cli", "convert", str(smollm_gguf), str(tmp_path / "out"), *patches]
    imports = [
        sys.executable,
        "-c",
        "import hf_efficient.convert_checkpoint; from transformers import LlamaForCausalLM",
    ]

    def timed(arguments: list[str]) -> tuple[float, subprocess.CompletedProcess[str]]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(arguments, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (done.returncode, done.stderr) == (0, "")
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done

    of_imports = timed(imports)[0]
    seconds, done = timed([*command, "--dry-run", "--json"])
    assert seconds <= 4 * of_imports
    report = json.loads(done.stdout)
    assert report["calibration"] is None
    stem, bhyt, _ = report["patches"]
    assert stem["to_measure"] == {"stem_layers": "10 layers"} and "stem_layers" not in stem["choices"]
    assert bhyt["to_measure"]["bhyt_exact_layers"].startswith("2 to 30 layers, 0 and 1 among them")


def test_verify_exits_with_1_when_a_byte_changed(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = shutil.copytree(converted, tmp_path / "copy")
    code = copy / "modeling_stem.py"
    code.write_text(code.read_text() + "#")
    assert status_of("verify", str(copy)) == 1
    assert "modeling_stem.py" in capsys.readouterr().out


def test_env_tells_versions_and_why_a_backend_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("env", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] and "stem_gate" in found["kernels"]
    assert found["tested"]["transformers"] == dict(zip(("oldest", "newest"), TESTED_TRANSFORMERS, strict=True))
    assert status_of("env") == 0
    assert f"Tested up to transformers {TESTED_TRANSFORMERS[1]} / torch {TESTED_TORCH[1]}" in capsys.readouterr().out


def test_the_demos_source_is_the_stock_model(tiny_llama: Path) -> None:
    model, stock = source_model(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    assert type(model) is type(stock)
    ids = torch.randint(256, (1, 9))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_of_other_libraries_are_for_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(command_line, "disable_progress_bar", lambda: calls.append(True))
    monkeypatch.setattr(command_line, "app", lambda *_, **__: 0)
    monkeypatch.setattr(command_line.sys, "stderr", type("Stream", (), {"isatty": lambda self: terminal})())
    assert status_of("env") == 0
    assert bool(calls) is not terminal


def test_export_writes_the_code_again_and_renews_the_card(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "model"))
    (folder / "modeling_stem.py").write_text("# of another release\n")
    (folder / "README.md").unlink()
    assert status_of("export", str(folder)) == 0
    oldest, newest = TESTED_TRANSFORMERS
    assert f"tested with transformers {oldest} to {newest}" in capsys.readouterr().out
    assert not (folder / "README.md").exists()  # a folder without a card gets none
    shutil.copy(converted / "README.md", folder)
    assert status_of("export", str(folder), "--json") == 0
    assert "modeling_stem.py" in json.loads(capsys.readouterr().out)["files"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in converted.iterdir()
    }
    assert status_of("export", str(tmp_path)) == 1
    assert "has no config.json" in capsys.readouterr().err
