"""The benchmark harness: no figure without a match, every figure with shape, versions and device."""

from __future__ import annotations

import argparse
import functools
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hf_efficient.kernels.stem_gate.record import RECORD


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, repository_root: Path) -> ModuleType:
    monkeypatch.syspath_prepend(repository_root)
    harness = import_module("benchmarks.harness")
    monkeypatch.setattr(harness, "SECONDS_PER_FIGURE", 0.002)
    monkeypatch.setattr(harness, "ROTATION_BYTES", 1)
    return harness


def _lines(harness: ModuleType, folder: Path, modes: list[str]) -> list[dict]:
    benchmark = import_module("benchmarks.stem_gate")
    cpu = torch.device("cpu")
    sizes = {"tokens": 32, "rows": 50, "width": 64}
    draw = functools.partial(benchmark.draw, **sizes, device=cpu)
    cases = [harness.Case("tiny", mode, sizes, torch.bfloat16, lambda s: draw(seed=s)) for mode in modes]

    def wrong(gate: torch.Tensor, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return RECORD.reference(gate, table, ids.flip(0))

    providers = [
        harness.Provider("eager", lambda: RECORD.peers["eager"]),
        harness.Provider("wrong", lambda: wrong),
    ]
    arguments = argparse.Namespace(device="cpu", modes=modes, cases="", output=folder, commit="abc")
    return harness.run("tiny", RECORD, cases, providers, arguments)


def test_a_wrong_provider_gets_no_figure(harness: ModuleType, tmp_path: Path) -> None:
    by_provider = {line["provider"]: line for line in _lines(harness, tmp_path, ["forward"])}
    assert not by_provider["wrong"]["matches_reference"]
    assert by_provider["wrong"]["ms"] is None
    assert by_provider["wrong"]["gb_per_s"] is None
    assert "no figure" in harness.summary(by_provider["wrong"])
    assert by_provider["eager"]["ms"] > 0


@pytest.mark.parametrize("mode", ["forward", "backward", "decode"])
def test_a_figure_is_written_with_all_that_is_needed_to_judge_it(
    mode: str, harness: ModuleType, tmp_path: Path
) -> None:
    _lines(harness, tmp_path, [mode])
    line = json.loads((tmp_path / "tiny.jsonl").read_text(encoding="utf-8").splitlines()[0])
    known = {"device", "driver", "torch", "triton", "transformers", "commit", "dtype", "tokens", "width", "rows"}
    assert known <= line.keys()
    assert (line["commit"], line["mode"], line["dtype"]) == ("abc", mode, "bfloat16")
    assert line["ms_p20"] <= line["ms"] <= line["ms_p80"]
    distinct = RECORD.forward_cost(import_module("benchmarks.stem_gate").draw(32, 50, 64, torch.device("cpu"), 0))
    if mode != "backward":
        assert line["floor_bytes"] == distinct.bytes
    assert line["gb_per_s"] == pytest.approx(line["floor_bytes"] / line["ms"] / 1e6, rel=0.1, abs=0.1)


def test_results_become_a_picture(harness: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra `bench`)")
    lines = _lines(harness, tmp_path, ["forward", "backward"])
    import_module("benchmarks.plot").plot(lines, "tiny", tmp_path / "tiny.png")
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_ids_of_the_benchmark_follow_the_law_of_zipf(harness: ModuleType) -> None:
    """Of 16,384 tokens over 128,256 ids, 6,636 are distinct in expectation when the exponent is 1."""
    zipf_ids = import_module("benchmarks.stem_gate").zipf_ids
    ids = zipf_ids(16384, 128256, torch.Generator().manual_seed(0))
    assert abs(ids.unique().numel() - 6636) < 150
    assert ids.bincount().max() > 1000


def test_the_benchmark_of_the_row_kernels_runs(harness: ModuleType, tmp_path: Path) -> None:
    """On the CPU: every provider that needs no GPU, correct results, and a picture."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra `bench`)")
    benchmark = import_module("benchmarks.row_kernels")
    size = ["--device", "cpu", "--rows", "80", "--width", "32"]
    benchmark.main([*size, "--output", str(tmp_path), "--commit", "abc"])
    lines = [json.loads(line) for line in (tmp_path / "row_kernels.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {(line["mode"], line["provider"]) for line in lines} == {
        ("device", "eager"),
        *(("adamw", name) for name in ("eager", "RowSparseAdamW.step", "torch SparseAdam.step")),
        ("adamw", "torch AdamW.step, all rows"),
    }
    assert all(line["ms"] > 0 and line["commit"] == "abc" for line in lines)
    assert [line["matches_reference"] for line in lines if line["provider"] == "eager"] == [True] * 4
    assert (tmp_path / "row_kernels.png").read_bytes().startswith(b"\x89PNG")


def test_the_benchmark_of_the_bounded_norm_runs(harness: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra `bench`)")
    size = ["--device", "cpu", "--shapes", "4x32"]
    import_module("benchmarks.bhyt_norm").main([*size, "--output", str(tmp_path), "--commit", "abc"])
    lines = [json.loads(line) for line in (tmp_path / "bhyt_norm.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {(line["mode"], line["provider"]) for line in lines}
    assert {"BHyT, exact", "BHyT, estimated", "RMSNorm, stock"} <= {provider for _, provider in found}
    assert all(line["ms"] > 0 and line["floor_bytes"] % (8 * 4 * 32) == 0 for line in lines)
    assert (tmp_path / "bhyt_norm.png").read_bytes().startswith(b"\x89PNG")
