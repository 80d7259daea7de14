"""Reads text for calibration and evaluation, splits it into the two, and packs it into token ids."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_efficient.errors import HFEError, TokenIdError
from hf_efficient.json_file import parse_json

SEQUENCE_LENGTH = 512
# The last 1 / HELD_OUT_DIVISOR of the documents of a file or data set are held out.
HELD_OUT_DIVISOR = 5
# For origin, licence and format see sample/README.md.
_SAMPLE = "sample/python_documentation.jsonl.gz"
_SAMPLE_NAME = "documentation of Python 3.11"
_SAMPLE_SHA256 = "fdf39973aa712b570dc9c0064c67ef4ea882e9c3ea163a174abbd1a639570f22"


@dataclass(frozen=True)
class Text:
    """Documents, and their name in reports: a file's base name or a data set's id, never a path."""

    name: str
    documents: Iterable[str]


def load_text(source: str | None) -> tuple[Text, Text]:
    """Read (calibration text, held-out text); their documents are different.

    Args:
        source: a `.jsonl` file with a field `text` on each line, a `.txt` file (documents are paragraphs, separated by
            an empty line), the id of a data set on the Hub (needs the package datasets; the first 10,000 rows of its
            split `train`, its column `text`), or None for the sample of Python's English documentation
            that is part of this package.

    Raises:
        HFEError: the source is missing or cannot be read, a line of a .jsonl file has no text (the message names it),
            or there are fewer than two documents.
    """
    if source is None:
        return _read_sample()
    path = Path(source)
    if path.suffix == ".jsonl" or path.suffix == ".txt":
        documents = _read_jsonl(path) if path.suffix == ".jsonl" else _read_paragraphs(path)
        return _split_in_order(path.name, tuple(documents))
    if path.exists():
        raise HFEError(f"the text {path.name} is neither .jsonl nor .txt", "convert it to one of these")
    return _split_in_order(source, tuple(_read_dataset(source)))


def pack(tokenizer: Any, text: Text, tokens: int, vocab_size: int, *, excerpt: int = SEQUENCE_LENGTH) -> Tensor:
    """Token ids [B, SEQUENCE_LENGTH], int64, of at most `tokens` tokens of text; a short text gives one sequence.

    Every sequence begins with the tokenizer's BOS if it has one, whether or not the tokenizer adds it: the first
    position is an attention sink, and should be the same token in every text. The rest is the first `excerpt` tokens
    of each document followed by EOS, if the tokenizer has one, concatenated and cut into sequences; an incomplete last
    one is dropped. A text of fewer tokens than a sequence gives [1, its number of tokens, and 1 for BOS].

    Raises:
        HFEError: the text gives fewer than two tokens.
        TokenIdError: the tokenizer gives an id outside the model's vocabulary.
    """
    bos, eos = ([] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    ids: list[int] = []
    for document in text.documents:
        ids += tokenizer(document, add_special_tokens=False).input_ids[:excerpt] + eos
        if len(ids) >= tokens:
            break
    ids = ids[:tokens]
    if len(ids) < 2:
        raise HFEError(f"the text {text.name} gives {len(ids)} token(s), at least 2 are needed", "give more text")
    if max(ids) >= vocab_size:
        raise TokenIdError(
            f"the tokenizer gives id {max(ids)}, the model's vocabulary is 0..{vocab_size - 1}",
            "use the tokenizer that belongs to this checkpoint",
        )
    length = min(SEQUENCE_LENGTH - len(bos), len(ids))
    return torch.tensor([[*bos, *ids[start : start + length]] for start in range(0, len(ids) - length + 1, length)])


def _split_in_order(name: str, documents: tuple[str, ...]) -> tuple[Text, Text]:
    """(the first documents, the last 1 / HELD_OUT_DIVISOR of them); `HFEError` for fewer than two documents."""
    if len(documents) < 2:
        raise HFEError(
            f"the text {name} holds {len(documents)} document(s); calibration and held-out text need one each",
            "give a file with more documents",
        )
    cut = len(documents) - max(len(documents) // HELD_OUT_DIVISOR, 1)
    return (
        Text(f"{name}, documents 0 to {cut - 1}", documents[:cut]),
        Text(f"{name}, documents {cut} to {len(documents) - 1}", documents[cut:]),
    )


def _read_text(path: Path) -> str:
    """The content of a UTF-8 file; `HFEError` if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise HFEError(f"cannot read the text {path}: {error.strerror}", "check the path") from error
    except UnicodeDecodeError as error:
        raise HFEError(f"{path.name} is not UTF-8 (byte {error.start})", "re-encode it as UTF-8") from error


def _read_jsonl(path: Path) -> Iterator[str]:
    """The field `text` of each line of a .jsonl file; empty lines are skipped.

    Raises:
        HFEError: a line, which the message names, is not a JSON object with such a string, or as for `_read_text`.
    """
    # Not splitlines, which also splits at U+2028 and others; these may occur inside a text.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        text = parse_json(f"line {number} of {path.name}", line.encode()).get("text")
        if not isinstance(text, str):
            raise HFEError(f'line {number} of {path.name} has no field "text" that is a string', "correct the line")
        yield text


def _read_paragraphs(path: Path) -> Iterator[str]:
    """The paragraphs of a .txt file, which are separated by empty lines; `HFEError` as `_read_text`."""
    return (paragraph.strip() for paragraph in _read_text(path).split("\n\n") if paragraph.strip())


def _read_dataset(name: str) -> Iterator[str]:
    """The column `text` of the first 10,000 rows of a data set's split `train`.

    Raises:
        HFEError: it cannot be read, or the package datasets is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise HFEError(
            f"{name!r} is no .jsonl or .txt file, and to fetch it as a data set needs the package datasets",
            "check the path, or pip install datasets",
        ) from error
    try:
        for row in load_dataset(name, split="train", streaming=True).take(10_000):
            yield row["text"]
    except Exception as error:  # datasets raises the error classes of many libraries
        raise HFEError(
            f"cannot read the column text of the data set {name!r}: {error}", "name another data set or a file"
        ) from error


def _read_sample() -> tuple[Text, Text]:
    """(calibration pages, held-out pages) of the built-in text.

    Raises:
        HFEError: the file is missing or is not the one that this release was made with.
    """
    path = files("hf_efficient.conversion.measuring").joinpath(_SAMPLE)
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise HFEError(f"the built-in text cannot be read: {error.strerror}", "install hf_efficient again") from error
    if hashlib.sha256(packed).hexdigest() != _SAMPLE_SHA256:
        raise HFEError("the built-in text was changed: its SHA-256 differs", "install hf_efficient again")
    pages = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    fit, held_out = (tuple(page["text"] for page in pages if page["held_out"] == wanted) for wanted in (False, True))
    return (
        Text(f"{_SAMPLE_NAME}, {len(fit)} pages", fit),
        Text(f"{_SAMPLE_NAME}, {len(held_out)} other pages", held_out),
    )
