"""The benchmarks of whole models: what is compared computes what it says, tried on a tiny model on the CPU."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch, repository_root: Path) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(repository_root)
    return {
        name: import_module(f"benchmarks.{name}") for name in ("bhyt_train", "bhyt_decode", "llama_norms", "harness")
    }


def _lines(path: Path) -> dict[str, dict]:
    return {line["provider"]: line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def test_training_steps_of_one_function_have_one_loss(benchmarks: dict[str, ModuleType], tmp_path: Path) -> None:
    """bfloat16 moves the losses of this model by about 1e-4, another norm by 2e-3 and more."""
    options = ["--tiny", "--device", "cpu", "--parts", "eager", "--output", str(tmp_path), "--commit", "abc"]
    benchmarks["bhyt_train"].main(options)
    lines = _lines(tmp_path / "bhyt_train.jsonl")
    exact = {"stock's decoder, BHyT exact", "ours, BHyT exact", "ours, BHyT exact, carried"}
    estimated = {"ours, BHyT approximate", "ours, BHyT approximate, carried"}
    rms = {"stock", "stock's decoder, F.rms_norm", "ours, RMSNorm"}
    none = {"stock's decoder, no norms", "ours, no norms"}
    assert exact | estimated | rms | none <= {name for name in lines if "Liger" not in name}
    means = []
    for group in (rms, exact | estimated, none):
        losses = [lines[name]["loss"] for name in group]
        assert max(losses) - min(losses) < 5e-4, group
        means.append(sum(losses) / len(losses))
    assert min(abs(means[i] - means[i - 1]) for i in range(3)) > 1.5e-3
    for line in lines.values():
        assert line["ms"] > 0 and line["commit"] == "abc" and line["shape"] == "tiny" and line["computes"]
        assert line["stock_over_it"] == pytest.approx(lines["stock"]["ms"] / line["ms"], rel=1e-2)
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra `bench`)")
    assert (tmp_path / "bhyt_train.png").read_bytes().startswith(b"\x89PNG")


@torch.no_grad()
def test_decoding_steps_of_one_function_have_one_result(benchmarks: dict[str, ModuleType]) -> None:
    """Fused or apart, in stock's decoder or ours: the logits agree; with another norm they do not."""
    norms, decode = benchmarks["llama_norms"], benchmarks["bhyt_decode"]
    base = norms.llama(norms.TINY, torch.device("cpu")).eval()
    for layer in base.model.layers:  # with norms of 1, BHyT would not differ from RMSNorm in much but its scale
        layer.input_layernorm.weight.uniform_(0.5, 2.0)
    logits = {}
    for name, (_, step, set_back) in decode.steps_of(base, norms.TINY, None).items():
        set_back()
        logits[name] = torch.as_tensor(step()).flatten().float()
        set_back()
        assert torch.equal(torch.as_tensor(step()).flatten().float(), logits[name]), "set back, it repeats itself"
    rms = ("stock", "stock's decoder, F.rms_norm", "stock's decoder, RMSNorm, both additions", "ours, RMSNorm")
    bhyt = ("stock's decoder, BHyT", "stock's decoder, BHyT, one addition", "stock's decoder, BHyT, both additions")
    none = ("stock's decoder, no norms", "ours, no norms")
    firsts = [logits[group[0]] for group in (rms, bhyt, none)]
    for first, group in zip(firsts, (rms, bhyt, none), strict=True):
        assert all((logits[name] - first).norm() < 0.03 * first.norm() for name in group), group
    for i in range(3):
        assert (firsts[i] - firsts[i - 1]).norm() > 0.2 * firsts[i].norm()


def test_later_results_replace_earlier_ones_of_the_same_name(benchmarks: dict[str, ModuleType], tmp_path: Path) -> None:
    path, line = tmp_path / "results.jsonl", {"part": "eager", "provider": "stock", "ms": 1.0}
    benchmarks["harness"].write(path, [line, {**line, "provider": "other"}, {**line, "part": "compiled"}])
    benchmarks["harness"].write(path, [{**line, "ms": 2.0}])
    found = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    assert sorted((x["part"], x["provider"], x["ms"]) for x in found) == [
        ("compiled", "stock", 1.0),
        ("eager", "other", 1.0),
        ("eager", "stock", 2.0),
    ]
