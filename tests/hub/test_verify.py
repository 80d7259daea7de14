"""Verification trusts nothing in a checkpoint, runs nothing of it, and names every fault."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import CONFIG_NAME as CONFIG
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX
from transformers.utils import SAFE_WEIGHTS_NAME as SINGLE_FILE

from hf_efficient import __version__
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.hub.card import write_card
from hf_efficient.hub.export import export
from hf_efficient.hub.findings import VerificationReport
from hf_efficient.hub.verify import verify
from hf_efficient.inspection import inspect
from hf_efficient.modeling.base.saved_code import CODE_MANIFEST

Change = Callable[[Path], None]
NORM = "model.norm.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def findings(report: VerificationReport) -> str:
    return "\n".join(str(finding) for finding in report.findings)


def test_a_sound_checkpoint_is_confirmed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for model_type, original in checkpoints.items():
        folder = shutil.copytree(original, tmp_path / model_type)
        write_card(folder)
        (folder / ".git").mkdir()
        (folder / ".git" / "hook.py").write_text("a clone's own file")
        report = verify(folder)
        assert report.ok, report.table()
        assert report.code == "confirmed" and report.model_type == model_type and report.release == __version__
        assert report.tensors > 20 and report.code_files > 5
        report.raise_if_not_ok()
        assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_any_changed_byte_of_code_is_named(checkpoint: Path) -> None:
    """In every code file, at random places: file, line and byte are right."""
    rng = random.Random(0)
    changed: dict[str, str] = {}
    originals = {path: path.read_bytes() for path in sorted(checkpoint.glob("*.py"))}
    for path, original in originals.items():
        offset = rng.randrange(len(original))
        path.write_bytes(_with_one_bit_changed(original, offset))
        changed[path.name] = _where(original, offset)
    report = verify(checkpoint)
    assert not report.ok and report.code == "altered"
    assert len(report.findings) == len(changed) > 50
    for finding in report.findings:
        assert changed.pop(finding.file) in finding.problem
    for path, original in originals.items():
        path.write_bytes(original)
    assert verify(checkpoint).ok


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_single_changed_byte_is_the_only_finding(checkpoint: Path, place: float) -> None:
    path = sorted(checkpoint.glob("*.py"))[round(place)]
    original = path.read_bytes()
    offset = round(place * (len(original) - 1))
    path.write_bytes(_with_one_bit_changed(original, offset))
    (finding,) = verify(checkpoint).findings
    assert finding.file == path.name and _where(original, offset) in finding.problem


def _with_one_bit_changed(content: bytes, offset: int) -> bytes:
    return content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :]


def _where(content: bytes, offset: int) -> str:
    return f"line {content[:offset].count(10) + 1}, column {offset - content.rfind(10, 0, offset)} (byte {offset})"


def test_expected_and_found_text_are_shown(checkpoint: Path) -> None:
    path = checkpoint / "modeling_stem.py"
    path.write_text(path.read_text().replace("self.efficient = True", "self.efficient = None"))
    with pytest.raises(HFEError, match=r"modeling_stem\.py: line .* expected .*True.*found .*None.*1 line differs"):
        verify(checkpoint).raise_if_not_ok()


def test_a_manifest_that_fits_the_changed_code_convinces_nobody(checkpoint: Path) -> None:
    path = checkpoint / "hfe_errors.py"
    path.write_text(path.read_text() + "\nimport os\n")
    manifest = json.loads((checkpoint / CODE_MANIFEST).read_text())
    manifest["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (checkpoint / CODE_MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    report = verify(checkpoint)
    assert report.code == "altered" and "hfe_errors.py: line" in findings(report)
    assert "expected the end of the file, found '\\nimport os'" in findings(report)


def test_another_release_is_not_confirmable(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.py"):
        path.write_text(path.read_text().replace(f"hf-efficient {__version__}", "hf-efficient 99.0"))
    edit_json(checkpoint / CODE_MANIFEST, version="99.0")
    report = verify(checkpoint)
    assert report.code == "not confirmable" and not report.ok and report.release == "99.0"
    assert f"comes from hf-efficient 99.0; installed is {__version__}" in findings(report)


def test_other_sources_of_the_same_release_are_told_apart_from_the_changed_file(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash of the sources stands in every file; the report names the file whose code differs, not all of them."""
    from hf_efficient.hub import flatten

    original = flatten._source_text
    changed = lambda module: original(module) + ("\nNEW = 1\n" if module == "hf_efficient.errors" else "")  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(flatten, "_source_text", changed)
        export(checkpoint)
    report = verify(checkpoint)
    assert report.code == "altered"
    assert [finding.file for finding in report.findings] == ["hfe_errors.py", CODE_MANIFEST]


def test_nothing_of_the_checkpoint_runs(checkpoint: Path, tmp_path: Path) -> None:
    """Code that would leave a mark when it is imported, and a pickle that would when it is read, leave none."""
    mark = tmp_path / "mark"
    for path in checkpoint.glob("*.py"):
        path.write_text(path.read_text() + f"\nopen({str(mark)!r}, 'w')\n")

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(mark), "w")

    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert not verify(checkpoint).ok
    assert not mark.exists()


def test_a_model_with_code_and_weights_swapped_for_another_type_is_not_confirmed(checkpoint: Path) -> None:
    edit_json(checkpoint / CONFIG, model_type="hfe_decoder")
    report = verify(checkpoint)
    assert report.code == "altered" and "modeling_efficient_decoder.py: is missing" in findings(report)


# Weights


def _edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    edit(tensors)
    save_file(tensors, folder / SINGLE_FILE)


def _shard(folder: Path) -> dict[str, str]:
    """Split the weights in two files; returns the weight map."""
    tensors = load_file(folder / SINGLE_FILE)
    names = sorted(tensors)
    parts = {FIRST: names[:9], SECOND: names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / SINGLE_FILE).unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def _index(folder: Path, **changes: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {**_shard(folder), **changes}}))


def _truncate(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / SINGLE_FILE).unlink(), ["model.safetensors: is missing"]),
        (lambda f: _edit_weights(f, lambda t: t.pop(NORM)), [f"lacks tensor {NORM}"]),
        (lambda f: _edit_weights(f, lambda t: t.update(new=torch.ones(1))), ["holds tensor new"]),
        (
            lambda f: _edit_weights(f, lambda t: t.update({NORM: torch.ones(7)})),
            [f"tensor {NORM} has shape [7]; config.json calls for [32]"],
        ),
        (lambda f: edit_json(f / CONFIG, vocab_size=98), ["has shape [97, 32]; config.json calls for [98, 32]"]),
        (
            lambda f: edit_json(f / CONFIG, num_hidden_layers=9, layer_types=["full_attention"] * 9),
            ["lacks tensor model.layers.", "more tensors differ"],
        ),
        (lambda f: _truncate(f / SINGLE_FILE, 5), ["model.safetensors", "truncated"]),
        (lambda f: (f / SINGLE_FILE).write_bytes(b"\xff" * 40), ["model.safetensors", "header"]),
        (
            lambda f: (f / SINGLE_FILE).write_bytes((f / SINGLE_FILE).read_bytes() + b"hidden"),
            ["the last tensor of model.safetensors ends at byte"],
        ),
        (lambda f: _index(f, **{NORM: f"../{FIRST}"}), [f"points at '../{FIRST}'"]),
        (lambda f: _index(f, **{NORM: "pytorch_model.bin"}), ["points at 'pytorch_model.bin'"]),
        (lambda f: _index(f, **{NORM: FIRST}), [f"looks for tensor {NORM} in {FIRST}"]),
        (lambda f: _shard(f) and (f / SECOND).unlink(), [f"{SECOND}: is missing"]),
        (lambda f: _shard(f) and (f / INDEX).write_text("{}"), ["has no weight_map"]),
        (
            lambda f: save_file({"x": torch.ones(1)}, f / "old.safetensors"),
            ["old.safetensors: is a file that is not part of"],
        ),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_named(
    checkpoint: Path, change: Change, words: list[str]
) -> None:
    change(checkpoint)
    report = verify(checkpoint)
    assert not report.ok and report.code == "confirmed"
    for word in words:
        assert word in findings(report)


def test_sharded_weights_are_confirmed(checkpoint: Path) -> None:
    _shard(checkpoint)
    report = verify(checkpoint)
    assert report.ok, report.table()
    assert report.tensors == 30


def test_where_a_loaded_model_keeps_its_tables_is_no_matter_of_the_checkpoint(checkpoint: Path) -> None:
    resident = inspect(str(checkpoint)).to_dict()
    edit_json(checkpoint / CONFIG, stem_offload="disk")
    assert verify(checkpoint).ok, verify(checkpoint).table()
    assert inspect(str(checkpoint)).to_dict() == resident


def test_a_tied_head_may_be_stored_or_not(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(tmp_path / "tied", "hfe_stem", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / SINGLE_FILE)
    assert verify(folder).ok
    _edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert verify(folder).ok


@pytest.mark.parametrize(
    ("source", "revision", "words"),
    [
        ("no/such/folder", None, "not a repository id"),
        (".", "main", "has no revisions"),
        (__file__, None, "is a file"),
    ],
)
def test_a_wrong_argument_is_a_usage_error(source: str, revision: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        verify(source, revision=revision)
