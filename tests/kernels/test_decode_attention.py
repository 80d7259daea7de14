"""decode_attention against the mathematics: oracles that share no code with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from hf_efficient.kernels.decode_attention.api import decode_attention
from hf_efficient.kernels.decode_attention.configs import launch_config, padded_head_dim, split_count
from hf_efficient.kernels.decode_attention.record import RECORD

DOUBLE = torch.float64


def _draw(batch: int, heads: int, kv_heads: int, queries: int, slots: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    cache = (batch, kv_heads, slots, head_dim)
    q = torch.randn(batch, heads, queries, head_dim, dtype=DOUBLE)
    return q, torch.randn(cache, dtype=DOUBLE), torch.randn(cache, dtype=DOUBLE)


def test_it_is_the_formula_slot_by_slot() -> None:
    """All visibility rules together, each written as the documentation states it."""
    batch, heads, kv_heads, queries, slots, head_dim, window = 2, 4, 2, 3, 9, 5, 6
    q, k, v = _draw(batch, heads, kv_heads, queries, slots, head_dim)
    kv_len = torch.tensor([8, 5])
    q_pos = torch.tensor([[7, 3, -1], [4, 8, 0]])
    kv_segment_ids = torch.tensor([[0, 0, 1, 63, 64, 2, 2, 64, 0], [5, -1, 70, 5, 0, 1, 1, 1, 1]], dtype=torch.int32)
    sees = [[{0, 1, 2}, {63, 64, 0}, {0}], [{70, 5}, {0, 1}, set()]]
    words = torch.tensor(
        [[[sum((s < 64) << s for s in one), sum((s >= 64) << (s % 64) for s in one)] for one in row] for row in sees],
        dtype=torch.uint64,
    )
    segment_visibility = words.view(torch.int64)
    out = decode_attention(q, k, v, kv_len, q_pos, window, kv_segment_ids, segment_visibility)
    for b in range(batch):
        for i in range(queries):
            here = q_pos[b, i].item()
            visible = [
                j
                for j in range(slots)
                if j < kv_len[b]
                and here - window < j <= here
                and kv_segment_ids[b, j] >= 0
                and kv_segment_ids[b, j].item() in sees[b][i]
            ]
            for h in range(heads):
                g = h // (heads // kv_heads)
                weights = [math.exp(sum((q[b, h, i] * k[b, g, j]).tolist()) / math.sqrt(head_dim)) for j in visible]
                for d in range(head_dim):
                    total = sum(w * v[b, g, j, d].item() for w, j in zip(weights, visible, strict=True))
                    assert out[b, h, i, d].item() == pytest.approx(total / sum(weights) if visible else 0.0, rel=1e-12)


def test_a_full_cache_is_what_torch_attends_to_causally() -> None:
    q, k, v = _draw(2, 6, 2, 7, 7, 16)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    found = decode_attention(q, k, v, 7, torch.arange(7).expand(2, 7))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_several_queries_are_as_many_single_ones() -> None:
    q, k, v = _draw(2, 4, 2, 5, 12, 8)
    q_pos = torch.tensor([[11, 9, 3, 0, -1], [2, 4, 6, 8, 10]])
    together = decode_attention(q, k, v, 12, q_pos)
    apart = [decode_attention(q[:, :, i : i + 1], k, v, 12, q_pos[:, i : i + 1]) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(apart, dim=2), rtol=1e-12, atol=1e-14)


def test_left_padding_is_a_shorter_cache() -> None:
    q, k, v = _draw(1, 4, 2, 1, 10, 8)
    kv_segment_ids = torch.tensor([[-1] * 4 + [0] * 6], dtype=torch.int32)
    padded = decode_attention(q, k, v, 10, torch.tensor([[9]]), kv_segment_ids=kv_segment_ids)
    shorter = decode_attention(q, k[:, :, 4:], v[:, :, 4:], 6, torch.tensor([[5]]))
    torch.testing.assert_close(padded, shorter, rtol=1e-12, atol=1e-14)


def test_branches_in_one_cache_equal_separate_sequences() -> None:
    """A trunk, two branches whose slots alternate, and a join: each query as if its own past were the whole cache."""
    q, k, v = _draw(1, 4, 2, 3, 12, 8)
    kv_segment_ids = torch.tensor([[0, 0, 0, 1, 2, 1, 2, 1, -1, 2, 3, 3]], dtype=torch.int32)
    q_pos = torch.tensor([[7, 9, 11]])
    segment_visibility = torch.tensor([[[0b0011], [0b0101], [0b1111]]])
    together = decode_attention(
        q, k, v, 12, q_pos, kv_segment_ids=kv_segment_ids, segment_visibility=segment_visibility
    )
    for i, past in enumerate(([0, 1, 2, 3, 5, 7], [0, 1, 2, 4, 6, 9], [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11])):
        alone = decode_attention(
            q[:, :, i : i + 1], k[:, :, past], v[:, :, past], len(past), torch.tensor([[len(past) - 1]])
        )
        torch.testing.assert_close(together[:, :, i : i + 1], alone, rtol=1e-12, atol=1e-14)


def test_slots_that_no_query_sees_may_hold_anything() -> None:
    q, k, v = _draw(2, 4, 2, 2, 10, 8)
    arguments = {
        "kv_len": torch.tensor([7, 5]),
        "q_pos": torch.tensor([[6, 5], [4, -1]]),
        "kv_segment_ids": torch.tensor([[-1, 0, 0, -1, 0, 0, 0, 0, 0, 0], [0] * 10], dtype=torch.int32),
    }
    clean = decode_attention(q, k, v, **arguments)
    for row, slots in enumerate(([0, 3, 7, 8, 9], [5, 6, 7, 8, 9])):
        k[row, :, slots] = v[row, :, slots] = float("nan")
    assert torch.equal(decode_attention(q, k, v, **arguments), clean)
    assert clean[1, :, 1].eq(0).all(), "a query that sees nothing gets zeros"


def test_the_length_of_all_rows_may_come_in_any_form() -> None:
    q, k, v = _draw(2, 2, 1, 1, 6, 4)
    q_pos = torch.tensor([[5]])
    expected = decode_attention(q, k[:, :, :4], v[:, :, :4], 4, q_pos)
    for kv_len in (4, torch.tensor(4), torch.tensor([4]), torch.tensor([4, 4], dtype=torch.int32)):
        assert torch.equal(decode_attention(q, k, v, kv_len, q_pos), expected)
    assert torch.equal(decode_attention(q, k, v, torch.tensor(99), q_pos), decode_attention(q, k, v, 6, q_pos))


def test_the_result_lies_as_an_output_projection_reads_it() -> None:
    q, k, v = _draw(2, 4, 2, 3, 5, 8)
    out = decode_attention(q, k, v, 5, torch.tensor([[4, 4, 4]]))
    assert out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous()


def test_the_byte_model_counts_the_filled_slots_once_for_all_heads_and_queries() -> None:
    arguments = RECORD.samples(torch.device("cpu"), torch.float16)[0].arguments
    q, k = arguments["q"], arguments["k"]
    batch, heads, queries, head_dim = q.shape
    live = {
        **arguments,
        "kv_len": torch.tensor([40, 7]),
        "q_pos": torch.tensor([[39, 38], [6, 6]]),
        "window": 10,
    }
    slots = 11 + 7
    cost = RECORD.forward_cost(live)
    assert cost.bytes == 2 * (2 * slots * k.shape[1] * head_dim + 2 * batch * heads * queries * head_dim)
    assert cost.flops == 4 * heads * head_dim * (10 + 10 + 7 + 7)


@pytest.mark.parametrize("element_size", [2, 4])
def test_every_head_dim_and_number_of_rows_has_a_tile(element_size: int) -> None:
    for head_dim in range(1, 257):
        for rows in (1, 16, 17, 64, 65, 512):
            config = launch_config(rows, head_dim, element_size)
            assert config.block_m in (16, 32, 64)
            assert config.block_n >= 16, "the least depth of a product on tensor cores"
            assert padded_head_dim(head_dim) >= head_dim


def test_the_device_is_filled_and_not_overfilled() -> None:
    filled = [split_count(batch * 8, 32768, 64, 132) * batch * 8 for batch in (1, 2, 4, 8, 16, 32, 64)]
    assert all(200 <= programs <= 264 for programs in filled[:-1])
    assert filled[-1] == 512, "a batch that fills it alone is not split"
    assert split_count(1, 130, 64, 132) == 3, "no more splits than blocks"
    assert split_count(8, 0, 64, 132) == 1
