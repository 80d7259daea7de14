"""The benchmarks of topologies: what is compared computes what it says, tried on tiny sizes on the CPU."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch, repository_root: Path) -> ModuleType:
    monkeypatch.syspath_prepend(repository_root)
    return import_module("benchmarks.topology_attention")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_way_to_a_topologys_attention_matches_the_formula(attention: ModuleType, tmp_path: Path) -> None:
    """Flexible attention has no backward pass on the CPU; all others are compared in both directions."""
    options = ["--tiny", "--device", "cpu", "--cases", "MedVerse", "8k, 2 paths", "--output", str(tmp_path)]
    attention.main([*options, "--commit", "abc"])
    lines = lines_of(tmp_path / "topology_attention.jsonl")
    measured = [line for line in lines if line["part"] == "attention"]
    assert {line["provider"] for line in measured} == set(attention.PROVIDERS)
    assert len(measured) == 2 * 2 * len(attention.PROVIDERS)
    for line in measured:
        assert line["matches"] and max(line["relative_error"].values()) < 0.01, line
        backward = line["mode"] == "forward+backward"
        assert ("ms" in line) == (not backward or "flex" not in line["provider"]), line
        assert line["commit"] == "abc"
    assert {line["provider"] for line in lines if line["part"] == "preparation"} >= {"topology_blocks"}
    assert sum(line["part"] == "builder" for line in lines) == 4
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra `bench`)")
    assert (tmp_path / "topology_attention.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_attention_gets_no_figure(
    attention: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Plain causal attention in the place of ours."""
    causal = attention.PROVIDERS["causal, flash"]
    monkeypatch.setitem(attention.PROVIDERS, "hf_efficient", attention.Provider(causal.prepare, "given"))
    options = ["--tiny", "--device", "cpu", "--cases", "8k, 4 paths", "--parts", "attention"]
    attention.main([*options, "--only", "hf_efficient", "--output", str(tmp_path), "--commit", "abc"])
    lines = {(line["provider"], line["mode"]): line for line in lines_of(tmp_path / "topology_attention.jsonl")}
    wrong, right = (lines[name, "forward"] for name in ("hf_efficient", "hf_efficient, new topology"))
    assert not wrong["matches"] and "ms" not in wrong and wrong["relative_error"]["out"] > 0.05
    assert right["matches"] and right["ms"] > 0


def test_layouts_have_the_lengths_and_the_density_that_they_say(attention: ModuleType) -> None:
    """Densities as computed by hand from the lengths; pairs counted one by one where that is cheap."""
    found = {layout.label: layout for layout in attention.layouts()}
    shares = {label: layout.visible_pairs / layout.causal_pairs for label, layout in found.items()}
    assert found["16k, 8 paths"].length == 16384 and found["32k, 16 paths"].length == 32768
    assert shares["8k, 2 paths"] == pytest.approx(0.875, abs=1e-3)
    assert shares["8k, 4 paths"] == pytest.approx(0.578, abs=1e-3)
    assert shares["32k, 16 paths"] == pytest.approx(0.282, abs=1e-3)
    assert shares["1476, MedVerse-like"] == pytest.approx(0.924, abs=1e-3)
    assert shares["16k, 8 samples packed"] == pytest.approx(1 / 8, abs=1e-3)
    assert shares["16k, plain text"] == 1
    for layout in attention.layouts(64):
        assert int(layout.topology.dense_mask().sum()) == layout.visible_pairs
