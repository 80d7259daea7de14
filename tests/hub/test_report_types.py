"""The reports of real conversions pass verification, with every key and value that a patch writes into them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_efficient.cli.options import print_json
from hf_efficient.conversion.bhyt.patch import Bhyt
from hf_efficient.conversion.report import REPORT_NAME
from hf_efficient.conversion.stem.patch import Stem
from hf_efficient.conversion.topology.patch import MedVerse, Multiverse
from hf_efficient.convert_checkpoint import convert
from hf_efficient.hub.verify import verify
from hf_efficient.json_file import parse_json, read_json

pytestmark = pytest.mark.usefixtures("rendered_once")
TEXT = "\n\n".join(
    f"Document {i} tells how {i * 7} and {i * 13} were added up, and what came of it." for i in range(40)
)
CONVERSIONS: dict[str, Callable[[], list[Any]]] = {
    "no patch": lambda: [],
    "stem, layers named": lambda: [Stem(layers=[1])],
    "stem, layers measured": lambda: [Stem(layers="auto", max_layers=1, init="mean", keep_up_proj=True)],
    "stem, greedy": lambda: [Stem(layers="greedy", max_layers=2, sequential=False)],
    "bhyt, lossless": lambda: [Bhyt()],
    "bhyt, affine": lambda: [Bhyt(second_site="affine")],
    "bhyt, bounded": lambda: [Bhyt(bound=1, final="bhyt")],
    "multiverse": lambda: [Multiverse()],
    "medverse": lambda: [MedVerse(mode="layers")],
    "composed": lambda: [Stem(layers=[1]), Bhyt(second_site="affine", exact_layers="0"), Multiverse()],
}


@pytest.fixture(scope="module")
def make(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`make(name)`: the folder of a conversion, made once and not to be changed."""
    made: dict[str, Path] = {}
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT)

    def convert_once(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("converted") / "model"
            settings = {"calibration": text, "calibration_tokens": 1024, "license": "mit", "base_model": "org/base"}
            convert(tiny_llama, made[name], CONVERSIONS[name](), progress=False, **settings)
        return made[name]

    return convert_once


@pytest.mark.parametrize("name", CONVERSIONS)
def test_the_report_of_a_conversion_passes(name: str, make: Callable[[str], Path]) -> None:
    report = verify(make(name))
    assert report.ok, report.table()
    stored = json.loads((make(name) / REPORT_NAME).read_text())
    assert len(stored["patches"]) == len(CONVERSIONS[name]()) and stored["evaluation"] and stored["calibration"]


@pytest.mark.parametrize("patch", [Stem(layers=[1]), Bhyt(bound=1), Stem(layers="auto", max_layers=1)], ids=str)
@pytest.mark.parametrize("case", ["zeros", "overflow"])
def test_a_report_has_no_number_that_json_cannot_write(
    case: str, patch: Any, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        if case == "zeros":  # nothing to have a relative error of
            model.model.embed_tokens.weight.zero_()
            for layer in model.model.layers:
                layer.mlp.up_proj.weight.zero_()
        else:  # infinite logits
            model.lm_head.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(TEXT)
    settings: dict[str, Any] = {"calibration": tmp_path / "text.txt", "calibration_tokens": 1024, "progress": False}
    report = convert(tmp_path / "source", tmp_path / "out", [patch], **settings)
    assert report.table()
    stored = read_json(tmp_path / "out" / REPORT_NAME)
    assert (stored["evaluation"]["nll"]["mean"] is None) == (case == "overflow")
    assert verify(tmp_path / "out").ok, verify(tmp_path / "out").table()
    if case == "zeros" and isinstance(patch, Stem):
        (layer,) = stored["patches"][0]["measured"]["layers"].values()
        assert set(layer["relative_error"].values()) == {0.0}
    print_json({"loss": math.nan, "rows": [(1.0, -math.inf)]})
    assert parse_json("output", capsys.readouterr().out.encode()) == {"loss": None, "rows": [[1.0, None]]}


# Place of a change in the report, its value, and the place that verification names.
CHANGES: dict[str, tuple[str, list[str | int], Any]] = {
    "option": ("no patch", ["options", "hook"], "x"),
    "type of an option": ("no patch", ["options", "seed"], "0"),
    "other type of an option": ("no patch", ["options", "evaluate"], 1),
    "patch in the options": ("stem, greedy", ["options", "patches", "evil"], {}),
    "option of a patch in the options": ("stem, greedy", ["options", "patches", "stem", "module"], "x"),
    "type of a patch's option": ("stem, greedy", ["options", "patches", "stem", "layers"], {"a": 1}),
    "option of a patch": ("stem, greedy", ["patches", 0, "options", "module"], "x"),
    "option of another patch": ("stem, greedy", ["patches", 0, "options", "second_site"], "exact"),
    "key of a patch": ("stem, greedy", ["patches", 0, "code"], "x"),
    "type of a patch's key": ("stem, greedy", ["patches", 0, "calibrated"], "yes"),
    "name of a patch": ("stem, greedy", ["patches", 0, "name"], "evil"),
    "type of a patch's name": ("stem, greedy", ["patches", 0, "name"], {"stem": 1}),
    "choice": ("stem, greedy", ["patches", 0, "choices", "auto_map"], {"AutoModel": 1}),
    "choice of no field": ("stem, greedy", ["patches", 0, "choices", "run"], "x"),
    "type of a choice": ("stem, greedy", ["patches", 0, "choices", "stem_layers"], [1, "2"]),
    "key of a topology": ("multiverse", ["patches", 0, "choices", "topology", "run"], "x"),
    "control token": ("multiverse", ["patches", 0, "choices", "topology", "token_ids", "<evil>"], 3),
    "type of a token's id": ("multiverse", ["patches", 0, "choices", "topology", "token_ids", "<Path>"], "3"),
    "figure of a patch": ("stem, greedy", ["patches", 0, "measured", "run"], "x"),
    "type of a figure": ("stem, greedy", ["patches", 0, "measured", "shrinkage"], "4"),
    "key of a round": ("stem, greedy", ["patches", 0, "measured", "greedy_rounds", 0, "run"], "x"),
    "candidate that is no layer": (
        "stem, greedy",
        ["patches", 0, "measured", "greedy_rounds", 0, "candidates", "x"],
        1,
    ),
    "layer that is no number": ("stem, greedy", ["patches", 0, "measured", "layers", "one"], {}),
    "error of a layer": ("stem, greedy", ["patches", 0, "measured", "layers", "1", "relative_error", "run"], 0.5),
    "bucket of a layer": (
        "stem, greedy",
        ["patches", 0, "measured", "layers", "1", "relative_error_by_count", "9+"],
        {},
    ),
    "key of a site": ("bhyt, bounded", ["patches", 0, "measured", "sites", "model.norm", "run"], 1),
    "type of a site's gains": ("bhyt, bounded", ["patches", 0, "measured", "sites", "model.norm", "gain_times_a"], "1"),
    "layer of a line": ("bhyt, affine", ["patches", 0, "measured", "line_misses", "all"], 0.5),
    "rows of no token": ("multiverse", ["patches", 0, "measured", "token_rows", "x"], [1]),
    "key of the calibration": ("no patch", ["calibration", "url"], "x"),
    "type of the calibration": ("no patch", ["calibration", "calibration_tokens"], "1024"),
    "list for the calibration": ("no patch", ["calibration"], ["x"]),
    "key of the evaluation": ("no patch", ["evaluation", "run"], "x"),
    "type of the evaluation": ("no patch", ["evaluation", "tokens"], 1.5),
    "key of an estimate": ("no patch", ["evaluation", "nll", "run"], 1.0),
    "type of an estimate": ("no patch", ["evaluation", "kl", "mean"], "0"),
    "bucket": ("stem, greedy", ["evaluation", "by_count", "5"], {}),
    "figure of a bucket": ("stem, greedy", ["evaluation", "by_count", "0", "run"], 1.0),
    "version": ("no patch", ["versions", "evil"], "1.0"),
    "key of the plan": ("no patch", ["estimate", "run"], 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_key_or_type_that_no_conversion_writes_is_named(
    change: str, make: Callable[[str], Path], tmp_path: Path
) -> None:
    name, path, value = CHANGES[change]
    folder = Path(shutil.copytree(make(name), tmp_path / "model"))
    stored = target = json.loads((folder / REPORT_NAME).read_text())
    for key in path[:-1]:
        target = target.setdefault(key, {}) if isinstance(target, dict) else target[key]
    target[path[-1]] = value
    (folder / REPORT_NAME).write_text(json.dumps(stored))
    report = verify(folder)
    assert not report.ok
    place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")
    assert all(finding.file == REPORT_NAME for finding in report.findings)
    assert any(finding.problem.startswith(place) for finding in report.findings), report.table()
