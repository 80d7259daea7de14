"""The kernels of topology_attention: long texts, large offsets, and the effect of block lists."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_efficient.kernels.contract import relative_error
from hf_efficient.kernels.topology_attention.api import topology_attention
from hf_efficient.kernels.topology_blocks.api import topology_blocks
from hf_efficient.kernels.topology_blocks.block_lists import BLOCK, FULL_KEYS, PARTIAL_KEYS, BlockLists
from hf_efficient.kernels.topology_blocks.record import bitmaps, fan


def _draw(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, length: int, width: int) -> list[Tensor]:
    """q, k, v and a gradient of the output, as a model's projections leave them."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.empty(1, length, count, width, device=device, dtype=dtype).normal_(generator=generator).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def _results(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **topology: object) -> list[Tensor]:
    """Output and gradients of q, k and v, by the kernels."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = topology_attention(*leaves, **topology, backend="triton")  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def test_topology_attention_takes_whole_blocks_and_masked_ones_for_the_same(device: torch.device) -> None:
    """A full block listed as partial gives the same values, up to rounding: its mask hides nothing."""
    topology = fan(2, BLOCK, BLOCK, device)
    tensors = _draw(device, torch.float32, 2, 1, 4 * BLOCK, 16)
    blocks = topology_blocks(**topology)
    kinds = torch.zeros(1, 4, 4, 4, dtype=torch.bool, device=device)
    index = torch.arange(4, device=device)
    for kind in range(4):
        listed = index < blocks.counts[0, kind][:, None]
        kinds[0, kind].scatter_(1, torch.where(listed, blocks.lists[0, kind].long(), 0), listed)
        kinds[0, kind, :, 0] = (listed & (blocks.lists[0, kind] == 0)).any(1)
    merged = torch.stack(
        (kinds[:, 0] & False, kinds[:, 0] | kinds[:, 1], kinds[:, 0] & False, kinds[:, 2] | kinds[:, 3]), 1
    )
    order = (~merged).to(torch.int8).sort(dim=-1, stable=True).indices.int()
    all_partial = BlockLists(merged.sum(-1).int(), order, blocks.present)
    assert int(blocks.counts[:, FULL_KEYS].sum()) > 2 and int(all_partial.counts[:, FULL_KEYS].sum()) == 0
    assert int(all_partial.counts[:, PARTIAL_KEYS].sum()) == int(blocks.counts[:, [FULL_KEYS, PARTIAL_KEYS]].sum())
    found = _results(*tensors, **topology, blocks=all_partial)
    for one, other in zip(found, _results(*tensors, **topology, blocks=blocks), strict=True):
        assert relative_error(one, other) < 1e-6


def test_topology_attention_looks_at_no_block_that_is_not_listed(device: torch.device) -> None:
    """Empty lists: every query sees nothing, whatever its segment says."""
    topology = fan(1, 100, 60, device)
    tensors = _draw(device, torch.float32, 2, 2, 260, 16)
    blocks = topology_blocks(**topology)
    empty = BlockLists(torch.zeros_like(blocks.counts), blocks.lists, blocks.present)
    for result in _results(*tensors, **topology, blocks=empty):
        assert result.eq(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_topology_attention_of_one_segment_is_causal_attention(device: torch.device, width: int) -> None:
    q, k, v, dout = _draw(device, torch.bfloat16, 8, 2, 3000, width)
    segments = torch.zeros(1, 3000, dtype=torch.int32, device=device)
    found = _results(
        q, k, v, dout, segment_ids=segments, segment_visibility=torch.ones(1, 1, 1, dtype=torch.int64, device=device)
    )
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    for one, other in zip(found, [out, *torch.autograd.grad(out, leaves, dout.float())], strict=True):
        assert relative_error(one, other) < 1e-2


@pytest.mark.gpu
def test_topology_attention_of_long_texts_is_right_and_the_same_every_time(device: torch.device) -> None:
    topology = fan(8, 2048, 1536, device)
    q, k, v, dout = _draw(device, torch.bfloat16, 4, 2, 16384, 128)
    first = _results(q, k, v, dout, **topology)
    for _ in range(2):
        assert all(map(torch.equal, first, _results(q, k, v, dout, **topology)))
    # The last path and what follows it, against the same pairs in float64.
    seen = torch.ones(16384, dtype=torch.bool, device=device)
    path = slice(2048 + 7 * 1536, 2048 + 8 * 1536)
    seen[2048 : path.start] = False
    rows = torch.arange(path.start, path.stop, device=device)
    mask = seen[None] & (torch.arange(16384, device=device)[None] <= rows[:, None])
    for head in (0, 3):
        scores = (q[0, head, path].double() @ k[0, head // 2].double().T) * 128**-0.5
        expected = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v[0, head // 2].double()
        assert relative_error(first[0][0, head, path], expected) < 8e-3


@pytest.mark.gpu
def test_topology_attention_reaches_past_two_to_the_31_elements(device: torch.device) -> None:
    """Packed samples of one block each, which is quick; the last must equal the result of that sample alone."""
    length, heads = 544 * 1024, 32
    count = length // BLOCK
    free, _ = torch.cuda.mem_get_info()
    if free < 50 * 2**30:
        pytest.skip("needs 50 GiB of free device memory")
    q, k, v, dout = _draw(device, torch.bfloat16, heads, heads, length, 128)
    assert q.numel() > 2**31
    segments = (torch.arange(length, device=device, dtype=torch.int32) // BLOCK)[None]
    segment_visibility = bitmaps(torch.eye(count, dtype=torch.bool))[None].to(device)
    found = _results(q, k, v, dout, segment_ids=segments, segment_visibility=segment_visibility)
    last = [x[:, -2:, -BLOCK:] for x in (q, k, v, dout)]
    alone = _results(*last, segment_ids=segments[:, :BLOCK], segment_visibility=segment_visibility[:, :1])
    for one, other in zip(found, alone, strict=True):
        assert relative_error(one[:, -2:, -BLOCK:], other) < 1e-2


def test_topology_blocks_of_segments_that_words_do_not_reach(device: torch.device) -> None:
    """Segments without a bitmap are holes: they see nothing and are not seen, and the block lists agree."""
    segments = torch.full((1, 2 * BLOCK), 70, dtype=torch.int32, device=device)
    segment_visibility = torch.full((1, 80, 1), -1, dtype=torch.int64, device=device)
    assert int(topology_blocks(segments, segment_visibility, backend="triton").counts.sum()) == 0
