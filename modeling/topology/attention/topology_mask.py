"""What the tokens of a call see, on the device: for whole texts, and for tokens that follow a cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from hf_efficient.errors import UsageError
from hf_efficient.kernels.decode_attention.reference import visible_slots
from hf_efficient.kernels.topology_attention.reference import visible_pairs
from hf_efficient.kernels.topology_blocks.api import topology_blocks
from hf_efficient.kernels.topology_blocks.block_lists import BLOCK, FULL_KEYS, PARTIAL_KEYS, BlockLists


class TopologyMask(NamedTuple):
    """Whole texts: token i sees token j iff ``j <= i`` and the segment of i sees that of j.

    That is bit ``segment_ids[j]`` of ``segment_visibility[segment_ids[i]]``.

    Attributes:
        segment_ids: int32 [B, S], -1 at padding and other holes, which see nothing and are not seen.
        segment_visibility: int64 [B, N, W]: bit t of row s (bit ``t % 64`` of word ``t // 64``) is set where segment s
            sees segment t.
        blocks: what `topology_blocks` gives for these, so that a model's layers need not compute it one by one.
    """

    segment_ids: Tensor
    segment_visibility: Tensor
    blocks: BlockLists | None = None

    def with_blocks(self) -> TopologyMask:
        """The same with its block lists."""
        return (
            self
            if self.blocks is not None
            else self._replace(blocks=topology_blocks(self.segment_ids, self.segment_visibility))
        )

    def to(self, device: torch.device | str) -> TopologyMask:
        """The same on another device."""
        blocks = None if self.blocks is None else BlockLists(*(part.to(device) for part in self.blocks))
        return TopologyMask(self.segment_ids.to(device), self.segment_visibility.to(device), blocks)


class TopologyQueries(NamedTuple):
    """Tokens that follow a cache whose columns are shared by all branches, their own columns written already.

    A token sees column c iff ``c < kv_len``, c is not behind its own column, and its bit ``kv_segment_ids[c]`` is set.

    Attributes:
        columns: int32 [B, Q], the column of each token; -1 for a dummy, which is written nowhere and sees nothing.
        kv_len: int32 [B], filled columns once the call's tokens are written.
        kv_segment_ids: int32 [B, C], segment of each column, -1 at holes.
        segment_visibility: int64 [B, Q, W], bitmap of the segments that each token sees.
    """

    columns: Tensor
    kv_len: Tensor
    kv_segment_ids: Tensor
    segment_visibility: Tensor


def check_is_topology(given: Any) -> None:
    """Raise `UsageError` for what a model does not take as its topology."""
    if not isinstance(given, (TopologyMask, TopologyQueries)):
        raise UsageError(
            f"topology is a {type(given).__name__}, and a model takes a TopologyMask",
            "pass Topology.stack([topology]).to_mask()",
        )


def seen_pairs(topology: TopologyMask | TopologyQueries, columns: int | None = None) -> Tensor:
    """Bool [B, S, S], or [B, Q, C] with C = `columns`, by default those of `kv_segment_ids`: who sees whom."""
    if isinstance(topology, TopologyMask):
        return visible_pairs(topology.segment_ids, topology.segment_visibility)
    width = topology.kv_segment_ids.shape[1] if columns is None else columns
    return visible_slots(
        width, topology.kv_len, topology.columns, None, topology.kv_segment_ids, topology.segment_visibility
    )


def dense_mask(topology: TopologyMask | TopologyQueries, columns: int | None = None) -> Tensor:
    """The boolean mask of `sdpa`, true where a token sees another: [B, 1, S, S], or [B, 1, Q, C].

    Tokens that see nothing see the first column here: a softmax over nothing is not a number, and would spread.
    """
    seen = seen_pairs(topology, columns)
    if seen.shape[-1] == 0:
        return seen[:, None]
    lost = ~seen.any(-1, keepdim=True)
    return torch.cat((seen[..., :1] | lost, seen[..., 1:]), dim=-1)[:, None]


def additive_mask(topology: TopologyMask | TopologyQueries, dtype: torch.dtype, columns: int | None = None) -> Tensor:
    """The same for `eager`: 0 where a token sees another, the least number of `dtype` elsewhere."""
    seen = dense_mask(topology, columns)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def flex_mask(topology: TopologyMask) -> BlockMask:
    """The same for FlexAttention, from the block lists, without a mask of every pair."""
    batch, length = topology.segment_ids.shape
    blocks = topology.blocks
    counts, lists, _ = topology_blocks(topology.segment_ids, topology.segment_visibility) if blocks is None else blocks
    # The last block may reach past the end.
    segments = torch.nn.functional.pad(topology.segment_ids.long(), (0, -length % BLOCK), value=-1)
    known = (segments >= 0) & (segments < 64 * topology.segment_visibility.shape[2])
    known_query = known & (segments < topology.segment_visibility.shape[1])
    safe = torch.where(known, segments, 0)
    segment_visibility = topology.segment_visibility.expand(batch, -1, -1)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        segment = safe[row, key]
        own = torch.where(known_query[row, query], safe[row, query], 0)
        bit = segment_visibility[row, own, segment // 64] >> (segment % 64) & 1
        return (bit != 0) & known_query[row, query] & known[row, key] & (key <= query)

    return BlockMask.from_kv_blocks(
        counts[:, PARTIAL_KEYS, None],
        lists[:, PARTIAL_KEYS, None],
        counts[:, FULL_KEYS, None],
        lists[:, FULL_KEYS, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )
