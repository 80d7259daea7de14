"""What a conversion to Multiverse or MedVerse does not take: one clear line each, and nothing is written."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_efficient.cli.options import build_patches
from hf_efficient.conversion.options import ConversionOptions
from hf_efficient.conversion.reading.source import Source
from hf_efficient.conversion.topology.patch import MedVerse, Multiverse
from hf_efficient.convert_checkpoint import convert
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.inspection import inspect

Stock = Callable[..., Path]
QUIET: dict[str, Any] = {"evaluate": False, "progress": False}


def refused(source: Path, output: Path, words: str, patch: Any = None, **options: Any) -> HFEError:
    with pytest.raises(HFEError, match=words) as error:
        convert(source, output, [patch or Multiverse()], **{**QUIET, **options})
    assert "\n" not in str(error.value) and error.value.remedy
    assert not output.exists() and not list(output.parent.glob("*.hfe-partial"))
    return error.value


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_source_without_tokenizer(dry_run: bool, stock: Stock, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(stock(), source, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    refused(source, tmp_path / "out", "source has no tokenizer that can be loaded", dry_run=dry_run)
    # One that the user names does.
    convert(source, tmp_path / "out", [Multiverse()], tokenizer=stock(), **QUIET)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(AutoTokenizer.from_pretrained(stock())) + 12


def test_a_tokenizer_that_takes_no_tokens(stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> int:
        raise NotImplementedError("this tokenizer is fixed")

    tokenizer = AutoTokenizer.from_pretrained(stock())
    tokenizer.add_tokens = refuse
    monkeypatch.setattr(Source, "tokenizer", lambda self: tokenizer)
    refused(stock(), tmp_path / "out", r"supports no new tokens \(this tokenizer is fixed\).*tokenizer.json")


def test_a_tokenizer_that_still_splits_added_tokens(
    stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "add_tokens", lambda *args, **kwargs: 0)
    refused(stock(), tmp_path / "out", r"still reads <Think> .*</Conclusion> as several tokens .*\(<Think>: 3\)")


def test_a_tokenizer_with_a_token_that_eats_into_a_tag(stock: Stock, tmp_path: Path) -> None:
    """Alone each tag is one token, but after a line break, where it usually is, `<Path>` is not."""
    source = tmp_path / "source"
    shutil.copytree(stock(), source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["\n<P"], special_tokens=True)
    tokenizer.save_pretrained(source)
    refused(source, tmp_path / "out", "still reads <Parallel> <Path> as several tokens")


@pytest.mark.parametrize("patch", [Multiverse(), MedVerse()])
def test_a_sliding_window(patch: Any, stock: Stock, tmp_path: Path) -> None:
    error = refused(stock("mistral-window"), tmp_path / "out", "layer 0 has a sliding window of 64 positions", patch)
    assert isinstance(error, UsageError)


@pytest.mark.parametrize("patch", [Multiverse(), MedVerse()])
def test_a_rotary_embedding_that_changes_with_the_length(patch: Any, stock: Stock, tmp_path: Path) -> None:
    refused(stock("llama-dynamic"), tmp_path / "out", "rotary embedding 'dynamic' changes", patch)


@pytest.mark.parametrize("second", [Multiverse(), MedVerse()])
def test_a_source_that_has_a_topology_already(second: Any, stock: Stock, tmp_path: Path) -> None:
    convert(stock(), tmp_path / "multiverse", [Multiverse()], **QUIET)
    refused(tmp_path / "multiverse", tmp_path / "out", "is a multiverse checkpoint already", second)
    # Nor is it offered.
    assert inspect(str(tmp_path / "multiverse")).can_convert_to == ["stem", "bhyt"]
    assert {"multiverse", "medverse"} < set(inspect(str(stock())).can_convert_to)


def test_a_model_called_trained_whose_tokenizer_lacks_the_tokens(stock: Stock, tmp_path: Path) -> None:
    words = "trained=True, but the tokenizer of .* lacks <Think> </Think>"
    refused(stock(), tmp_path / "out", words, Multiverse(trained=True))


def test_a_tokenizer_of_another_model(stock: Stock, tmp_path: Path) -> None:
    """Its words would have rows that this model has not."""
    foreign = tmp_path / "foreign"
    tokenizer = AutoTokenizer.from_pretrained(stock())
    tokenizer.add_tokens([f"filler{number}" for number in range(300)] + ["Goal"])
    tokenizer.save_pretrained(foreign)
    refused(stock(), tmp_path / "out", r"reads 'Goal' as \[\d+\], and the model has the rows", tokenizer=foreign)


def test_both_grammars_at_once() -> None:
    with pytest.raises(UsageError, match="patches multiverse and medverse both add control tokens"):
        convert("no such source", "nowhere", [Multiverse(), MedVerse()], **QUIET)


@pytest.mark.parametrize(
    ("patch", "options", "words"),
    [
        (MedVerse, {"mode": "tree"}, "medverse mode='tree' is unknown; choose one of auto, dag, layers, flat"),
        (MedVerse, {"trained": "yes"}, "medverse trained='yes' must be True, False or None"),
        (Multiverse, {"trained": 2}, "multiverse trained=2"),
    ],
)
def test_wrong_options(patch: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        patch(**options)


def test_options_on_the_command_line() -> None:
    given = {"medverse_mode": "flat", "medverse_trained": True, "multiverse_trained": None}
    (patch,) = build_patches(["medverse"], given)
    assert patch == MedVerse(mode="flat", trained=True)
    assert build_patches(["multiverse"], {}) == [Multiverse()]
    for cls in (Multiverse, MedVerse):
        assert all(field.metadata.get("help") for field in dataclasses.fields(cls))


def test_the_patch_reads_the_tokenizer_only_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Source, "tokenizer", lambda self: pytest.fail("the tokenizer was read"))
    names = {field.name: None for field in dataclasses.fields(ConversionOptions)}
    defaults = {"dtype": "auto", "max_shard_size": "5GB", "device": "cpu", "seed": 0, "calibration_tokens": 1}
    given = {**names, **defaults, "evaluate": False}
    ConversionOptions(**{**given, "patches": [Multiverse()]})
