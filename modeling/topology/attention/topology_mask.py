"""Visibility between tokens as a model takes it, for whole texts and for queries over a cache, and masks made of it."""

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
    """Visibility of the tokens of whole texts.

    Token i sees token j iff ``j <= i`` and the segment of i sees that of j: bit ``segment_ids[j]`` of
    ``segment_visibility[segment_ids[i]]`` is set.

    Attributes:
        segment_ids: int32 [B, S], -1 at padding and other holes, which see nothing and are not seen.
        segment_visibility: int64 [B, N, W]: bit t of row s (bit ``t % 64`` of word ``t // 64``) is set where segment s
            sees segment t.
        blocks: the result of `topology_blocks` for these two, computed once for all layers of a model; or None.
    """

    segment_ids: Tensor
    segment_visibility: Tensor
    blocks: BlockLists | None = None

    def with_blocks(self) -> TopologyMask:
        """The same mask with its block lists."""
        if self.blocks is not None:
            return self
        return self._replace(blocks=topology_blocks(self.segment_ids, self.segment_visibility))

    def to(self, device: torch.device | str) -> TopologyMask:
        """The same mask on another device."""
        blocks = None if self.blocks is None else BlockLists(*(part.to(device) for part in self.blocks))
        return TopologyMask(self.segment_ids.to(device), self.segment_visibility.to(device), blocks)


class TopologyQueries(NamedTuple):
    """Visibility of tokens that follow a cache which all branches share; their own slots are written already.

    A token sees cache slot c iff ``c < kv_len``, ``c <= cache_position``, and bit ``kv_segment_ids[c]`` of its bitmap
    is set.

    Attributes:
        cache_position: int32 [B, Q], cache slot of each token; -1 for a padded query, which is not written to the cache
            and sees nothing.
        kv_len: int32 [B], filled slots, including those of the call's tokens.
        kv_segment_ids: int32 [B, C], segment of each slot, -1 at holes.
        segment_visibility: int64 [B, Q, W], bitmap of the segments that each token sees.
    """

    cache_position: Tensor
    kv_len: Tensor
    kv_segment_ids: Tensor
    segment_visibility: Tensor


def check_topology_type(topology: Any) -> None:
    """Raise `UsageError` unless `topology` is a `TopologyMask` or `TopologyQueries`."""
    if not isinstance(topology, (TopologyMask, TopologyQueries)):
        raise UsageError(
            f"topology is a {type(topology).__name__}, and a model takes a TopologyMask",
            "pass Topology.stack([topology]).to_mask()",
        )


def visibility(topology: TopologyMask | TopologyQueries, num_slots: int | None = None) -> Tensor:
    """True where a query sees a key: bool [B, S, S], or [B, Q, C] for `TopologyQueries`.

    Args:
        num_slots: C; by default that of `kv_segment_ids`.
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
    """The boolean mask of `sdpa`, true where a query sees a key: [B, 1, S, S], or [B, 1, Q, C].

    A query that sees nothing gets the first key: its softmax would be NaN, which spreads to other tokens in later
    layers.
    """
    visible = visibility(topology, num_slots)
    if visible.shape[-1] == 0:
        return visible[:, None]
    sees_nothing = ~visible.any(-1, keepdim=True)
    return torch.cat((visible[..., :1] | sees_nothing, visible[..., 1:]), dim=-1)[:, None]


def additive_mask(topology: TopologyMask | TopologyQueries, dtype: torch.dtype, num_slots: int | None = None) -> Tensor:
    """`dense_mask` for `eager`: 0 where a query sees a key, ``torch.finfo(dtype).min`` elsewhere."""
    visible = dense_mask(topology, num_slots)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def flex_mask(topology: TopologyMask) -> BlockMask:
    """The mask of FlexAttention, made from the block lists without a dense mask [S, S]."""
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
