"""Any fault of arguments or data is one line on standard error, without a traceback and without a token."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_efficient.cli.main import run
from hf_efficient.conversion.reading import tensor_file
from hf_efficient.conversion.reading.hub_files import checked_token
from hf_efficient.errors import HFEError, UsageError, hide_secret, redact

LONG = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`fails(status, *arguments)`: the one line that a command prints when it ends with this status."""

    def run_it(status: int, *arguments: str) -> str:
        with pytest.raises(SystemExit) as left:
            run([str(argument) for argument in arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
        assert left.value.code == status, lines
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return run_it


@pytest.mark.parametrize("command", ["inspect", "evaluate", "generate", "convert", "verify", "push"])
@pytest.mark.parametrize("place", ["nowhere/at/all", "nobody/nothing", "a file", "an empty folder"])
def test_a_place_without_a_checkpoint(command: str, place: str, tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "a file").write_text("x")
    (tmp_path / "an empty folder").mkdir()
    known = place.startswith("a")
    given = str(tmp_path / place) if known else place
    rest = {
        "generate": ["Hello"],
        "convert": [tmp_path / "out", "--patch", "none"],
        "push": ["somebody/model"],
    }.get(command, [])
    usage = (command, place) in {("verify", "a file"), ("generate", "a file"), ("verify", "nowhere/at/all")}
    status = 2 if usage or (command == "push" and place != "an empty folder") else 1
    if (command, place) == ("verify", "an empty folder"):
        return  # the faults of a folder are in a report, not an error
    line = fails(status, command, given, *rest)
    assert place.rpartition("/")[2] in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "FOLDER", ""], "the prompt '' gives no token"),
        (["generate", "FOLDER", "Hello", "--chat"], "has no chat template; leave out --chat"),
    ],
)
def test_a_prompt_that_the_model_cannot_take(
    arguments: list[str], words: str, tiny_llama: Path, fails: Callable[..., str]
) -> None:
    assert words in fails(1, *[str(tiny_llama) if a == "FOLDER" else a for a in arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x/y", "Hello", "--dtype", "foo"], "dtype='foo' is not known; choose auto"),
        (["generate", "x/y", "Hello", "--device", "toaster"], "device='toaster' cannot be used here"),
        (["generate", "x/y", "Hello", "--device", "meta"], "device='meta' cannot be used here"),
        (["generate", "x/y", "Hello", "--max-new-tokens", "0"], "must be at least 1"),
        (["generate", "x/y", "Hello", "--sample", "--temperature", "0"], "must be a positive number"),
        (["generate", "x/y", "Hello", "--temperature", "0.5"], "add --sample"),
        (["generate", "x/y", "Hello", "--seed", str(1 << 70)], "64 bits"),
        (["convert", "x/y", "out", "--patch", "none", "--seed", str(1 << 70)], "64 bits"),
        (["evaluate", "x/y", "--device", "toaster"], "device='toaster' cannot be used here"),
        (["evaluate", "x/y", "--tokens", "1"], "at least 2"),
        (["evaluate", "x/y", "--tokens", "many"], "'--tokens'"),
        (["env", "--loud"], "--loud"),
        (["inspect"], "(see hf-efficient inspect --help)"),
        (["push", "only-one"], "Missing argument"),
        (["convert", "x/y", "out", "--patch", "none", "--token", "hf_abc\n"], "the Hub token is empty or holds"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in fails(2, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", b"{", "no tokenizer that can be loaded"),
        (
            "tokenizer.json",
            b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}',
            "tokenizer",
        ),
        ("config.json", b"\xff", "config.json cannot be read as JSON"),
        ("config.json", b'{"model_type": "llama", "hidden_act": "snake"}', "cannot be loaded"),
        ("model.safetensors", b"not a tensor", "cannot be loaded"),
    ],
)
def test_a_damaged_checkpoint_is_no_reason_for_a_traceback(
    name: str, content: bytes, words: str, tiny_llama: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (folder / name).write_bytes(content)
    assert words in fails(1, "generate", folder, "Hello")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.jsonl", b"", "holds 0 document"),
        ("text.jsonl", b'{"text": "\\ud800"}\n{"text": "b"}\n', "line 1 of text.jsonl"),
        ("text.jsonl", b'{"text": ' + b"[" * 100_000, "line 1 of text.jsonl"),
        ("text.jsonl", b'["text"]\n', "line 1 of text.jsonl"),
        ("text.txt", "schön\n\ngut".encode("latin-1"), "text.txt is not UTF-8"),
        ("text.csv", b"a,b", "neither .jsonl nor .txt"),
    ],
)
def test_a_text_that_cannot_be_used(
    name: str, content: bytes, words: str, tiny_llama: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in fails(1, "evaluate", tiny_llama, "--text", tmp_path / name)
    convert = ["convert", tiny_llama, tmp_path / "out", "--patch", "none", "--calibration", tmp_path / name]
    assert words in fails(1, *convert)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_a_line_separator_inside_a_text_does_not_end_its_line(tmp_path: Path) -> None:
    from hf_efficient.conversion.measuring.text import load_text

    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("a\u2028b", "c")]
    (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    fit, held_out = load_text(str(tmp_path / "text.jsonl"))
    assert [*fit.documents, *held_out.documents] == ["a\u2028b", "c"]


def test_a_file_that_may_not_be_read(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(tensor_file.Path, "open", refuse)
    assert "cannot be read: Permission denied" in fails(1, "inspect", tiny_llama)


def test_a_name_that_no_terminal_shows(fails: Callable[..., str]) -> None:
    line = fails(1, "inspect", "./\x1b[2J" + os.fsdecode(b"\xff") + "\n")
    assert line.isascii() and r"\x1b[2J" in line


def test_a_file_system_that_refuses_is_one_line(fails: Callable[..., str]) -> None:
    assert "File name too long" in fails(1, "inspect", "./" + "n" * 5000)


@pytest.mark.parametrize("end", ["", "\n", " ", "\r", "é", "-", "=", "\x00", "\ud800", "'"])
def test_a_token_is_in_no_error_whatever_its_last_character(end: str, fails: Callable[..., str]) -> None:
    token = "hf_short" + end
    for command in (["inspect"], ["verify"], ["convert", "out", "--patch", "none"]):
        line = fails(
            2 if end not in ("", "-", "=", "'") else 1, command[0], "nobody/nothing", *command[1:], "--token", token
        )
        assert "hf_short" not in line
    shown = f"Illegal header value {f'Bearer {token}'.encode('utf-8', 'surrogatepass')!r} or {token!r} of {token}"
    assert "hf_short" not in str(HFEError(shown, shown)) and "hf_short" not in redact(shown)


@pytest.mark.parametrize("end", ["", "é", "-", "\\n", "="])
def test_what_looks_like_a_token_is_hidden_without_being_known(end: str) -> None:
    assert redact(f"sent {LONG}{end} to it") == "sent <token> to it"
    assert redact("hf_efficient converts hf_hub_files") == "hf_efficient converts hf_hub_files"


def test_a_stored_token_with_a_strange_character_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="the Hub token is empty or holds") as error:
        checked_token("hf_stored\xe9token")
    assert "stored" not in str(error.value)


def test_the_traceback_of_debug_hides_tokens_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_efficient.cli import main

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"Bearer {LONG}\n refused")

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit):
        run(["inspect", "x", "--debug"])
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "hf_Ab" not in shown and "<token>" in shown


def test_short_secrets_do_not_hide_words() -> None:
    hide_secret("a")
    assert redact("banana") == "banana"
