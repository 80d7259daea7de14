"""The benchmark of embeddings under Monarch attention compares what it says, tried on a tiny model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from hf_efficient.modeling.monarch.monarch_spec import MonarchSpec


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, repository_root: Path) -> ModuleType:
    monkeypatch.syspath_prepend(repository_root)
    return import_module("benchmarks.monarch_quality")


@pytest.fixture
def model() -> BertModel:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return BertModel(BertConfig(vocab_size=200, initializer_range=0.5, **shape)).eval()


def _documents(count: int, tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 200, (count, tokens), generator=generator).tolist()


def test_top_k_keeps_the_largest_scores_and_renormalises(benchmark: ModuleType) -> None:
    q, k, v = torch.randn(3, 1, 2, 24, 8, dtype=torch.float64)
    top_k = benchmark.TopK(block_size=4)
    assert top_k.kept(24) == 10, "density (4 + 6) / (4 * 6) of 24 keys"
    weights = (0.5 * q @ k.mT).softmax(-1)
    kept = torch.zeros_like(weights).scatter(-1, weights.topk(10).indices, 1.0) * weights
    expected = kept / kept.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(top_k(q, k, v, 0.5), expected)


def test_drift_is_zero_where_the_attention_is_exact_and_not_elsewhere(benchmark: ModuleType, model: BertModel) -> None:
    texts = benchmark.cut_texts(_documents(4, 40), [(17, 32)], 3, (1, 2))
    assert list(texts) == ["17-32"] and len(texts["17-32"]) == 3
    assert all(17 <= text.shape[1] <= 32 and text[0, 0] == 1 and text[0, -1] == 2 for text in texts["17-32"])
    softmax = {bucket: benchmark.embed(model, each) for bucket, each in texts.items()}

    def drift(attention: object) -> float:
        benchmark.use(model, attention)
        return benchmark.drift(model, texts, softmax)["17-32"]["mean"]

    # One block holds every text, and the density of one block keeps every key.
    assert abs(drift(MonarchSpec(block_size=32))) < 1e-5 and abs(drift(benchmark.TopK(32))) < 1e-5
    first, both = drift(MonarchSpec(block_size=8, layers=(0,))), drift(MonarchSpec(block_size=8))
    assert first > 1e-3 and both > 1e-3 and first != both
    assert drift(benchmark.TopK(8)) > 5e-5


def test_measurements_of_all_settings_are_drawn(benchmark: ModuleType, model: BertModel, tmp_path: Path) -> None:
    options = SimpleNamespace(texts=2, block_sizes=(8, 16))
    result = benchmark.measure(model, _documents(3, 520), (1, 2), options)
    assert len(result["drift"]) == 2 * (1 + 8 + 2) and len(result["drift_of_one_layer"]) == 2
    assert result["texts"] == {"32-64": 2, "64-128": 2, "128-256": 2, "256-512": 2}
    line = {"block_size": 32, "num_iters": 1}
    assert benchmark.flops_share(line, 512) == pytest.approx((6 * 32 + 4 * 16) / (4 * 512))
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (the extra `bench`)")
    benchmark.show(result)
    benchmark.draw(result, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
