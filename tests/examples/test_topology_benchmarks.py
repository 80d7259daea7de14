"""The benchmarks of topologies: what is compared computes what it says, tried on tiny sizes on the CPU."""

from __future__ import annotations

import dataclasses
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch, repository_root: Path) -> ModuleType:
    monkeypatch.syspath_prepend(repository_root)
    return import_module("benchmarks.topology_attention")


@pytest.fixture
def generation(monkeypatch: pytest.MonkeyPatch, repository_root: Path) -> ModuleType:
    monkeypatch.syspath_prepend(repository_root)
    module = import_module("benchmarks.topology_generation")
    for name, value in {"RUNS": 1, "PLACES": 1, "TIMED_TOKENS": 5, "BATCHES": (2,), "LARGE_BATCH": 2}.items():
        monkeypatch.setattr(module, name, value)
    return module


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_way_to_a_topologys_attention_matches_the_formula(attention: ModuleType, tmp_path: Path) -> None:
    """Flexible attention has no backward pass on the CPU; all others are compared in both directions."""
    options = ["--tiny", "--device", "cpu", "--cases", "MedVerse", "--output", str(tmp_path)]
    attention.main([*options, "--commit", "abc"])
    lines = lines_of(tmp_path / "topology_attention.jsonl")
    measured = [line for line in lines if line["part"] == "attention"]
    assert {line["provider"] for line in measured} == set(attention.PROVIDERS)
    assert len(measured) == 2 * len(attention.PROVIDERS)
    for line in measured:
        assert line["matches"] and max(line["relative_error"].values()) < 0.01, line
        backward = line["mode"] == "forward+backward"
        assert ("ms" in line) == (not backward or "flex" not in line["provider"]), line
        assert line["commit"] == "abc"
        if "flex_over_it" in line:
            assert line["flex_is"] == ("flex, new topology" if line["topology"] == "new" else "flex")
    assert {line["provider"] for line in lines if line["part"] == "preparation"} >= {"topology_blocks"}
    assert sum(line["part"] == "builder" for line in lines) == 4
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra `bench`)")
    assert (tmp_path / "topology_attention.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_attention_gets_no_figure(
    attention: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Plain causal attention in the place of ours."""
    causal = attention.PROVIDERS["causal, flash"]
    monkeypatch.setitem(attention.PROVIDERS, "hf_efficient", dataclasses.replace(causal, topology="given"))
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


def test_parallel_generation_writes_the_transcripts_that_the_benchmark_asks_for(
    generation: ModuleType, tmp_path: Path
) -> None:
    """The benchmark stops by itself where tokens or the longest chain are not those of the transcript."""
    options = ["--models", "tiny", "--device", "cpu", "--cases", "C:", "2 paths", "--output", str(tmp_path)]
    generation.main([*options, "--commit", "abc"])
    lines = lines_of(tmp_path / "topology_generation.jsonl")
    assert [(line["case"][:2], line["batch"]) for line in lines] == [("C:", 1), ("C:", 2), ("2 ", 2)]
    for line in lines:
        # Headers are written in one pass, so there are fewer passes than tokens in the longest chain.
        assert 0.7 * line["critical_path"] < line["forward_passes"] <= line["critical_path"] + 1
        assert line["speedup"] == pytest.approx(line["sequential_s"] / line["parallel_s"], rel=1e-3)
        assert line["sequential_from"] == "the prompt, and 5 tokens around each of 2 contexts"
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra `bench`)")
    assert (tmp_path / "topology_generation.png").read_bytes().startswith(b"\x89PNG")


def test_the_bounds_of_the_transcripts_are_those_of_their_lengths(generation: ModuleType) -> None:
    found = generation.transcripts(1)
    bounds = [(x.tokens, x.critical_path, round(x.bound, 2)) for x in found.values()]
    assert bounds == [(8448, 1280, 6.6), (4608, 1536, 3.0), (776, 392, 1.98)]
    assert [len(x.prompt) for x in found.values()] == [1024, 1024, 700]


def test_times_at_a_few_contexts_add_up_to_those_of_the_whole(
    generation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens whose cost is linear in their place, so that straight lines between them are exact."""

    class Model:
        device = generation.torch.device("cpu")

        def free_captured_steps(self) -> None:
            pass

    def cost(model: Model, ids: generation.torch.Tensor, tokens: int) -> float:
        return 0.5 + sum(1e-3 * (ids.shape[1] + i) for i in range(tokens))

    monkeypatch.setattr(generation, "plain", cost)
    monkeypatch.setattr(generation, "PLACES", 3)
    whole, parts = (generation.Sequential(Model(), most)([1] * 100, 400, 1) for most in (400, 399))
    assert whole["sequential_from"] == "whole runs" and "contexts" in parts["sequential_from"]
    assert parts["sequential_s"] == pytest.approx(whole["sequential_s"], rel=1e-4)
