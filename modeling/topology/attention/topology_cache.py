"""The cache that all branches of a sequence share: slots in the order in which tokens were generated.

A slot's index says nothing about which queries see it; its segment does. Keys carry the rotary position of their token,
so branches write side by side, and fork and join move nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hf_efficient.modeling.decoder.attention import CacheWrite
from hf_efficient.modeling.decoder.cache_contract import CapturableCache, round_capacity


class TopologyLayer(CacheLayerMixin):
    """Keys and values [B, Hkv, capacity, D] of one layer.

    One more slot after the last takes tokens that are not to be stored.
    """

    is_sliding = False

    def __init__(self, next_slots: NextSlots) -> None:
        super().__init__()
        self._next_slots = next_slots

    @torch.inference_mode(False)
    @torch.no_grad()
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate memory for keys and values like these, [B, Hkv, Q, D]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        slots = self._next_slots.capacity + 1
        self._set(
            *(states.new_zeros(*states.shape[:2], slots, states.shape[3]) for states in (key_states, value_states))
        )
        self.is_initialized = True

    def _set(self, keys: Tensor, values: Tensor) -> None:
        self._storage = keys, values
        self.keys, self.values = keys[:, :, :-1], values[:, :, :-1]

    def grow(self, capacity: int) -> None:
        """Move to memory of `capacity` slots, with all that is stored."""
        moved = []
        for old in self._storage:
            new = old.new_zeros(*old.shape[:2], capacity + 1, old.shape[3])
            new[:, :, : old.shape[2] - 1] = old[:, :, :-1]
            moved.append(new)
        self._set(*moved)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write a call's keys and values [B, Hkv, Q, D] to their slots; return those that its queries may see.

        For a prompt these are the call's own, for other calls [B, Hkv, key-value length, D].
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots, kv_length = self._next_slots.slots, self._next_slots.kv_length
        if slots is None:  # a prompt: slots 0, 1, …, of an empty cache
            for storage, states in zip(self._storage, (key_states, value_states), strict=True):
                storage[:, :, : states.shape[2]] = states
            return key_states, value_states
        for storage, states in zip(self._storage, (key_states, value_states), strict=True):
            storage.scatter_(2, slots[:, None, :, None].expand_as(states), states)
        return self.keys[:, :, :kv_length], self.values[:, :, :kv_length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key-value length and offset, as in transformers."""
        return (query_length if self._next_slots.slots is None else self._next_slots.kv_length), 0

    def get_seq_length(self) -> int:
        return self._next_slots.kv_length if self._next_slots.slots is not None else 0

    def get_max_length(self) -> int:
        return self._next_slots.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.23


class NextSlots:
    """Where the tokens of the next call are written; one object for all layers of a cache.

    Attributes:
        capacity: slots of each layer.
        slots: int64 [B, Q], slot of each token, `capacity` for one that is not stored; None for a prompt.
        kv_length: slots that the call's queries may see, the first ones.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.slots: Tensor | None = None
        self.kv_length = capacity


class TopologyCache(CapturableCache, Cache):
    """Keys and values [B, Hkv, capacity, D] of each layer, written to the slots that `place` names.

    Args:
        layers: number of layers.
        batch: number of sequences.
        capacity: slots; rounded up by `round_capacity`.
        device: of the slots' segments; keys and values are where the model computes them.

    Attributes:
        segments: int32 [B, capacity + 1], segment of each slot, -1 where there is none.
    """

    def __init__(self, layers: int, batch: int, capacity: int, device: torch.device) -> None:
        self.next_slots = NextSlots(round_capacity(capacity))
        super().__init__(layers=[TopologyLayer(self.next_slots) for _ in range(layers)])
        with torch.inference_mode(False):  # the cache may outlive the caller's inference mode
            self.segments = torch.full((batch, self.capacity + 1), -1, dtype=torch.int32, device=device)

    @property
    def batch_size(self) -> int:
        return self.segments.shape[0]

    @property
    def capacity(self) -> int:
        return self.next_slots.capacity

    def memory(self) -> list[Tensor]:
        states = [x for layer in self.layers if layer.is_initialized for x in (layer.keys, layer.values)]
        return [self.segments, *states]

    def state_tensors(self) -> list[Tensor]:
        """None: a step writes the slots that it was given, the same ones when it runs again."""
        return []

    def truncate(self, length: int) -> None:
        """Keep the first `length` slots of each sequence; no query sees the others again until they are rewritten."""
        self.segments[:, length:] = -1

    def place(self, slots: Tensor | None, kv_length: int | None = None) -> None:
        """Set where the tokens of the next call are written.

        Args:
            slots: int64 [B, Q], `capacity` for a token that is not stored; None for a prompt in an empty cache.
            kv_length: slots that the call's queries may see; None for all.
        """
        self.next_slots.slots = slots
        self.next_slots.kv_length = self.capacity if kv_length is None else kv_length

    def next_write(self, layer_idx: int) -> CacheWrite | None:
        """Where a kernel may write the next call's tokens; None for a prompt, or when not all slots may be seen."""
        layer, following = self.layers[layer_idx], self.next_slots
        if not layer.is_initialized or following.slots is None or following.kv_length != following.capacity:
            return None
        return CacheWrite(layer.keys, layer.values, following.slots)

    @torch.inference_mode(False)
    @torch.no_grad()
    def grow(self, capacity: int) -> None:
        """Have room for `capacity` slots, and for at least twice as many as before."""
        capacity = round_capacity(max(capacity, 2 * self.capacity))
        for layer in self.layers:
            if layer.is_initialized:
                layer.grow(capacity)
        segments = self.segments.new_full((self.segments.shape[0], capacity + 1), -1)
        segments[:, : self.capacity] = self.segments[:, :-1]
        self.segments = segments
        self.next_slots.capacity = capacity

    def reset(self) -> None:
        """Forget all tokens, in the same memory; keys and values stay until they are overwritten."""
        self.segments.fill_(-1)
        self.place(None)
