"""Analysis of STEM tables, for tables whose figures are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_efficient import stem_ablate, stem_angular_spread, stem_compare_dense, stem_row_report
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.modeling.stem.modeling_stem import StemConfig, StemForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@pytest.fixture
def model() -> StemForCausalLM:
    return StemForCausalLM(StemConfig(**SHAPE, stem_layers=[1, 2], stem_init_std=1.0)).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 61, (3, 20), generator=torch.Generator().manual_seed(2))


def set_table(model: StemForCausalLM, rows: Tensor, layer: int = 1) -> None:
    model.model.layers[layer].mlp.stem_embed.weight.data = rows


def wide(rows: Tensor) -> StemForCausalLM:
    """A model around a table of another size."""
    config = StemConfig(**SHAPE | {"vocab_size": rows.shape[0], "intermediate_size": rows.shape[1]}, stem_layers=[1])
    model = StemForCausalLM(config).eval()
    set_table(model, rows)
    return model


# Angular spread


@pytest.mark.parametrize(("n", "width"), [(4000, 256), (300, 1024)])
def test_random_rows_score_the_baseline(n: int, width: int) -> None:
    spread = stem_angular_spread(wide(torch.randn(n, width)), 1)
    assert spread.baseline_std == pytest.approx(1 / math.sqrt(width))
    assert spread.std == pytest.approx(spread.baseline_std, rel=0.03)
    assert spread.p95_abs == pytest.approx(spread.baseline_p95_abs, rel=0.03)
    assert spread.p50_abs == pytest.approx(0.6745 / math.sqrt(width), rel=0.03)
    assert abs(spread.mean) < 1e-3
    assert spread.participation_ratio == pytest.approx(spread.baseline_participation, rel=0.03)
    assert spread.frac_abs_below == pytest.approx(math.erf(0.05 * math.sqrt(width / 2)), abs=0.01)
    assert spread.n_pairs == min(200_000, n * (n - 1) // 2) and spread.n_rows == n


def test_rows_around_a_common_direction_differ_from_random_ones() -> None:
    rows = torch.randn(500, 256) + 1.0  # mean cosine 1 / 2
    spread = stem_angular_spread(wide(rows), 1)
    assert spread.mean == pytest.approx(0.5, abs=0.02) and spread.p50_abs == pytest.approx(0.5, abs=0.02)
    centred = stem_angular_spread(wide(rows), 1, center=True)
    assert abs(centred.mean) < 0.01 and centred.std == pytest.approx(1 / 16, rel=0.05)


def test_rows_in_few_directions_have_a_small_participation_ratio() -> None:
    spread = stem_angular_spread(wide(torch.randn(3000, 5) @ torch.linalg.qr(torch.randn(128, 5)).Q.T), 1)
    assert spread.participation_ratio == pytest.approx(5, rel=0.05)
    assert spread.std == pytest.approx(1 / math.sqrt(5), rel=0.05)


def test_rows_of_zeros_are_dropped_and_counted() -> None:
    rows = torch.randn(300, 64)
    rows[::3] = 0
    spread = stem_angular_spread(wide(rows), 1)
    assert (spread.zero_rows, spread.n_rows) == (100, 200)
    assert spread.std == pytest.approx(1 / 8, rel=0.05)


def test_all_pairs_of_few_rows_are_exact_and_drawn_ones_repeat(model: StemForCausalLM) -> None:
    rows = model.model.layers[1].mlp.stem_embed.weight
    chosen = [3, 5, 8, 13]
    spread = stem_angular_spread(model, 1, ids=chosen, tau=0.1)
    by_hand = [float(torch.cosine_similarity(rows[a], rows[b], 0)) for a in chosen for b in chosen if a < b]
    assert spread.cosines.tolist() == pytest.approx(by_hand, abs=1e-6)
    assert spread.frac_abs_below == pytest.approx(sum(abs(c) < 0.1 for c in by_hand) / 6)
    drawn = [stem_angular_spread(model, 1, n_pairs=100, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0].cosines, drawn[1].cosines) and not torch.equal(drawn[0].cosines, drawn[2].cosines)
    assert float(drawn[0].cosines.max()) < 0.999, "no row is paired with itself"


def test_only_frequent_tokens_count(model: StemForCausalLM) -> None:
    counts = torch.zeros(61)
    counts[[3, 5, 8, 13]] = torch.tensor([4.0, 5, 6, 3])
    frequent = stem_angular_spread(model, 1, counts=counts, min_count=4)
    assert torch.equal(frequent.cosines, stem_angular_spread(model, 1, ids=[3, 5, 8]).cosines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 0}, r"layers=\[0\] must be different ones of the STEM layers \[1, 2\]"),
        ({"layer": 1, "ids": [4]}, "1 rows of layer 1 are not zero"),
        ({"layer": 1, "ids": [4, 61]}, "reach from 4 to 61, the table has 61"),
        ({"layer": 1, "ids": [4, 5], "counts": [0] * 61}, "both given"),
        ({"layer": 1, "counts": [1, 2]}, r"shape \[2\], the table 61 rows"),
    ],
)
def test_a_spread_that_cannot_be_is_refused(model: StemForCausalLM, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HFEError, match=message):
        stem_angular_spread(model, **arguments)


# One row


def test_row_report_names_neighbours_and_channels(model: StemForCausalLM) -> None:
    rows, mlp = torch.randn(61, 48), model.model.layers[1].mlp
    rows[7] = 0
    rows[7, 4], rows[7, 9] = -3.0, 2.0
    rows[20] = 5 * rows[7]
    rows[21] = -rows[7]
    set_table(model, rows)
    with torch.no_grad():
        mlp.down_proj.weight[:, 4] *= 0.01 / mlp.down_proj.weight[:, 4].norm()
        mlp.down_proj.weight[:, 9] *= 4.0 / mlp.down_proj.weight[:, 9].norm()
    report = stem_row_report(model, 7, 1, k=60)
    assert report.neighbours[0][0] == 20 and report.neighbours[0][2] == pytest.approx(1)
    assert report.neighbours[-1][0] == 21 and report.neighbours[-1][2] == pytest.approx(-1)
    assert [j for j, _, _ in report.channels[:2]] == [9, 4]
    assert report.channels[0][1:] == pytest.approx((2.0, 8.0)) and report.channels[1][1:] == pytest.approx((-3.0, 0.03))
    shorter = int((rows.norm(dim=1) < 3.6055).sum())
    assert report.norm == pytest.approx(math.sqrt(13)) and report.norm_percentile == pytest.approx(100 * shorter / 61)


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0])


def test_row_report_takes_and_gives_text(model: StemForCausalLM) -> None:
    tokenizer = tokenizer_of([f"w{i}" for i in range(61)])
    report = stem_row_report(model, "w7", 2, k=3, tokenizer=tokenizer)
    assert (report.token, report.text) == (7, "w7")
    assert [text for _, text, _ in report.neighbours] == [f"w{i}" for i, _, _ in report.neighbours]
    with pytest.raises(HFEError, match="'w7 w8' is 2 tokens"):
        stem_row_report(model, "w7 w8", 2, tokenizer=tokenizer)
    with pytest.raises(HFEError, match="no tokenizer was given"):
        stem_row_report(model, "w7", 2)
    with pytest.raises(HFEError, match=r"token 61 is outside 0\.\.60"):
        stem_row_report(model, 61, 2)


# Against the dense model


def dense_twin(model: StemForCausalLM) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def test_rows_that_are_the_up_projection_have_cosine_one(model: StemForCausalLM) -> None:
    """On a text in which each token occurs once, the rows can be the up-projection's outputs."""
    dense, ids = dense_twin(model), torch.randperm(61)[None, :20]
    outputs: dict[int, Tensor] = {}
    hooks = [
        dense.model.layers[layer].mlp.up_proj.register_forward_hook(
            lambda _, args, out, layer=layer: outputs.__setitem__(layer, out[0])
        )
        for layer in (1, 2)
    ]
    with torch.no_grad():
        dense(input_ids=ids)
        for hook in hooks:
            hook.remove()
        for layer in (1, 2):
            model.model.layers[layer].mlp.stem_embed.weight[ids[0]] = 2 * outputs[layer]
    for found in stem_compare_dense(model, dense, ids):
        assert found.tokens == 19
        assert found.up_cosine == pytest.approx(1, abs=1e-5) and found.gated_cosine == pytest.approx(1, abs=1e-5)
        assert found.norm_ratio == pytest.approx(2, abs=1e-4)
    with torch.no_grad():
        model.model.layers[2].mlp.stem_embed.weight.neg_()
    first, second = stem_compare_dense(model, dense, ids)
    assert (first.layer, second.layer) == (1, 2)
    assert first.up_cosine == pytest.approx(1, abs=1e-5) and second.gated_cosine == pytest.approx(-1, abs=1e-5)


def test_comparing_leaves_no_hook_and_refuses_other_shapes(model: StemForCausalLM, ids: Tensor) -> None:
    dense = dense_twin(model)
    stem_compare_dense(model, dense, ids)
    assert not any(module._forward_pre_hooks for module in dense.modules())
    narrow = LlamaForCausalLM(LlamaConfig(**SHAPE | {"intermediate_size": 40}))
    with pytest.raises(HFEError, match="layer 1 of the dense model has no up-projection of width 48"):
        stem_compare_dense(model, narrow, ids)
    assert not any(module._forward_pre_hooks for module in narrow.modules())


# Ablation


@torch.no_grad()
def losses(model: StemForCausalLM, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_ablation_is_the_loss_with_other_tables(model: StemForCausalLM, ids: Tensor, mode: str) -> None:
    weights = {layer: model.model.layers[layer].mlp.stem_embed.weight.detach().clone() for layer in (1, 2)}
    plain = losses(model, ids)
    found = stem_ablate(model, ids, mode=mode)
    assert [ablation.layers for ablation in found] == [[1], [2], [1, 2]]
    for ablation in found:
        for layer in ablation.layers:
            row = torch.zeros(48) if mode == "zero" else weights[layer][ids.flatten()].mean(0)
            set_table(model, row.expand(61, -1).clone(), layer)
        expected = losses(model, ids)
        for layer, table in weights.items():
            set_table(model, table, layer)
        assert ablation.nll == pytest.approx(float(expected.mean()), abs=1e-5)
        assert ablation.delta_nll.mean == pytest.approx(float((expected - plain).mean()), abs=1e-5)
        assert ablation.delta_nll.low < ablation.delta_nll.mean < ablation.delta_nll.high
        assert ablation.by_role == {"all": (pytest.approx(ablation.delta_nll.mean, abs=1e-6), 57)}
    assert all(not layer.mlp.stem_embed._forward_hooks for layer in model.model.layers[1:])
    assert torch.equal(losses(model, ids), plain)


def test_roles_share_out_the_rise(model: StemForCausalLM, ids: Tensor) -> None:
    words = ["<unk>", "Ġ", "Ġthe", "ing", "12", ".", *(f"Ġw{'x' * i}" for i in range(55))]
    (found,) = stem_ablate(model, ids, layers=[[1, 2]], tokenizer=tokenizer_of(words))
    counts = {role: n for role, (_, n) in found.by_role.items()}
    inputs = ids[:, 1:-1]
    assert counts["first"] == 3 and counts["number"] == int((inputs == 4).sum())
    assert counts.get("rest", 0) == int((inputs == 3).sum()) and sum(counts.values()) == 57
    assert sum(mean * n for mean, n in found.by_role.values()) / 57 == pytest.approx(found.delta_nll.mean, abs=1e-6)


def test_an_ablation_that_cannot_be_is_refused(model: StemForCausalLM, ids: Tensor) -> None:
    with pytest.raises(HFEError, match="mode='noise' is unknown"):
        stem_ablate(model, ids, mode="noise")
    with pytest.raises(HFEError, match=r"layers=\[0\] must be"):
        stem_ablate(model, ids, layers=[0])
    with pytest.raises(UsageError, match="text needs a tokenizer"):
        stem_ablate(model)
    with pytest.raises(HFEError, match=r"shape \[60\] are not \[B, S\]"):
        stem_ablate(model, ids.flatten())
