"""The cache that all branches of a row share: one slab of columns a layer, in the order in which tokens came.

A column's place says nothing about who sees it; its segment does. Keys carry the rotary position of their token, so
branches write side by side, and fork and join move nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hf_efficient.modeling.decoder.attention import CacheWrite
from hf_efficient.modeling.decoder.decode_step import round_capacity


class TopologyLayer(CacheLayerMixin):
    """Keys and values [B, Hkv, capacity, D] of one layer.

    One more column behind the last takes what is to be written nowhere.
    """

    is_sliding = False

    def __init__(self, cache: TopologyCache) -> None:
        super().__init__()
        self._cache_columns = cache.next_slots

    @torch.inference_mode(False)
    @torch.no_grad()
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        columns = self._cache_columns
        self._set(
            *(states.new_zeros(*states.shape[:2], columns.capacity + 1, states.shape[3])
              for states in (key_states, value_states))
        )  # fmt: skip
        self.is_initialized = True

    def _set(self, keys: Tensor, values: Tensor) -> None:
        self._storage = keys, values
        self.keys, self.values = keys[:, :, :-1], values[:, :, :-1]

    def grow(self, capacity: int) -> None:
        """Move to memory of `capacity` columns, with all that is stored."""
        moved = []
        for old in self._storage:
            new = old.new_zeros(*old.shape[:2], capacity + 1, old.shape[3])
            new[:, :, : old.shape[2] - 1] = old[:, :, :-1]
            moved.append(new)
        self._set(*moved)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the tokens of a call to their columns; what the call's queries may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        call = self._cache_columns
        if call.slots is None:  # the prompt: columns 0, 1, …, and nothing was there before
            for storage, states in zip(self._storage, (key_states, value_states), strict=True):
                storage[:, :, : states.shape[2]] = states
            return key_states, value_states
        for storage, states in zip(self._storage, (key_states, value_states), strict=True):
            storage.scatter_(2, call.slots[:, None, :, None].expand_as(states), states)
        return self.keys[:, :, : call.width], self.values[:, :, : call.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        call = self._cache_columns
        return (query_length if call.slots is None else call.width), 0

    def get_seq_length(self) -> int:
        return self._cache_columns.width if self._cache_columns.slots is not None else 0

    def get_max_length(self) -> int:
        return self._cache_columns.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.23


class _Columns:
    """Where the tokens of the coming call go; shared by the layers.

    Attributes:
        capacity: columns of each layer.
        slots: [B, Q], int64: column of each token, `capacity` for one that goes nowhere; None for the prompt.
        width: columns that the call's queries may look at.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.slots: Tensor | None = None
        self.width = capacity


class TopologyCache(Cache):
    """One slab a layer, [B, Hkv, capacity, D], written where `place` says.

    Args:
        layers: number of layers.
        batch: rows.
        capacity: columns; rounded up, as the captured steps of plain generation have it.
        device: of the columns' segments; keys and values are where the model computes them.

    Attributes:
        segments: [B, capacity + 1], int32: segment of each column, -1 where there is none.
    """

    def __init__(self, layers: int, batch: int, capacity: int, device: torch.device) -> None:
        self.next_slots = _Columns(round_capacity(capacity))
        super().__init__(layers=[TopologyLayer(self) for _ in range(layers)])
        with torch.inference_mode(False):  # the cache may outlive the caller's inference mode
            self.segments = torch.full((batch, self.capacity + 1), -1, dtype=torch.int32, device=device)

    @property
    def capacity(self) -> int:
        return self.next_slots.capacity

    def place(self, slots: Tensor | None, width: int | None = None) -> None:
        """Where the tokens of the coming call go, and how many columns its queries may look at; None: all."""
        self.next_slots.slots = slots
        self.next_slots.width = self.capacity if width is None else width

    def next_write(self, layer_idx: int) -> CacheWrite | None:
        """Where a kernel may write the coming call's tokens itself; None for a prompt or a part of the columns."""
        layer, call = self.layers[layer_idx], self.next_slots
        if not layer.is_initialized or call.slots is None or call.width != call.capacity:
            return None
        return CacheWrite(layer.keys, layer.values, call.slots)

    @torch.inference_mode(False)
    @torch.no_grad()
    def grow(self, columns: int) -> None:
        """Make room for `columns`: at least twice the columns there were."""
        capacity = round_capacity(max(columns, 2 * self.capacity))
        for layer in self.layers:
            if layer.is_initialized:
                layer.grow(capacity)
        segments = self.segments.new_full((self.segments.shape[0], capacity + 1), -1)
        segments[:, : self.capacity] = self.segments[:, :-1]
        self.segments = segments
        self.next_slots.capacity = capacity

    def reset(self) -> None:
        """Forget everything, for another prompt in the same memory; keys and values stay until they are overwritten."""
        self.segments.fill_(-1)
        self.place(None)

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)
