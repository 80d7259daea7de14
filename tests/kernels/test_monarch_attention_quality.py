"""How close monarch_attention is to softmax attention where scores are those of a video: position plus content.

Positions on each axis have cosine and sine features, so that scores of positions are a sum over the axes; `content` is
noise in queries and keys. With little content attention is spread and Monarch attention is closer than the best choice
of as many keys for each query; where a few keys hold most of the attention it is the other way round.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_efficient.kernels.monarch_attention.api import monarch_attention
from hf_efficient.kernels.monarch_attention.layout import GridLayout, SequenceLayout

DOUBLE = torch.float64
FRAMES, HEIGHT, WIDTH = 3, 12, 16
FEATURES = (8, 12, 12)  # of the three axes
HEAD_DIM = sum(FEATURES)
LAYOUTS = tuple(GridLayout(HEIGHT, WIDTH, *cuts) for cuts in ((1, 1, 1), (1, 2, 1), (1, 4, 2)))
# (gain, content): errors of the best keys with their weights renormalised and as they are, the share of attention that
# they hold, and errors of the layouts for 1, 2 and 3 iterations.
TABLE = {
    (1.0, 0.15): (1.236, 0.456, 0.45, (0.096, 0.081, 0.081), (0.091, 0.074, 0.074), (0.076, 0.056, 0.056)),
    (1.0, 0.3): (1.202, 0.446, 0.45, (0.206, 0.173, 0.173), (0.196, 0.158, 0.158), (0.165, 0.122, 0.122)),
    (2.0, 0.3): (0.301, 0.101, 0.78, (0.145, 0.149, 0.150), (0.142, 0.130, 0.131), (0.126, 0.098, 0.099)),
    (3.0, 0.6): (0.057, 0.017, 0.94, (0.229, 0.219, 0.225), (0.224, 0.194, 0.196), (0.203, 0.150, 0.150)),
}


def _video(gain: float, content: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [1, 1, N, 32] of a video of 3 x 12 x 16 tokens."""
    generator = torch.Generator().manual_seed(0)
    places = torch.cartesian_prod(torch.arange(FRAMES), torch.arange(HEIGHT), torch.arange(WIDTH))
    axes = []
    for axis, (size, features) in enumerate(zip((FRAMES, HEIGHT, WIDTH), FEATURES, strict=True)):
        angle = math.pi / size * torch.arange(size)[:, None] * torch.arange(1, features // 2 + 1, dtype=DOUBLE)
        feature = torch.cat([angle.cos(), angle.sin()], dim=1)
        axes.append((feature / feature.norm(dim=1, keepdim=True))[places[:, axis]])
    position = torch.cat(axes, dim=1) * math.sqrt(gain * math.sqrt(HEAD_DIM))
    q, k = (position + content * torch.randn(position.shape, dtype=DOUBLE, generator=generator) for _ in range(2))
    v = torch.randn(position.shape, dtype=DOUBLE, generator=generator)
    return q[None, None], k[None, None], v[None, None]


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Its weights and its output."""
    weights = (q @ k.mT * HEAD_DIM**-0.5).softmax(-1)
    return weights, weights @ v


def _best_keys(weights: Tensor, v: Tensor) -> tuple[Tensor, Tensor, float]:
    """Attention to each query's keys of largest weight, as many as the first layout has parameters: 14.6 % of all."""
    tiling = LAYOUTS[0].tiling(weights.shape[3])
    count = round(weights.shape[3] * (tiling.rows + tiling.columns) / (tiling.rows * tiling.columns))
    top = weights.topk(count, dim=-1)
    kept = torch.zeros_like(weights).scatter(-1, top.indices, top.values)
    share = kept.sum(-1, keepdim=True)
    return kept / share @ v, kept @ v, share.mean().item()


@pytest.mark.parametrize(("gain", "content"), TABLE, ids=str)
def test_errors_are_those_of_the_table(gain: float, content: float) -> None:
    q, k, v = _video(gain, content)
    weights, exact = _softmax_attention(q, k, v)
    renormalised, raw, share = _best_keys(weights, v)
    expected_renormalised, expected_raw, expected_share, *by_layout = TABLE[gain, content]
    assert _error(renormalised, exact) == pytest.approx(expected_renormalised, rel=0.1)
    assert _error(raw, exact) == pytest.approx(expected_raw, rel=0.1)
    assert share == pytest.approx(expected_share, rel=0.1)
    for layout, expected in zip(LAYOUTS, by_layout, strict=True):
        found = [_error(monarch_attention(q, k, v, layout, num_iters=t), exact) for t in (1, 2, 3)]
        assert found == pytest.approx(expected, rel=0.1), layout


@pytest.mark.parametrize("gain", [1.0, 2.0])
@pytest.mark.parametrize("content", [0.0, 0.15, 0.3])
def test_it_is_closer_than_the_best_keys_at_equal_density_where_attention_is_spread(
    gain: float, content: float
) -> None:
    q, k, v = _video(gain, content)
    weights, exact = _softmax_attention(q, k, v)
    renormalised, _, _ = _best_keys(weights, v)
    assert _error(monarch_attention(q, k, v, LAYOUTS[0]), exact) < _error(renormalised, exact)


def test_the_best_keys_are_closer_where_they_hold_nearly_all_of_the_attention() -> None:
    q, k, v = _video(3.0, 0.6)
    weights, exact = _softmax_attention(q, k, v)
    renormalised, raw, share = _best_keys(weights, v)
    assert share > 0.9
    assert _error(monarch_attention(q, k, v, LAYOUTS[0]), exact) > 2 * max(
        _error(x, exact) for x in (renormalised, raw)
    )


def test_positions_alone_are_exact_unless_rows_cut_through_an_axis() -> None:
    q, k, v = _video(1.0, 0.0)
    _, exact = _softmax_attention(q, k, v)
    assert all(_error(monarch_attention(q, k, v, layout), exact) < 1e-12 for layout in LAYOUTS)
    assert all(_error(monarch_attention(q, k, v, SequenceLayout(size)), exact) > 0.2 for size in (9, 18, 24))
