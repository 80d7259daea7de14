"""JSON files are read within bounds; anything else is refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_efficient.errors import HFEError
from hf_efficient.json_file import MAX_JSON_BYTES, parse_json, read_json


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a list, not an object"),
        ("null", "holds a NoneType, not an object"),
        ('{"a": NaN}', "NaN is not a number of JSON"),
        ('{"a": [-Infinity]}', "-Infinity is not a number of JSON"),
        ('{"a": 1e999}', "the number 1e999 is out of range"),
        ('{"a": ' + "9" * 5000 + "}", "has 5000 digits"),
        ('{"a": 1, "b": {"c": 2, "c": 3}}', "the key 'c' comes twice"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "nested more than 64 deep"),
        ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested"),
        (r'{"a": [{"b": "\ud800"}]}', r"the text '\\ud800', half of a character"),
        (r'{"\udfff": 1}', "half of a character"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(HFEError, match=words) as error:
        parse_json("config.json", text.encode())
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_bytes_that_are_not_utf_8_are_refused() -> None:
    with pytest.raises(HFEError, match="can't decode byte 0xff"):
        parse_json("config.json", b'{"a": "\xff"}')


def test_valid_json_is_read() -> None:
    text = r'{"model_max_length": 1000000000000000019884624838656, "a": "\u00e9\ud83d\ude00", "b": [1e-5, {}, null]}'
    expected = {"model_max_length": 1000000000000000019884624838656, "a": "é😀", "b": [1e-5, {}, None]}
    assert parse_json("tokenizer_config.json", text.encode()) == expected


def test_a_file_that_is_too_large_or_not_regular_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name, words in (
        ("large.json", "may have at most"),
        ("pipe.json", "is not an ordinary file"),
        ("folder.json", "is not an ordinary file"),
        ("gone.json", "gone.json cannot be read: No such file or directory"),
    ):
        with pytest.raises(HFEError, match=words):
            read_json(tmp_path / name)
