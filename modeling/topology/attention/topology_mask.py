"""Segment-based attention masks, for full sequences and for queries with a key-value cache.

A segment is a run of consecutive tokens between two points where branches fork or join. Segments form a directed
acyclic graph, numbered so that parents come before children. A token may attend to the tokens before it in its own
segment and to all tokens of the segment's ancestors. Both classes here describe this by bitmaps; `dense_mask`,
`additive_mask` and `flex_mask` convert it for the attention implementations of transformers. B is the batch size, S the
sequence length, Q the number of queries, C that of cache slots, N that of segments, and W that of 64-bit words in a
bitmap, at least ⌈N / 64⌉.
"""

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
    """Which tokens of full sequences may attend to each other.

    Token i may attend to token j iff ``j <= i`` and bit ``segment_ids[j]`` of ``segment_visibility[segment_ids[i]]`` is
    set.

    Attributes:
        segment_ids: int32 [B, S], or [1, S] for all sequences; -1 at padding, which neither attends nor is attended to.
        segment_visibility: int64 [B, N, W], or [1, N, W] for all sequences: bit t of row s (bit ``t % 64`` of word
            ``t // 64``) is set where tokens of segment s may attend to tokens of segment t. A segment's own bit is set.
        blocks: the result of `topology_blocks(segment_ids, segment_visibility)`, which lists the pairs of 128-token
            blocks that attention must compute, so that a model computes it once for all layers; or None.
    """

    segment_ids: Tensor
    segment_visibility: Tensor
    blocks: BlockLists | None = None

    def with_blocks(self) -> TopologyMask:
        """Return this mask with `blocks` filled in; the mask itself if they are there already.

        Raises:
            HFEError: a tensor has a wrong dtype, shape or device.
        """
        if self.blocks is not None:
            return self
        return self._replace(blocks=topology_blocks(self.segment_ids, self.segment_visibility))

    def to(self, device: torch.device | str) -> TopologyMask:
        """Return the mask with all its tensors on `device`."""
        blocks = None if self.blocks is None else BlockLists(*(part.to(device) for part in self.blocks))
        return TopologyMask(self.segment_ids.to(device), self.segment_visibility.to(device), blocks)


class TopologyQueries(NamedTuple):
    """Which slots of a key-value cache each query may attend to; all branches of a sequence share its cache.

    The keys and values of the queries themselves are in the cache when attention is computed. A query may attend to
    slot c iff ``c < kv_len``, ``c <= cache_position``, and bit ``kv_segment_ids[c]`` of its row of `segment_visibility`
    is set.

    Attributes:
        cache_position: int32 [B, Q], cache slot of each query's token; -1 for a padding query, which is not written to
            the cache and attends to nothing.
        kv_len: int32 [B], number of filled slots, including those of the queries.
        kv_segment_ids: int32 [B, C], segment of the token in each slot, -1 at unused slots and padding.
        segment_visibility: int64 [B, Q, W], for each query the bitmap of the segments that it may attend to: bit
            ``t % 64`` of word ``t // 64`` for segment t.
    """

    cache_position: Tensor
    kv_len: Tensor
    kv_segment_ids: Tensor
    segment_visibility: Tensor


def check_topology_type(topology: Any) -> None:
    """Raise `UsageError` unless `topology` is a `TopologyMask` or `TopologyQueries`."""
    if not isinstance(topology, (TopologyMask, TopologyQueries)):
        raise UsageError(
            f"expected a TopologyMask or TopologyQueries as topology, got {type(topology).__name__}",
            "pass Topology.stack([topology]).to_mask()",
        )


def visibility(topology: TopologyMask | TopologyQueries, num_slots: int | None = None) -> Tensor:
    """True where a query may attend to a key: bool [B, S, S], or [B, Q, C] for `TopologyQueries`.

    B is that of `segment_ids`, so 1 for a mask that all sequences share.

    Args:
        topology: the mask or queries.
        num_slots: C, the number of keys that the attention function receives; by default that of `kv_segment_ids`.
            Slots beyond those of `kv_segment_ids` are false. Ignored for a `TopologyMask`.
    """
    if isinstance(topology, TopologyMask):
        return visible_pairs(topology.segment_ids, topology.segment_visibility)
    return visible_slots(
        topology.kv_segment_ids.shape[1] if num_slots is None else num_slots,
        topology.kv_len,
        topology.cache_position,
        None,
        topology.kv_segment_ids,
        topology.segment_visibility,
    )


def dense_mask(topology: TopologyMask | TopologyQueries, num_slots: int | None = None) -> Tensor:
    """Return `visibility` as the boolean mask of `sdpa`: [B, 1, S, S], or [B, 1, Q, C] for `TopologyQueries`.

    It is true where a query may attend to a key. One exception: a query that may attend to no key (padding) is given
    key 0. Otherwise its softmax is NaN, which propagates to other tokens through later layers. Without any key (S = 0
    or C = 0) the mask is empty.

    Args:
        topology, num_slots: as for `visibility`.
    """
    visible = visibility(topology, num_slots)
    if visible.shape[-1] == 0:
        return visible[:, None]
    fully_masked = ~visible.any(-1, keepdim=True)
    return torch.cat((visible[..., :1] | fully_masked, visible[..., 1:]), dim=-1)[:, None]


def additive_mask(topology: TopologyMask | TopologyQueries, dtype: torch.dtype, num_slots: int | None = None) -> Tensor:
    """Return `dense_mask` as the additive mask of `eager`: 0 where it is true, ``torch.finfo(dtype).min`` elsewhere.

    Args:
        topology, num_slots: as for `visibility`.
        dtype: floating-point dtype of the mask, that of the attention scores.
    """
    visible = dense_mask(topology, num_slots)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def flex_mask(topology: TopologyMask) -> BlockMask:
    """Return the `BlockMask` of FlexAttention, built from the mask's block lists without a dense mask [S, S].

    The block lists are computed if ``topology.blocks`` is None. Unlike `dense_mask`, a query that may attend to no key
    stays fully masked.

    Raises:
        HFEError: the block lists must be computed, and a tensor has a wrong dtype, shape or device.
    """
    batch, length = topology.segment_ids.shape
    blocks = topology.blocks
    counts, lists, _ = topology_blocks(topology.segment_ids, topology.segment_visibility) if blocks is None else blocks
    # FlexAttention evaluates the mask for whole blocks, so indices may reach past the end.
    segments = torch.nn.functional.pad(topology.segment_ids.long(), (0, -length % BLOCK), value=-1)
    is_key = (segments >= 0) & (segments < 64 * topology.segment_visibility.shape[2])
    is_query = is_key & (segments < topology.segment_visibility.shape[1])
    safe = torch.where(is_key, segments, 0)
    segment_visibility = topology.segment_visibility.expand(batch, -1, -1)

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_segment = torch.where(is_query[row, query], safe[row, query], 0)
        key_segment = safe[row, key]
        bit = segment_visibility[row, query_segment, key_segment // 64] >> (key_segment % 64) & 1
        return (bit != 0) & is_query[row, query] & is_key[row, key] & (key <= query)

    return BlockMask.from_kv_blocks(
        counts[:, PARTIAL_KEYS, None],
        lists[:, PARTIAL_KEYS, None],
        counts[:, FULL_KEYS, None],
        lists[:, FULL_KEYS, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )
