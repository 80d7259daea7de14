"""Text for calibration: where it may come from, that its parts are disjoint, how it becomes token ids."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_efficient.conversion.measuring import text as text_module
from hf_efficient.conversion.measuring.calibration import (
    CALIBRATION_TOKENS,
    FIT_EXCERPT,
    HELD_OUT_TOKENS,
    PROBE_TOKENS,
    prepare_calibration,
)
from hf_efficient.conversion.measuring.text import SEQUENCE_LENGTH, Text, load_text, pack
from hf_efficient.errors import HFEError, TokenIdError


class LetterTokenizer:
    """One token for each character; a BOS is added as many tokenizers do."""

    def __init__(self, bos: int | None = None, eos: int | None = None) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        prefix = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return SimpleNamespace(input_ids=prefix + [ord(letter) for letter in text])


def write_lines(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(count)), encoding="utf-8")
    return path


def test_the_last_fifth_of_a_file_is_held_out(tmp_path):
    fit, held_out = load_text(str(write_lines(tmp_path / "many.jsonl", 1000)))
    assert list(fit.documents) == [f"document {i}" for i in range(800)]
    assert list(held_out.documents) == [f"document {i}" for i in range(800, 1000)]
    assert (fit.name, held_out.name) == ("many.jsonl, documents 0 to 799", "many.jsonl, documents 800 to 999")


def test_paragraphs_of_a_text_file_are_its_documents(tmp_path):
    (tmp_path / "prose.txt").write_text("one\nline\n\n\n two \n\nthree", encoding="utf-8")
    fit, held_out = load_text(str(tmp_path / "prose.txt"))
    assert (list(fit.documents), list(held_out.documents)) == (["one\nline", "two"], ["three"])


def test_built_in_text_is_english_fixed_and_split_into_disjoint_pages():
    fit, held_out = load_text(None)
    first, other = list(fit.documents), list(held_out.documents)
    assert not set(first) & set(other)
    assert all(500 <= len(page) <= 1000 for page in first) and all(500 <= len(page) <= 3000 for page in other)
    words = " ".join(first + other).split()
    assert sum(word in {"the", "a", "of", "is", "to"} for word in words) > 0.08 * len(words)
    assert (fit.name, held_out.name) == (
        "documentation of Python 3.11, 180 pages",
        "documentation of Python 3.11, 44 other pages",
    )
    digest = hashlib.sha256("\0".join(first + other).encode()).hexdigest()
    assert digest == "357ce61c32c22cbb037e021ae88f8e4f90c3d3dba8920ddeb421ae79bb6f1e11"


def test_built_in_text_is_enough_for_the_defaults():
    """A page is cut to FIT_EXCERPT tokens; tokenizers of large vocabularies take six characters a token and more."""
    fit, held_out = load_text(None)
    pages = [min(len(page) // 6, FIT_EXCERPT) for page in fit.documents]
    assert sum(pages) >= CALIBRATION_TOKENS + PROBE_TOKENS
    assert sum(min(len(page) // 6, SEQUENCE_LENGTH) for page in held_out.documents) >= 2 * HELD_OUT_TOKENS


def test_a_changed_built_in_text_is_refused(monkeypatch):
    monkeypatch.setattr(text_module, "_SAMPLE_SHA256", "0" * 64)
    with pytest.raises(HFEError, match="built-in text was changed.*install hf_efficient again"):
        load_text(None)
    monkeypatch.setattr(text_module, "_SAMPLE", "sample/absent.gz")
    with pytest.raises(HFEError, match="built-in text cannot be read.*install hf_efficient again"):
        load_text(None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\nnot json\n', r"line 2 of a\.jsonl"),
        ("a.jsonl", b'{"text": "x"}\n{"words": "y"}\n', r"line 2 of a\.jsonl.*text"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', r"line 2 of a\.jsonl"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 of a.jsonl has no field .text. that is a string"),
        ("a.jsonl", b'{"text": "x"}\n', r"1 document\(s\)"),
        ("a.txt", b"", r"0 document\(s\)"),
        ("a.txt", b"\xff\xfe", r"a\.txt is not UTF-8 \(byte 0\)"),
        ("a.csv", b"x", r"neither \.jsonl nor \.txt"),
    ],
)
def test_unreadable_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HFEError, match=message):
        load_text(str(tmp_path / name))


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(HFEError, match="cannot read the text"):
        load_text(str(tmp_path / "absent.jsonl"))


def test_a_data_set_needs_the_package_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(HFEError, match=r"somebody/some-text.*pip install datasets"):
        load_text("somebody/some-text")


def test_documents_are_closed_by_eos_and_every_sequence_begins_with_bos():
    documents = tuple(chr(65 + i) * 300 for i in range(10))
    ids = pack(LetterTokenizer(bos=1, eos=2), Text("t", documents), 2048, 200)
    assert ids.shape == (4, SEQUENCE_LENGTH)
    assert (ids[:, 0] == 1).all() and (ids[:, 1:] != 1).all()
    body = ids[:, 1:].flatten().tolist()
    expected = [token for document in documents for token in [*map(ord, document), 2]]
    assert body == expected[: len(body)]


def test_a_tokenizer_without_bos_and_eos_gets_none():
    ids = pack(LetterTokenizer(), Text("t", ("ab", "cd")), 100, 200)
    assert ids.tolist() == [[97, 98, 99, 100]]


def test_only_an_excerpt_of_a_long_document_is_used():
    ids = pack(LetterTokenizer(), Text("t", ("a" * 900, "b" * 900)), 100, 200, excerpt=3)
    assert ids.tolist() == [[97] * 3 + [98] * 3]


def test_no_more_tokens_than_requested():
    assert pack(LetterTokenizer(), Text("t", ("a" * 5000,) * 9), 1500, 200).shape == (2, SEQUENCE_LENGTH)
    assert pack(LetterTokenizer(), Text("t", ("a" * 5000,)), 100, 200).shape == (1, 100)


def test_too_little_text_and_foreign_ids_are_errors():
    with pytest.raises(HFEError, match=r"the text t gives 1 token\(s\), at least 2"):
        pack(LetterTokenizer(), Text("t", ("a",)), 100, 200)
    with pytest.raises(TokenIdError, match=r"id 122, the model's vocabulary is 0\.\.99"):
        pack(LetterTokenizer(), Text("t", ("az",)), 100, 100)


def test_calibration_probe_and_held_out_text_are_disjoint(tiny_source, tmp_path):
    lines = [chr(33 + i % 60) * 100 + f"{i:04d}" for i in range(2000)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    tiny = tiny_source(vocab_size=200)
    source = SimpleNamespace(config=tiny.config, reader=tiny.reader, tokenizer=LetterTokenizer)
    calibration = prepare_calibration(source, str(path), tokens=4096, held_out_tokens=1024)
    assert (calibration.fit.shape, calibration.probe.shape, calibration.held_out.shape) == (
        (8, 512),
        (2, 512),
        (2, 512),
    )
    parts = [
        {tuple(sequence.tolist()) for sequence in part}
        for part in (calibration.fit, calibration.probe, calibration.held_out)
    ]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    summary = calibration.summary()
    assert summary["calibration_tokens"] == 4096
    assert summary["distinct_calibration_tokens"] == len(torch.unique(calibration.fit))
    assert str(tmp_path) not in json.dumps(summary)
