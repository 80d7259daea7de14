"""Layouts of monarch_attention: where tokens are placed, padding, masks, and layouts that are refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.kernels.monarch_attention.api import monarch_attention
from hf_efficient.kernels.monarch_attention.layout import PAD_QUERIES, PADS, ROW_AXES, GridLayout, SequenceLayout

DOUBLE = torch.float64
by_iterations = pytest.mark.parametrize("num_iters", [1, 2, 3])
by_pad = pytest.mark.parametrize("pad", PADS)
by_pad_queries = pytest.mark.parametrize("pad_queries", PAD_QUERIES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _draw(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 3, tokens, 8, dtype=DOUBLE)
    return q, k, v


# Where tokens are placed.


@pytest.mark.parametrize("row_axes", ROW_AXES)
@pytest.mark.parametrize("cuts", list(itertools.product((1, 2), (1, 3), (1, 2, 4))), ids=str)
def test_a_grid_puts_each_token_where_its_documentation_says(row_axes: str, cuts: tuple[int, int, int]) -> None:
    frames, height, width = 4, 6, 4
    layout = GridLayout(height, width, *cuts, row_axes)
    f_tied, h_reduce, w_reduce = cuts
    sizes = {"f": f_tied, "h": height // h_reduce, "w": width // w_reduce}
    index = layout.token_index(frames * height * width)
    assert index.shape == layout.tiling(frames * height * width)
    assert sorted(index.flatten().tolist()) == list(range(frames * height * width)), "each token once"
    for f, h, w in itertools.product(range(frames), range(height), range(width)):
        tile = (f // sizes["f"] * h_reduce + h // sizes["h"]) * w_reduce + w // sizes["w"]
        row = column = 0
        for axis, place in zip("fhw", (f, h, w), strict=True):
            if axis in row_axes:
                row = row * sizes[axis] + place % sizes[axis]
            else:
                column = column * sizes[axis] + place % sizes[axis]
        assert index[tile, row, column] == (f * height + h) * width + w


@pytest.mark.parametrize(
    ("layout", "tokens", "expected"),
    [
        (SequenceLayout(3), 7, [[0, 1, 2], [3, 4, 5], [6, -1, -1]]),
        (SequenceLayout(3, "pre"), 7, [[-1, -1, 0], [1, 2, 3], [4, 5, 6]]),
        (SequenceLayout(3, "pre"), 6, [[0, 1, 2], [3, 4, 5]]),
    ],
    ids=["post", "pre", "no padding"],
)
def test_a_sequence_is_cut_into_blocks_and_padded(
    layout: SequenceLayout, tokens: int, expected: list[list[int]]
) -> None:
    assert layout.token_index(tokens)[0].tolist() == expected
    assert layout.tiling(tokens) == (1, len(expected), 3)


def test_the_shipped_tilings_of_wan_have_the_published_sizes() -> None:
    tokens = 21 * 30 * 52
    tilings = {
        (1, 1, 1): (21, 30, 52),
        (1, 2, 1): (42, 15, 52),
        (1, 1, 2): (42, 30, 26),
        (1, 3, 1): (63, 10, 52),
        (3, 1, 1): (7, 90, 52),
        (21, 1, 1): (1, 630, 52),
    }
    for cuts, expected in tilings.items():
        assert GridLayout(30, 52, *cuts).tiling(tokens) == expected


@by_iterations
def test_one_tile_of_all_frames_is_a_sequence_of_image_rows(num_iters: int) -> None:
    q, k, v = _draw(45)
    tiled = monarch_attention(q, k, v, GridLayout(3, 5, f_tied=3), num_iters=num_iters)
    sequence = monarch_attention(q, k, v, SequenceLayout(5), num_iters=num_iters)
    torch.testing.assert_close(tiled, sequence, rtol=1e-12, atol=1e-12)


@by_iterations
def test_rows_along_the_width_are_the_transposed_video(num_iters: int) -> None:
    q, k, v = _draw(48)

    def transposed(x: Tensor, height: int, width: int) -> Tensor:
        return x.unflatten(2, (4, height, width)).transpose(3, 4).flatten(2, 4)

    found = monarch_attention(q, k, v, GridLayout(3, 4, row_axes="w"), num_iters=num_iters)
    turned = (transposed(x, 3, 4) for x in (q, k, v))
    expected = transposed(monarch_attention(*turned, GridLayout(4, 3), num_iters=num_iters), 4, 3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# Padding and masks.


@by_pad
@by_pad_queries
@by_iterations
@pytest.mark.parametrize("added", [1, 4, 6, 13])
def test_masked_tokens_on_the_padded_side_change_nothing(
    pad: str, pad_queries: str, num_iters: int, added: int
) -> None:
    """Also where the block size divides neither length, where whole blocks are masked, and whatever they hold."""
    layout = SequenceLayout(4, pad, pad_queries)
    tensors = _draw(11)
    expected = monarch_attention(*tensors, layout, num_iters=num_iters)
    junk = torch.full((2, 3, added, 8), torch.nan, dtype=DOUBLE)
    mask = torch.cat([torch.ones(2, 11, dtype=torch.bool), torch.zeros(2, added, dtype=torch.bool)], 1)
    longer = [torch.cat([x, junk] if pad == "post" else [junk, x], dim=2) for x in tensors]
    mask = mask if pad == "post" else mask.flip(1)
    out = monarch_attention(*longer, layout, num_iters=num_iters, key_mask=mask)
    own = slice(11) if pad == "post" else slice(added, None)
    torch.testing.assert_close(out[:, :, own], expected, rtol=0, atol=1e-13)
    assert not out[:, :, ~mask[0]].any(), "masked tokens get zeros"


@by_pad
@by_pad_queries
@by_iterations
def test_a_masked_token_changes_no_other_output_or_gradient_whatever_it_holds(
    pad: str, pad_queries: str, num_iters: int
) -> None:
    mask = torch.rand(2, 23) < 0.6
    mask[0, 8:12] = False
    results = []
    for junk in (0.0, 1e300, torch.nan):
        torch.manual_seed(1)
        tensors = [x.masked_fill(~mask[:, None, :, None], junk).requires_grad_() for x in _draw(23)]
        out = monarch_attention(*tensors, SequenceLayout(4, pad, pad_queries), num_iters=num_iters, key_mask=mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    hidden = ~mask[:, None, :, None].expand(2, 3, -1, 8)
    assert not any(x[hidden].any() for x in results[0])


def test_neighbours_in_a_batch_do_not_matter() -> None:
    q, k, v = _draw(18)
    mask = torch.ones(2, 18, dtype=torch.bool)
    mask[0, 11:] = False
    layout = SequenceLayout(4)
    together = monarch_attention(q, k, v, layout, num_iters=2, key_mask=mask)
    alone = [x[:1, :, :11] for x in (q, k, v)]
    torch.testing.assert_close(together[:1, :, :11], monarch_attention(*alone, layout, num_iters=2))


@by_iterations
@by_pad_queries
def test_values_that_are_constant_are_returned_for_every_mask(num_iters: int, pad_queries: str) -> None:
    q, k, _ = _draw(23)
    for kept in (1, 2, 5, 12):
        mask = torch.zeros(2, 23, dtype=torch.bool)
        for row in mask:
            row[torch.randperm(23)[:kept]] = True
        options = {"num_iters": num_iters, "key_mask": mask}
        out = monarch_attention(9 * q, k, torch.ones_like(q), SequenceLayout(4, "post", pad_queries), **options)
        torch.testing.assert_close(out, mask[:, None, :, None].expand_as(out).double(), rtol=0, atol=1e-12)


@by_iterations
def test_a_sequence_without_a_valid_key_gets_zeros_and_no_gradient(num_iters: int) -> None:
    tensors = [x.requires_grad_() for x in _draw(12)]
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1] = False
    out = monarch_attention(*tensors, SequenceLayout(3), num_iters=num_iters, key_mask=mask)
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert out[0].all() and not out[1].any()
    assert all(x.isfinite().all() and not x[1].any() for x in gradients)


@by_iterations
def test_padding_in_front_of_a_class_token_aligns_the_image_rows(num_iters: int) -> None:
    """A class token and 3 x 3 patches in blocks of 3: as two masked tokens in front."""
    q, k, v = _draw(10)
    found = monarch_attention(q, k, v, SequenceLayout(3, pad="pre"), num_iters=num_iters)
    mask = torch.tensor([[False] * 2 + [True] * 10]).expand(2, -1)
    manual = [torch.cat([torch.zeros(2, 3, 2, 8, dtype=DOUBLE), x], dim=2) for x in (q, k, v)]
    expected = monarch_attention(*manual, SequenceLayout(3), num_iters=num_iters, key_mask=mask)
    assert torch.equal(found, expected[:, :, 2:])


def test_the_mean_query_stands_for_a_padded_one_in_the_first_iteration() -> None:
    """Of the last block's four columns, two have a query of their own there, and keys."""
    q, k, v = _draw(10)
    queries, keys, values = (torch.cat([x, x.new_zeros(2, 3, 2, 8)], dim=2).unflatten(2, (3, 4)) for x in (q, k, v))
    queries[:, :, 2, 2:] = queries[:, :, :2, 2:].mean(2)
    scores = torch.einsum("zhkjd,zhkld->zhkjl", queries, keys) * 8**-0.5
    scores[:, :, 2, :, 2:] = -torch.inf
    right = scores.softmax(-1)
    expected_keys = torch.einsum("zhkjl,zhkld->zhkjd", right, keys) * 8**-0.5
    entropy = -torch.xlogy(right, right).sum(-1)
    u = torch.einsum("zhijd,zhkjd->zhjik", queries, expected_keys) + entropy.transpose(2, 3)[:, :, :, None]
    out = torch.einsum("zhjik,zhkjl,zhkld->zhijd", u.softmax(-1), right, values).flatten(2, 3)[:, :, :10]
    found = monarch_attention(q, k, v, SequenceLayout(4, pad_queries="mean"))
    torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, monarch_attention(q, k, v, SequenceLayout(4)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_values_that_are_not_finite_are_named_on_request(
    value: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = dict(zip("qkv", _draw(12), strict=True))
    tensors[name][1, 2, 5, 3] = value
    mask = torch.ones(2, 12, dtype=torch.bool)
    monkeypatch.setenv("HFE_CHECK", "1")
    with pytest.raises(HFEError, match=rf"`{name}` holds {value} at position \[1, 2, 5, 3\].*mask the token"):
        monarch_attention(**tensors, layout=SequenceLayout(4), key_mask=mask)
    mask[1, 5] = False
    assert monarch_attention(**tensors, layout=SequenceLayout(4), key_mask=mask).isfinite().all()


# Layouts that are refused.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SequenceLayout(1), ("`block_size` is 1", "at least 2")),
        (lambda: SequenceLayout(4.0), ("`block_size` is 4.0", "integer")),
        (lambda: SequenceLayout(True), ("`block_size` is True", "integer")),
        (lambda: SequenceLayout(4, pad="left"), ("`pad` is 'left'", "post, pre")),
        (lambda: SequenceLayout(4, pad_queries=None), ("`pad_queries` is None", "zero, mean")),
        (lambda: GridLayout(0, 4), ("`height` is 0", "at least 1")),
        (lambda: GridLayout(4, 4, f_tied=0), ("`f_tied` is 0", "at least 1")),
        (lambda: GridLayout(4, 6, h_reduce=3), ("`h_reduce` is 3", "`height` is 4", "divide")),
        (lambda: GridLayout(4, 6, w_reduce=4), ("`w_reduce` is 4", "`width` is 6", "divide")),
        (lambda: GridLayout(4, 6, row_axes="hf"), ("`row_axes` is 'hf'", "fh, f, h, w, fw, hw")),
        (lambda: GridLayout(4, 6).tiling(25), ("25 tokens", "4 x 6")),
        (lambda: GridLayout(4, 6, f_tied=2).tiling(72), ("`f_tied` is 2", "3 frames")),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_value_rule_and_remedy(make: object, words: tuple[str, ...]) -> None:
    with pytest.raises(HFEError) as caught:
        make()
    assert caught.value.remedy
    assert all(word in str(caught.value) for word in words), caught.value
