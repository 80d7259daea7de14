"""Gradients of monarch_attention: numerical derivatives, and the closed form that the kernels compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_efficient.kernels.monarch_attention.api import monarch_attention
from hf_efficient.kernels.monarch_attention.layout import GridLayout, SequenceLayout

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _draw(num_queries: int, num_keys: int | None = None, head_dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    keys = (2, 3, num_queries if num_keys is None else num_keys, head_dim)
    q = torch.randn(2, 3, num_queries, head_dim, dtype=DOUBLE)
    return q, torch.randn(keys, dtype=DOUBLE), torch.randn(keys, dtype=DOUBLE)


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def closed_form_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout | GridLayout,
    key_mask: Tensor | None = None,
    tiles_of_chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for one iteration, written out as the backward kernels compute them, all tiles at once."""
    scale = q.shape[3] ** -0.5
    indices = [layout.token_index(x.shape[2]) for x in (dout, q, k, v)]
    mask = torch.ones(len(q), k.shape[2], dtype=torch.bool) if key_mask is None else key_mask
    # Index -1 finds the row of zeros at the end, which stands for padding.
    g, queries, keys, values = (
        (torch.cat([x if key_mask is None else x * mask[:, None, :, None], torch.zeros_like(x[:, :, :1])], dim=2))[
            :, :, index
        ]
        for x, index in zip((dout, q, k, v), indices, strict=True)
    )
    valid = torch.cat([mask, torch.zeros_like(mask[:, :1])], 1)[:, indices[2]][:, None]
    alive = valid.any(-1)
    # Forward.
    z = scale * torch.einsum("zhakjd,zhfkld->zhafkjl", queries, keys)
    z = z.masked_fill(~(valid | ~alive[..., None])[:, :, None, ..., None, :], -torch.inf)
    right = z.softmax(-1) * alive[:, :, None, ..., None, None]
    log_right = z.log_softmax(-1).masked_fill(right == 0, 0.0)
    a = scale * torch.einsum("zhafkjl,zhfkld->zhafkjd", right, keys)
    y = torch.einsum("zhafkjl,zhfkld->zhafkjd", right, values)
    c = (right * log_right).sum(-1)
    u = torch.einsum("zhaijd,zhafkjd->zhajifk", queries, a) - torch.einsum("zhafkj->zhajfk", c)[:, :, :, :, None]
    u = u.masked_fill(~alive[:, :, None, None, None], -torch.inf)
    if tiles_of_chunk is not None:
        query_chunk, key_chunk = (torch.arange(len(index)) // tiles_of_chunk for index in indices[1:3])
        u = u.masked_fill((query_chunk[:, None] < key_chunk)[:, None, None, :, None], -torch.inf)
    left = u.flatten(-2).softmax(-1).view_as(u).nan_to_num(0.0)
    out = torch.einsum("zhajifk,zhafkjd->zhaijd", left, y)
    # Backward.
    delta = (g * out).sum(-1).transpose(-1, -2)[..., None, None]
    du = left * (torch.einsum("zhaijd,zhafkjd->zhajifk", g, y) - delta)
    dq = torch.einsum("zhajifk,zhafkjd->zhaijd", du, a)
    da = torch.einsum("zhajifk,zhaijd->zhafkjd", du, queries)
    dy = torch.einsum("zhajifk,zhaijd->zhafkjd", left, g)
    dc = -torch.einsum("zhajifk->zhafkj", du)
    mean = (da * a + dy * y).sum(-1) + dc * (1 + c)
    dr = scale * torch.einsum("zhafkjd,zhfkld->zhafkjl", da, keys)
    dr = dr + torch.einsum("zhafkjd,zhfkld->zhafkjl", dy, values) + dc[..., None] * (1 + log_right)
    dz = right * (dr - mean[..., None])
    dq = dq + scale * torch.einsum("zhafkjl,zhfkld->zhakjd", dz, keys)
    dk = scale * torch.einsum("zhafkjl,zhakjd->zhfkld", dz, queries)
    dk = dk + scale * torch.einsum("zhafkjl,zhafkjd->zhfkld", right, da)
    dv = torch.einsum("zhafkjl,zhafkjd->zhfkld", right, dy)
    gradients = []
    for x, index, gradient in zip((q, k, v), indices[1:], (dq, dk, dv), strict=True):
        whole = torch.cat([torch.zeros_like(x), torch.zeros_like(x[:, :, :1])], dim=2)
        whole[:, :, index] = gradient
        gradients.append(whole[:, :, :-1] * (mask[:, None, :, None] if key_mask is not None else 1))
    return gradients[0], gradients[1], gradients[2]


def _masked() -> Tensor:
    mask = torch.rand(2, 22) < 0.6
    mask[0, 4:8], mask[1, 12:] = False, False
    return mask


@pytest.mark.parametrize(
    ("layout", "queries", "keys", "mask", "chunk"),
    [
        (SequenceLayout(4), 24, 24, None, None),
        (SequenceLayout(4, pad="pre"), 22, 22, None, None),
        (SequenceLayout(4), 22, 22, _masked, None),
        (GridLayout(3, 5), 30, 75, None, None),
        (GridLayout(4, 6, 1, 2, 3), 48, 48, None, None),
        (GridLayout(2, 3, row_axes="w"), 36, 36, None, 2),
    ],
    ids=["sequence", "padding", "mask", "cache", "tiles", "chunks"],
)
def test_gradients_of_one_iteration_are_the_closed_form(
    layout: SequenceLayout | GridLayout, queries: int, keys: int, mask: object, chunk: int | None
) -> None:
    q, k, v = (x.requires_grad_() for x in _draw(queries, keys))
    key_mask = mask() if callable(mask) else None
    out = monarch_attention(q, k, v, layout, key_mask=key_mask, causal_frames=chunk)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), dout)
    found = closed_form_gradients(dout, q.detach(), k.detach(), v.detach(), layout, key_mask, chunk)
    assert all(_error(a, b) < 1e-13 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("layout", "tokens"),
    [
        (SequenceLayout(4), 22),
        (SequenceLayout(4, "pre", "mean"), 22),
        (GridLayout(3, 5), 45),
        (GridLayout(4, 6, 1, 2, 3), 48),
        (GridLayout(3, 4, f_tied=2, row_axes="w"), 48),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_iters", [1, 2, 3])
def test_derivatives_are_the_numerical_ones(layout: SequenceLayout | GridLayout, tokens: int, num_iters: int) -> None:
    q, k, v = (x[:1, :1].clone().requires_grad_() for x in _draw(tokens, head_dim=3))

    def function(*tensors: Tensor) -> Tensor:
        return monarch_attention(*tensors, layout, num_iters=num_iters)

    assert torch.autograd.gradcheck(function, (q, k, v), fast_mode=True)


def test_gradients_of_new_keys_alone_are_those_of_all_keys() -> None:
    """As in training with a cache, whose keys and values are constants."""
    layout = GridLayout(3, 4)
    q, k, v = _draw(12, 36)
    wanting = [x.clone().requires_grad_() for x in (k, v)]
    expected = torch.autograd.grad(monarch_attention(q, *wanting, layout).square().sum(), wanting)
    new = [x[:, :, 24:].clone().requires_grad_() for x in (k, v)]
    joined = [torch.cat([x[:, :, :24], part], dim=2) for x, part in zip((k, v), new, strict=True)]
    found = torch.autograd.grad(monarch_attention(q, *joined, layout).square().sum(), new)
    assert all(_error(a, b[:, :, 24:]) < 1e-13 for a, b in zip(found, expected, strict=True))
