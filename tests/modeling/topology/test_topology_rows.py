"""Rows of segments: made by hand, packed into one, stacked into a batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hf_efficient.errors import UsageError
from hf_efficient.kernels.topology_attention.reference import visible_pairs
from hf_efficient.modeling.topology.attention.topology_mask import TopologyMask, dense_mask, flex_mask, visibility
from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.grammar.topology import Topology

DIAMOND = [(3, []), (2, [0]), (4, [0]), (1, [1, 2])]


def test_segments_given_by_hand(by_hand: Callable, positions_by_hand: Callable) -> None:
    topology = Topology.from_spec(DIAMOND)
    assert topology.segment_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
    assert topology.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]
    assert np.array_equal(topology.dense_mask().numpy(), by_hand(topology))
    assert np.array_equal(topology.position_ids, positions_by_hand(topology))
    assert topology.closure() == [0b0001, 0b0011, 0b0101, 0b1111]
    assert topology.reachable(3, 1) and not topology.reachable(2, 1)
    assert topology.first_tokens.tolist() == [3, 5, 9] and topology.critical_path == 8
    assert (topology.segment_ids.dtype, topology.position_ids.dtype) == (np.int32, np.int64)


def test_an_empty_segment_passes_its_parents_on() -> None:
    topology = Topology.from_spec([(2, []), (0, [0]), (1, [0]), (1, [1, 2])])
    assert topology.position_ids.tolist() == [0, 1, 2, 3] and topology.reachable(3, 0)
    assert Topology.from_spec([(2, []), (0, [0]), (1, [1])]).position_ids.tolist() == [0, 1, 2]
    empty = Topology.from_spec([])
    assert len(empty) == empty.critical_path == 0 and empty.dense_mask().shape == (0, 0)


@pytest.mark.parametrize("wrong", [1, 2, -1])
def test_segments_follow_only_those_before_them(wrong: int) -> None:
    with pytest.raises(TopologyError, match=rf"segment 1 follows segment {wrong}, which does not come before it"):
        Topology.from_spec([(2, []), (2, [wrong]), (1, [])])
    unordered = Topology(np.array([0, 1], np.int32), np.arange(2), [[], [wrong]])
    with pytest.raises(TopologyError, match=rf"segment 1 follows segment {wrong}, which does not come before it"):
        unordered.bitmaps()
    with pytest.raises(UsageError, match="segment 0 has -1 tokens"):
        Topology.from_spec([(-1, [])])


def test_packed_rows_do_not_see_each_other(toy: Callable, random_text: Callable, by_hand: Callable) -> None:
    rows = [toy(grammar).parse(random_text(grammar, 7, True)) for grammar in ("multiverse", "medverse")]
    rows.append(Topology.from_spec([(4, [])]))
    packed = Topology.pack(rows)
    expected = torch.block_diag(*(row.dense_mask().int() for row in rows)).bool()
    assert torch.equal(packed.dense_mask(), expected)
    assert np.array_equal(by_hand(packed), expected.numpy())
    assert packed.position_ids.tolist() == [p for row in rows for p in row.position_ids.tolist()]
    assert packed.forced.tolist() == [f for row in rows for f in row.forced.tolist()]
    # The first token of a root that is not the row's first cannot be learnt from the token before it.
    assert {len(rows[0]), len(rows[0]) + len(rows[1])} <= set(packed.first_tokens.tolist())
    assert 0 not in packed.first_tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_sees_nothing_and_is_not_seen(side: str, toy: Callable, random_text: Callable) -> None:
    rows = [Topology.from_spec(DIAMOND), *(toy("multiverse").parse(random_text("multiverse", s, True)) for s in (1, 2))]
    many = Topology.from_spec([(1, []), *((1, [0]) for _ in range(80))])
    rows.append(many)
    batch = Topology.stack(rows, pad_to=300, side=side)
    assert (
        batch.segment_ids.dtype == torch.int32
        and batch.position_ids.dtype == batch.segment_visibility.dtype == torch.int64
    )
    assert batch.segment_ids.shape == batch.position_ids.shape == (4, 300)
    assert batch.segment_visibility.shape == (4, max(row.n_segments for row in rows), 2)
    seen = visible_pairs(batch.segment_ids, batch.segment_visibility)
    for index, row in enumerate(rows):
        real = slice(300 - len(row), 300) if side == "left" else slice(0, len(row))
        assert torch.equal(seen[index, real, real], row.dense_mask())
        assert int(seen[index].sum()) == int(row.dense_mask().sum())
        assert batch.position_ids[index, real].tolist() == row.position_ids.tolist()
    assert Topology.stack(rows).segment_ids.shape[1] == max(map(len, rows))


def test_bad_padding_is_named() -> None:
    with pytest.raises(UsageError, match="pad to 10 tokens or more"):
        Topology.stack([Topology.from_spec(DIAMOND)], pad_to=9)
    with pytest.raises(UsageError, match="side='middle'"):
        Topology.stack([Topology.from_spec(DIAMOND)], side="middle")


@pytest.mark.parametrize("ids", [torch.ones(2, 4, dtype=torch.long), [1.5, 2.0], [[1, 2], [3, 4]]])
def test_a_topology_is_read_from_one_row_of_whole_numbers(ids: object, toy: Callable) -> None:
    """Two rows are not one long row."""
    with pytest.raises(UsageError, match="of one row"):
        toy("multiverse").parse_ids(ids)
    assert len(toy("multiverse").parse_ids(torch.ones(1, 4, dtype=torch.long))) == 4


def test_holes_within_a_row_are_left_out() -> None:
    topology = Topology(np.array([0, -1, 0, 1], np.int32), np.array([0, 0, 1, 2]), [[], [0]])
    assert topology.dense_mask().tolist() == [
        [True, False, False, False],
        [False, False, False, False],
        [True, False, True, False],
        [True, False, True, True],
    ]
    assert topology.critical_path == 3 and topology.first_tokens.tolist() == [3]


def test_a_dense_mask_leaves_no_row_empty() -> None:
    """A softmax over nothing is not a number, and what padding holds would spread over the layers."""
    batch = Topology.stack([Topology.from_spec(DIAMOND), Topology.from_spec([(2, [])])], side="left")
    mask = batch.to_mask()
    dense, seen = dense_mask(mask)[:, 0], visibility(mask)
    assert dense.any(-1).all()
    assert torch.equal(dense[batch.segment_ids >= 0], seen[batch.segment_ids >= 0])


@pytest.mark.parametrize("length", [1, 127, 128, 300, 513])
def test_the_mask_of_flex_attention_is_the_same(length: int) -> None:
    """In its pairs, and in the blocks that it names: none is left out, and a full one is full."""
    generator = np.random.default_rng(length)
    spec = [
        (length // 4 + 1, []),
        *((length // 5, [0]) for _ in range(3)),
        (length // 6, [1, 2]),
        (length // 6, [3, 4]),
    ]
    rows = [Topology.from_spec(spec), Topology.from_spec([(int(generator.integers(1, length + 1)), [])])]
    batch = Topology.stack(rows)
    mask = TopologyMask(batch.segment_ids, batch.segment_visibility)
    blocks, seen = flex_mask(mask), visibility(mask)
    width = batch.segment_ids.shape[1]
    index = torch.arange(width)
    rows_index = torch.arange(2)[:, None, None]
    found = blocks.mask_mod(rows_index, torch.zeros(1, dtype=torch.long), index[None, :, None], index[None, None, :])
    assert torch.equal(found, seen)
    kept, full = torch.zeros_like(seen), torch.zeros_like(seen)
    for row in range(2):
        for query_block in range(blocks.kv_num_blocks.shape[2]):
            queries = slice(128 * query_block, 128 * query_block + 128)
            for counts, lists, into in (
                (blocks.kv_num_blocks, blocks.kv_indices, kept),
                (blocks.full_kv_num_blocks, blocks.full_kv_indices, full),
            ):
                for block in lists[row, 0, query_block, : counts[row, 0, query_block]].tolist():
                    into[row, queries, 128 * block : 128 * block + 128] = True
    assert not (seen & ~(kept | full)).any() and not (full & ~seen).any() and not (kept & full).any()
