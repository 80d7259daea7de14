"""monarch_attention against the mathematics: oracles that share no code with it."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from hf_efficient.errors import BackendError
from hf_efficient.kernels.monarch_attention import api
from hf_efficient.kernels.monarch_attention.api import monarch_attention
from hf_efficient.kernels.monarch_attention.layout import ROW_AXES, GridLayout, SequenceLayout
from hf_efficient.kernels.monarch_attention.objective import monarch_matrix, monarch_objective
from hf_efficient.kernels.monarch_attention.reference import monarch_factors

DOUBLE = torch.float64
LAYOUTS = {
    "sequence": (SequenceLayout(4), 24),
    "frames": (GridLayout(3, 5), 45),
    "frames tied": (GridLayout(2, 3, f_tied=3), 36),
    "frames cut both ways": (GridLayout(4, 6, h_reduce=2, w_reduce=3), 48),
    "columns first": (GridLayout(3, 4, f_tied=2, row_axes="w"), 48),
}
by_layout = pytest.mark.parametrize("name", LAYOUTS)
by_iterations = pytest.mark.parametrize("num_iters", [1, 2, 3])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _draw(num_queries: int, num_keys: int | None = None, head_dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    keys = (2, 3, num_queries if num_keys is None else num_keys, head_dim)
    q = torch.randn(2, 3, num_queries, head_dim, dtype=DOUBLE)
    return q, torch.randn(keys, dtype=DOUBLE), torch.randn(keys, dtype=DOUBLE)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[3] ** -0.5).softmax(-1) @ v


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def literal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout | GridLayout,
    num_iters: int = 1,
    tiles_of_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The formulas of the papers with their division by cR, all tiles at once; the output, and the final logits u."""
    scale = q.shape[3] ** -0.5
    q_index, k_index = layout.token_index(q.shape[2]), layout.token_index(k.shape[2])
    tiles, keys = len(q_index), len(k_index)
    queries, k, v = q[:, :, q_index], k[:, :, k_index], v[:, :, k_index]
    averaged = torch.stack([queries] * keys, dim=3)
    mass = torch.ones(averaged.shape[:-1], dtype=q.dtype)
    for _ in range(num_iters):
        right = (scale * torch.einsum("zhafkjd,zhfkld->zhafkjl", averaged, k) / mass[..., None]).softmax(-1)
        expected = scale * torch.einsum("zhafkjl,zhfkld->zhafkjd", right, k)
        negative_entropy = torch.xlogy(right, right).sum(-1)
        u = torch.einsum("zhaijd,zhafkjd->zhajifk", queries, expected)
        u = u - torch.einsum("zhafkj->zhajfk", negative_entropy)[:, :, :, :, None]
        if tiles_of_chunk is not None:
            chunk = torch.arange(tiles) // tiles_of_chunk
            unseen = chunk[:, None] < torch.arange(keys) // tiles_of_chunk
            u = u.masked_fill(unseen[:, None, None, :, None], -torch.inf)
        left = u.flatten(-2).softmax(-1).view_as(u)
        averaged = torch.einsum("zhajifk,zhaijd->zhafkjd", left, queries)
        mass = torch.einsum("zhajifk->zhafkj", left)
        mass = mass + (mass == 0)  # of unseen tiles
    summaries = torch.einsum("zhafkjl,zhfkld->zhafkjd", right, v)
    out = torch.empty_like(q)
    out[:, :, q_index.flatten()] = torch.einsum("zhajifk,zhafkjd->zhaijd", left, summaries).flatten(2, 4)
    return out, u


@by_layout
@by_iterations
def test_it_is_the_formulas_of_the_papers(name: str, num_iters: int) -> None:
    layout, tokens = LAYOUTS[name]
    q, k, v = _draw(tokens)
    out = monarch_attention(q, k, v, layout, num_iters=num_iters)
    assert _error(out, literal(q, k, v, layout, num_iters)[0]) < 1e-13
    assert _error(out, _softmax_attention(q, k, v)) > 1e-2, "and not softmax attention, which it approximates"


@by_iterations
def test_all_keys_are_attended_to_where_there_are_more_than_queries(num_iters: int) -> None:
    layout = GridLayout(3, 5, row_axes="h")
    q, k, v = _draw(30, 75)
    out = monarch_attention(q, k, v, layout, num_iters=num_iters)
    assert _error(out, literal(q, k, v, layout, num_iters)[0]) < 1e-13


def test_scores_are_scaled_by_the_given_factor() -> None:
    q, k, v = _draw(24)
    expected = monarch_attention(3 * q, k, v, SequenceLayout(4), num_iters=2)
    assert _error(monarch_attention(q, k, v, SequenceLayout(4), num_iters=2, scale=3 * 8**-0.5), expected) < 1e-13


# Cases in which it is softmax attention.


@pytest.mark.parametrize(
    ("layout", "tokens"),
    [
        (SequenceLayout(24), 24),
        (GridLayout(24, 1), 24),
        (GridLayout(1, 1), 24),
        (GridLayout(4, 6, h_reduce=4), 48),
        (GridLayout(4, 6, w_reduce=6), 48),
    ],
    ids=["one row", "one column", "one token", "tiles of one row", "tiles of one column"],
)
@by_iterations
def test_tiles_with_one_row_or_one_column_are_softmax_attention(
    layout: SequenceLayout | GridLayout, tokens: int, num_iters: int
) -> None:
    q, k, v = _draw(tokens)
    out = monarch_attention(q, k, v, layout, num_iters=num_iters)
    assert _error(out, _softmax_attention(q, k, v)) < 1e-12


def _separable(frames: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k whose scores are a sum of three terms, each of the two positions on one axis only; any v."""
    places = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width))
    q, k = (
        torch.cat([torch.randn(size, 4, dtype=DOUBLE)[places[:, axis]] for axis, size in enumerate(sizes)], dim=1)
        for sizes in [(frames, height, width)] * 2
    )
    return q[None, None], k[None, None], torch.randn(1, 1, len(places), 12, dtype=DOUBLE)


@pytest.mark.parametrize("row_axes", ROW_AXES)
@pytest.mark.parametrize("cuts", [(1, 1, 1), (3, 1, 1), (3, 2, 1), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("num_iters", [1, 2])
def test_separable_scores_are_exact_for_every_choice_of_row_axes(
    row_axes: str, cuts: tuple[int, int, int], num_iters: int
) -> None:
    q, k, v = _separable(3, 4, 6)
    out = monarch_attention(q, k, v, GridLayout(4, 6, *cuts, row_axes), num_iters=num_iters)
    assert _error(out, _softmax_attention(q, k, v)) < 1e-12


def test_separable_scores_are_not_exact_where_blocks_cut_through_an_axis() -> None:
    q, k, v = _separable(3, 4, 6)
    exact = _softmax_attention(q, k, v)
    assert _error(monarch_attention(q, k, v, SequenceLayout(6)), exact) < 1e-12, "a block for each image row"
    assert all(_error(monarch_attention(q, k, v, SequenceLayout(b)), exact) > 0.1 for b in (4, 8, 9))


@by_iterations
def test_equal_queries_in_a_column_or_equal_keys_in_a_row_are_exact(num_iters: int) -> None:
    q, k, v = _draw(24)
    of_columns = q.unflatten(2, (6, 4))[:, :, :1].expand(-1, -1, 6, -1, -1).flatten(2, 3)
    of_rows = k.unflatten(2, (6, 4))[:, :, :, :1].expand(-1, -1, -1, 4, -1).flatten(2, 3)
    for queries, keys in ((of_columns, k), (q, of_rows)):
        out = monarch_attention(queries, keys, v, SequenceLayout(4), num_iters=num_iters)
        assert _error(out, _softmax_attention(queries, keys, v)) < 1e-12


@by_layout
@by_iterations
def test_zero_queries_read_the_mean_and_constant_values_are_returned(name: str, num_iters: int) -> None:
    layout, tokens = LAYOUTS[name]
    q, k, v = _draw(tokens)
    mean = monarch_attention(torch.zeros_like(q), k, v, layout, num_iters=num_iters)
    assert _error(mean, v.mean(2, keepdim=True).expand_as(v)) < 1e-12
    constant = monarch_attention(5 * q, k, v[:, :, :1].expand_as(v), layout, num_iters=num_iters)
    assert _error(constant, v[:, :, :1].expand_as(v)) < 1e-12


def test_strongly_negative_scores_are_normalised() -> None:
    q, k, v = _draw(24)
    k = k - 1e4 * q.sum(2, keepdim=True) / q.sum(2, keepdim=True).square().sum(-1, keepdim=True)
    for num_iters in (1, 2):
        out = monarch_attention(q, k, torch.ones_like(v), SequenceLayout(4), num_iters=num_iters)
        assert _error(out, torch.ones_like(out)) < 1e-12


# The weights, and the objective that they maximise.


@by_layout
@by_iterations
def test_weights_are_positive_sum_to_one_and_give_the_output(name: str, num_iters: int) -> None:
    layout, tokens = LAYOUTS[name]
    q, k, v = _draw(tokens)
    weights = monarch_matrix(q, k, layout, num_iters=num_iters)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, tokens, dtype=DOUBLE), rtol=0, atol=1e-12)
    assert _error(weights @ v, monarch_attention(q, k, v, layout, num_iters=num_iters)) < 1e-13


@by_layout
def test_each_iteration_raises_the_objective_towards_that_of_softmax_attention(name: str) -> None:
    layout, tokens = LAYOUTS[name]
    q, k, v = _draw(tokens)
    scores = q @ k.mT * 8**-0.5
    best = scores.logsumexp(-1).sum(-1)
    previous = torch.full_like(best, -torch.inf)
    for num_iters in range(1, 6):
        weights = monarch_matrix(q, k, layout, num_iters=num_iters)
        objective = monarch_objective(weights, q, k)
        # Its closed form: the log-sum-exp of the last logits.
        u = literal(q, k, v, layout, num_iters)[1]
        torch.testing.assert_close(objective, u.flatten(-2).logsumexp(-1).sum((2, 3, 4)), rtol=1e-12, atol=0)
        assert (objective >= previous - 1e-9).all() and (objective <= best + 1e-9).all()
        divergence = (weights * (weights.log() - scores.log_softmax(-1))).sum((2, 3))
        torch.testing.assert_close(best - objective, divergence, rtol=1e-9, atol=1e-9)
        previous = objective


def _one_tile(num_iters: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys of one tile of 6 rows and 4 columns, and the factors R and L of their weights."""
    q, k, _ = (x[:1, :1].clone() for x in torch.randn(3, 2, 3, 24, 8, dtype=DOUBLE))
    valid = torch.ones(1, 1, 6, 4, dtype=torch.bool)
    tiled = q.unflatten(2, (6, 4)), k.unflatten(2, (6, 4))[:, :, None]
    right, log_left = monarch_factors(*tiled, valid, valid[:, :, None], SequenceLayout(4), num_iters, 8**-0.5)
    return q, k, right, log_left.exp()


def _weights(right: Tensor, left: Tensor) -> Tensor:
    """P [1, 1, 24, 24] of the factors of one tile."""
    return torch.einsum("zhjik,zhkjl->zhijkl", left, right[:, :, 0]).flatten(4, 5).flatten(2, 3)


def test_the_first_step_of_an_iteration_does_not_lower_the_objective() -> None:
    for num_iters in range(1, 5):
        torch.manual_seed(3)
        q, k, right, left = _one_tile(num_iters)
        torch.manual_seed(3)
        _, _, next_right, _ = _one_tile(num_iters + 1)
        before, after = (monarch_objective(_weights(r, left), q, k) for r in (right, next_right))
        assert after >= before - 1e-12


def test_no_change_of_one_row_of_a_factor_raises_the_objective_after_many_iterations() -> None:
    q, k, right, left = _one_tile(50)
    reached = monarch_objective(_weights(right, left), q, k)
    for draw in range(200):
        other_right, other_left = right.clone(), left.clone()
        factor = (other_right if draw % 2 else other_left).flatten(0, -2)
        row = int(torch.randint(len(factor), ()))
        other = torch.rand(factor.shape[1], dtype=DOUBLE).pow(8)
        share = 10.0 ** -(draw % 5)
        factor[row] = (1 - share) * factor[row] + share * other / other.sum()
        objective = monarch_objective(_weights(other_right, other_left), q, k)
        assert objective <= reached + 1e-10, "a factor's row is optimal given the other factor"
        assert objective != reached, "the change reaches the objective"


# Invariances.


@by_iterations
def test_a_vector_added_to_all_keys_changes_no_weight(num_iters: int) -> None:
    layout = GridLayout(3, 4)
    q, k, _ = _draw(36)
    shifted = k + torch.randn(2, 3, 1, 8, dtype=DOUBLE)
    before, after = (monarch_matrix(q, keys, layout, num_iters=num_iters) for keys in (k, shifted))
    assert _error(after, before) < 1e-12


@by_iterations
def test_the_order_of_key_tiles_does_not_matter_but_that_of_their_rows_does(num_iters: int) -> None:
    q, k, v = _draw(36)
    expected = monarch_attention(q, k, v, GridLayout(3, 4), num_iters=num_iters)
    k, v = (x.unflatten(2, (3, 3, 4)) for x in (k, v))
    tiles, rows = ([x.roll(1, axis).flatten(2, 4) for x in (k, v)] for axis in (2, 3))
    assert _error(monarch_attention(q, *tiles, GridLayout(3, 4), num_iters=num_iters), expected) < 1e-12
    # Row k of the keys is first read as row k of the queries asks.
    assert _error(monarch_attention(q, *rows, GridLayout(3, 4), num_iters=num_iters), expected) > 1e-3


def test_batch_rows_and_heads_are_independent() -> None:
    q, k, v = _draw(24)
    together = monarch_attention(q, k, v, SequenceLayout(4), num_iters=2)
    alone = monarch_attention(q[1:, 2:], k[1:, 2:], v[1:, 2:], SequenceLayout(4), num_iters=2)
    assert _error(together[1:, 2:], alone) < 1e-13


def test_half_precision_is_the_float32_result_rounded_once() -> None:
    q, k, v = (x.to(torch.bfloat16) for x in _draw(24))
    wide = monarch_attention(q.float(), k.float(), v.float(), SequenceLayout(4), num_iters=2)
    assert torch.equal(monarch_attention(q, k, v, SequenceLayout(4), num_iters=2), wide.to(torch.bfloat16))


# Causal chunks.


@pytest.mark.parametrize(
    ("layout", "chunk"),
    [(GridLayout(2, 3), 1), (GridLayout(2, 3), 2), (GridLayout(4, 2, 2, 2), 2), (GridLayout(2, 4, 3, 1, 2, "w"), 3)],
    ids=str,
)
@by_iterations
def test_causal_chunks_are_calls_with_the_keys_up_to_each_chunk(layout: GridLayout, chunk: int, num_iters: int) -> None:
    frame = layout.frame_tokens
    q, k, v = _draw(6 * frame)
    out = monarch_attention(q, k, v, layout, num_iters=num_iters, causal_frames=chunk)
    parts = []
    for end in range(chunk, 7, chunk):
        queries, seen = slice((end - chunk) * frame, end * frame), slice(end * frame)
        args = q[:, :, queries], k[:, :, seen], v[:, :, seen]
        parts.append(monarch_attention(*args, layout, num_iters=num_iters))
    assert _error(out, torch.cat(parts, dim=2)) < 1e-13
    tiles = chunk // layout.f_tied * layout.h_reduce * layout.w_reduce
    assert _error(out, literal(q, k, v, layout, num_iters, tiles)[0]) < 1e-13
    weights = monarch_matrix(q, k, layout, num_iters=num_iters, causal_frames=chunk)
    assert _error(weights @ v, out) < 1e-13
    assert torch.equal(weights == 0, _later_chunks(6, chunk, frame).expand_as(weights))


def _later_chunks(frames: int, chunk: int, frame_tokens: int) -> Tensor:
    """Which keys belong to a later chunk than the query: bool [N, N]."""
    chunk_of = torch.arange(frames * frame_tokens) // (chunk * frame_tokens)
    return chunk_of[:, None] < chunk_of


def test_one_causal_chunk_is_the_whole_video() -> None:
    q, k, v = _draw(36)
    layout = GridLayout(3, 4)
    assert torch.equal(monarch_attention(q, k, v, layout, causal_frames=3), monarch_attention(q, k, v, layout))


# What the kernels do not do.

UNSUPPORTED = {
    "float64": ({}, "float64"),
    "head_dim": ({"head_dim": 264}, "head_dim is 264"),
    "chunks": ({"num_iters": 2, "causal_frames": 2}, "causal chunks, not 2"),
    "gradients": ({"num_iters": 3, "gradient": True}, "one iteration, not for 3"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_the_kernels_do_not_do_runs_on_the_reference_with_a_warning_or_is_refused(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options, words = dict(UNSUPPORTED[case][0]), UNSUPPORTED[case][1]
    q, k, v = (x if case == "float64" else x.float() for x in _draw(24, head_dim=options.pop("head_dim", 8)))
    q.requires_grad_(options.pop("gradient", False))
    layout = GridLayout(2, 3)
    expected = monarch_attention(q, k, v, layout, **options)
    monkeypatch.setattr(api, "select_backend", lambda *_: "triton")  # as on a CUDA device
    monkeypatch.setattr(logging.getLogger("hf_efficient"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(monarch_attention(q, k, v, layout, **options), expected)
    assert words in caplog.text and "reference" in caplog.text
    with pytest.raises(BackendError, match=words):
        monarch_attention(q, k, v, layout, **options, backend="triton")
    monkeypatch.setenv("HFE_BACKEND", "triton")
    with pytest.raises(BackendError, match=words):
        monarch_attention(q, k, v, layout, **options)
