"""What the STEM initialisers promise: exactness where it is possible, optimality where it is not."""

from __future__ import annotations

import pytest
import torch

from hf_efficient.conversion.measuring.layerwise import LayerwisePass
from hf_efficient.conversion.stem.patch import Stem
from hf_efficient.conversion.stem.tables import observe_feed_forward
from hf_efficient.errors import HFEError

FITTED = ["gated_mean", "mean"]


def logits(source, ids):
    run = LayerwisePass(source.config, source.reader, [ids])
    run.run()
    (pieces,) = run.logits(*run.batches)
    return torch.cat(list(pieces)).view(*ids.shape, -1)


def table(source, layer):
    return source.reader.tensors[f"model.layers.{layer}.mlp.stem_embed.weight"]


def feed_forward(source, ids, layer):
    """What the fit of one layer uses: tokens [N], gate and up-projection [N, F]."""
    seen = []
    run = LayerwisePass(source.config, source.reader, [ids])
    for index, module in run.layers():
        if index < layer:
            run.run_layer(index, module, run.batches[0])
            continue
        with observe_feed_forward(module.mlp, lambda *call: seen.append(call)):
            run.run_layer(index, module, run.batches[0])
        slots, _, gate, up = (torch.cat(parts) for parts in zip(*seen, strict=True))
        tokens = run.vocabulary[slots]
        counts = torch.ones_like(tokens, dtype=torch.bool)
        counts[:, 0] = ~torch.isin(tokens[:, 0], tokens[:, 1:])
        return tokens[counts], gate[counts], up[counts]
    raise AssertionError(f"no layer {layer}")


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("init", [*FITTED, "output_ls"])
def test_a_text_of_distinct_tokens_is_converted_exactly(source, distinct_text, init, sequential):
    patch = Stem(layers=[0, 1, 3], init=init, shrinkage=0.0, sequential=sequential)
    patched = source.convert(patch, source.calibration(distinct_text))
    expected = source.stock(distinct_text).logits
    assert (logits(patched, distinct_text) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("init", FITTED)
def test_without_attention_every_text_of_known_tokens_is_converted_exactly(source, text, init):
    for name, tensor in source.reader.tensors.items():
        if ".o_proj." in name:
            tensor.zero_()  # these are the stock model's own weights
    patched = source.convert(Stem(layers=[0, 1, 2, 3], init=init, shrinkage=0.0), source.calibration(text))
    known = text[:, 1:].unique()
    new = known[torch.randint(len(known), (3, 25))]
    expected = source.stock(new).logits
    assert (logits(patched, new) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("init", FITTED)
def test_contextual_text_is_not_converted_exactly(source, text, init):
    """Guards the two tests above: on ordinary text a table does lose something."""
    patched = source.convert(Stem(layers=[1, 2], init=init), source.calibration(text))
    expected = source.stock(text).logits
    assert (logits(patched, text) - expected).abs().max() > 1e-2 * expected.abs().max()


def expected_prior(source, text, layer, init, shrinkage=4.0, ridge=0.05):
    """The prior of every token by its formula, in fp64 and with explicit solves."""
    ids, gate, up = feed_forward(source, text, layer)
    up = up.double()
    weight = gate.double().square() if init == "gated_mean" else torch.ones_like(up)
    embedding = source.reader.tensors["model.embed_tokens.weight"].double()
    mean_row = (weight * up).sum(0) / weight.sum(0)
    gram, cross = torch.zeros(2, 1)
    drawn = 0.1 * weight.mean(0)
    for token in ids.unique():
        own, e = ids == token, embedding[token]
        row = ((weight * up)[own].sum(0) + drawn * mean_row) / (weight[own].sum(0) + drawn)
        reliability = own.sum() / (own.sum() + shrinkage)
        gram = gram + reliability * torch.outer(e, e)
        cross = cross + reliability * torch.outer(e, row - mean_row)
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram))
    return mean_row + embedding @ torch.linalg.solve(gram, cross)


@pytest.mark.parametrize("init", FITTED)
def test_rows_are_the_shrunk_mean_of_their_tokens_occurrences(source, text, init):
    """Against the formula, token by token in fp64."""
    shrinkage, layer = 3.0, 2
    patched = source.convert(Stem(layers=[layer], init=init, shrinkage=shrinkage), source.calibration(text))
    prior = expected_prior(source, text, layer, init, shrinkage)
    ids, gate, up = feed_forward(source, text, layer)
    gate, up = gate.double(), up.double()
    weight = gate.square() if init == "gated_mean" else torch.ones_like(up)
    kappa = shrinkage * weight.mean(0)
    for token in ids.unique():
        own = ids == token
        expected = ((weight * up)[own].sum(0) + kappa * prior[token]) / (weight[own].sum(0) + kappa)
        torch.testing.assert_close(table(patched, layer)[token].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ridge", [0.05, 2.0])
def test_the_prior_is_the_ridge_regression_of_rows_on_embeddings(source, text, ridge):
    patched = source.convert(Stem(layers=[2], init="ridge", ridge=ridge), source.calibration(text))
    expected = expected_prior(source, text, 2, "gated_mean", ridge=ridge)
    torch.testing.assert_close(table(patched, 2).double(), expected, rtol=1e-3, atol=1e-3)


def test_much_shrinkage_gives_the_prior(source, text):
    calibration = source.calibration(text)
    shrunk = source.convert(Stem(layers=[1], shrinkage=1e9), calibration)
    prior = source.convert(Stem(layers=[1], init="ridge", shrinkage=1e9), calibration)
    torch.testing.assert_close(table(shrunk, 1), table(prior, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", FITTED)
def test_tokens_absent_from_the_text_get_the_prior(source, text, init):
    patched = source.convert(Stem(layers=[1], init=init), source.calibration(text))
    prior = expected_prior(source, text, 1, init).float()
    absent = ~torch.isin(torch.arange(97), text)
    assert absent.sum() >= 97 // 2
    torch.testing.assert_close(table(patched, 1)[absent], prior[absent], rtol=1e-3, atol=1e-3)
    assert not torch.isclose(table(patched, 1)[~absent], prior[~absent], rtol=1e-3).all()


def test_a_channel_whose_gate_never_opens_leaves_finite_rows(tiny_source, text):
    source = tiny_source(hidden_act="relu")
    source.reader.tensors["model.layers.1.mlp.gate_proj.weight"][3] = 0.0
    patched = source.convert(Stem(layers=[1]), source.calibration(text))
    assert table(patched, 1).isfinite().all()
    assert (table(patched, 1)[:, 3] == 0).all()


def objective(ids, gate, up, rows, metric):
    """Squared error of a table, in u or in g * u."""
    off = up.double() - rows.double()[ids]
    return float((off * (gate.double() if metric == "gated_mean" else 1.0)).square().sum())


@pytest.mark.parametrize("init", FITTED)
def test_every_change_of_a_row_moves_away_from_the_calibration_text(source, text, init):
    layer = 1
    patched = source.convert(Stem(layers=[layer], init=init, shrinkage=0.0), source.calibration(text))
    ids, gate, up = feed_forward(source, text, layer)
    best = table(patched, layer)
    lowest = objective(ids, gate, up, best, init)
    for step in (1e-2, 1.0):
        for _ in range(5):
            moved = best.clone()
            moved[ids.unique()] += step * torch.randn(len(ids.unique()), best.shape[1])
            assert objective(ids, gate, up, moved, init) > lowest
    other = source.convert(
        Stem(layers=[layer], init=FITTED[1 - FITTED.index(init)], shrinkage=0.0), source.calibration(text)
    )
    assert objective(ids, gate, up, table(other, layer), init) > lowest


def test_the_bias_of_the_up_projection_is_absorbed(tiny_source, text):
    source = tiny_source("llama-biased")
    calibration = source.calibration(text)
    before = source.convert(Stem(layers=[1]), calibration)
    source.reader.tensors["model.layers.1.mlp.up_proj.bias"] += 3.0
    after = source.convert(Stem(layers=[1]), calibration)
    torch.testing.assert_close(table(after, 1), table(before, 1) + 3.0, rtol=1e-4, atol=1e-3)
    assert not any("1.mlp.up_proj" in name for name in after.reader.tensors)


def test_a_first_position_counts_only_for_a_token_that_occurs_nowhere_else(tiny_source):
    """A BOS is always first, so it is fitted there; for other tokens the first position is not representative."""
    source = tiny_source()
    body = torch.randint(10, 40, (4, 20))
    with_bos = torch.cat((torch.tensor([[3]] * 4), body), 1)
    converted = source.convert(Stem(layers=[1], shrinkage=0.0), source.calibration(with_bos))
    ids, _, up = feed_forward(source, with_bos, 1)
    torch.testing.assert_close(table(converted, 1)[3], up[ids == 3][0], rtol=1e-3, atol=1e-3)

    seen = torch.cat((body[:, 5:6], body), 1)
    token = int(seen[0, 0])
    converted = source.convert(Stem(layers=[1], shrinkage=0.0, init="mean"), source.calibration(seen))
    ids, _, up = feed_forward(source, seen, 1)
    assert (ids == token).sum() == (body == token).sum()
    torch.testing.assert_close(table(converted, 1)[token], up[ids == token].mean(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sequential", [False, True])
def test_two_conversions_agree_bit_for_bit(tiny_source, text, sequential):
    source = tiny_source()
    patch = {"layers": [1, 2], "sequential": sequential}
    one, two = (source.convert(Stem(**patch), source.calibration(text)) for _ in range(2))
    assert all(torch.equal(table(one, i), table(two, i)) for i in (1, 2))


def test_in_sequence_a_layer_meets_the_gates_of_the_converted_layers_below(tiny_source, text):
    """Its rows are the least-squares fit, under those gates, of what the source's feed-forward gives."""
    source = tiny_source()
    calibration = source.calibration(text)
    simultaneous = source.convert(Stem(layers=[1, 2], shrinkage=0.0, sequential=False), calibration)
    sequential = source.convert(Stem(layers=[1, 2], shrinkage=0.0), calibration)
    assert torch.equal(table(simultaneous, 1), table(sequential, 1))
    first = source.convert(Stem(layers=[1], shrinkage=0.0), calibration)
    ids, met, _ = feed_forward(first, text, 2)
    _, gate, up = feed_forward(source, text, 2)
    assert (met - gate).abs().max() > 0.1 * gate.abs().max()
    for token in ids.unique():
        own = ids == token
        expected = (met * gate * up)[own].sum(0) / met.square()[own].sum(0)
        torch.testing.assert_close(table(sequential, 2)[token], expected, rtol=1e-3, atol=1e-3)


def output_error(source, ids, gate, up, rows, layer):
    """Squared distance of what the feed-forward gives out with a table from what the source's gives, in fp64."""
    off = gate.double() * (up.double() - rows.double()[ids])
    return float((off @ source.reader.tensors[f"model.layers.{layer}.mlp.down_proj.weight"].double().T).square().sum())


def test_the_output_fit_is_closest_in_what_the_feed_forward_gives_out(source, text, monkeypatch):
    """Once it has converged: no other initialiser and no change of its own rows comes closer."""
    monkeypatch.setattr("hf_efficient.conversion.stem.output_fit.STEPS", 300)
    monkeypatch.setattr("hf_efficient.conversion.stem.output_fit._TOLERANCE", 1e-5)
    layer = 1
    ids, gate, up = feed_forward(source, text, layer)
    errors = {}
    for init in ("output_ls", *FITTED):
        patched = source.convert(Stem(layers=[layer], init=init, shrinkage=0.0), source.calibration(text))
        errors[init] = output_error(source, ids, gate, up, table(patched, layer), layer)
        if init == "output_ls":
            best = table(patched, layer)
    assert errors["output_ls"] < 0.95 * min(errors[init] for init in FITTED)
    for step in (1e-2, 1.0):
        for _ in range(5):
            moved = best.clone()
            moved[ids.unique()] += step * torch.randn(len(ids.unique()), best.shape[1])
            assert output_error(source, ids, gate, up, moved, layer) > errors["output_ls"]


def test_the_output_fit_solves_its_normal_equations(tiny_source, text, monkeypatch):
    """Shrinkage included, against a direct solution in fp64 for every token."""
    monkeypatch.setattr("hf_efficient.conversion.stem.output_fit.STEPS", 300)
    monkeypatch.setattr("hf_efficient.conversion.stem.output_fit._TOLERANCE", 1e-5)
    source, layer, shrinkage = tiny_source(), 2, 3.0
    patched = source.convert(Stem(layers=[layer], init="output_ls", shrinkage=shrinkage), source.calibration(text))
    prior = expected_prior(source, text, layer, "gated_mean", shrinkage)
    ids, gate, up = (part.double() if part.is_floating_point() else part for part in feed_forward(source, text, layer))
    down = source.reader.tensors[f"model.layers.{layer}.mlp.down_proj.weight"].double()
    metric = down.T @ down
    pull = shrinkage * gate.square().mean(0) * metric.diagonal()
    for token in ids.unique():
        g, a = gate[ids == token], (gate * up)[ids == token]
        matrix = metric * (g.T @ g) + pull.diag()
        expected = torch.linalg.solve(matrix, (g * (a @ metric)).sum(0) + pull * prior[token])
        torch.testing.assert_close(table(patched, layer)[token].double(), expected, rtol=2e-3, atol=2e-3)
    absent = ~torch.isin(torch.arange(97), text)
    torch.testing.assert_close(table(patched, layer)[absent], prior[absent].float(), rtol=1e-3, atol=1e-3)


def test_the_output_fit_is_the_gated_mean_where_channels_do_not_mix(tiny_source, text):
    """With a projection whose columns are orthogonal, every channel is a problem of its own."""
    source = tiny_source(hidden_size=48)
    down = source.reader.tensors["model.layers.1.mlp.down_proj.weight"]
    down.copy_(torch.diag(torch.rand(48) + 0.5)[torch.randperm(48)])
    calibration = source.calibration(text)
    one, two = (source.convert(Stem(layers=[1], init=init), calibration) for init in ("output_ls", "gated_mean"))
    torch.testing.assert_close(table(one, 1), table(two, 1), rtol=1e-4, atol=1e-5)


def test_the_output_fit_says_what_memory_it_would_take(tiny_source, text, monkeypatch):
    monkeypatch.setattr("hf_efficient.conversion.stem.output_fit._MAX_BYTES", 1 << 10)
    source = tiny_source()
    with pytest.raises(HFEError, match=r"keeps the gates of 192 tokens of 48 channels.*fewer tokens"):
        source.convert(Stem(layers=[1], init="output_ls"), source.calibration(text))
