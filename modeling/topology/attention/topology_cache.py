"""The key-value cache that all branches of a sequence share: slots in the order in which tokens were generated.

A branch is a part of a sequence that is decoded in parallel with others. Which queries may attend to a slot depends not
on its index but on its segment: a run of consecutive tokens between forks and joins of branches. Keys carry the rotary
position of their token, so branches write to neighbouring slots, and neither a fork nor a join copies anything. B is
the batch size, Hkv the number of key-value heads, Q that of the call's queries, D the head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hf_efficient.modeling.decoder.attention import CacheWrite
from hf_efficient.modeling.decoder.cache_contract import CapturableCache, round_capacity


class TopologyLayer(CacheLayerMixin):
    """Keys and values of one layer, `keys` and `values` [B, Hkv, capacity, D].

    The memory has one more slot after the last, to which tokens that must not be stored are written.

    Args:
        next_slots: where the next call's tokens are written; shared by all layers of a cache.
    """

    is_sliding = False

    def __init__(self, next_slots: NextSlots) -> None:
        super().__init__()
        self._next_slots = next_slots

    @torch.inference_mode(False)
    @torch.no_grad()
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeroed memory of `capacity` + 1 slots, with the dtype, device and head shapes of these states.

        Args:
            key_states, value_states: [B, Hkv, Q, D].
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        slots = self._next_slots.capacity + 1
        self._set(
            *(states.new_zeros(*states.shape[:2], slots, states.shape[3]) for states in (key_states, value_states))
        )
        self.is_initialized = True

    def _set(self, keys: Tensor, values: Tensor) -> None:
        """Use tensors [B, Hkv, capacity + 1, D] as memory; `keys` and `values` are views of all but the last slot."""
        self._storage = keys, values
        self.keys, self.values = keys[:, :, :-1], values[:, :, :-1]

    def grow(self, capacity: int) -> None:
        """Reallocate with `capacity` slots, not fewer than before, and copy the contents.

        Memory must have been allocated. `NextSlots.capacity` is not changed here, see `TopologyCache.grow`.
        """
        moved = []
        for old in self._storage:
            new = old.new_zeros(*old.shape[:2], capacity + 1, old.shape[3])
            new[:, :, : old.shape[2] - 1] = old[:, :, :-1]
            moved.append(new)
        self._set(*moved)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write a call's keys and values to the slots set by `TopologyCache.place`; return those to compute attention
        with.

        The first call allocates the memory.

        Args:
            key_states, value_states: [B, Hkv, Q, D], with Q at most the capacity.
            *args, **kwargs: further arguments of transformers, ignored.

        Returns:
            For a prompt `key_states` and `value_states` themselves; for other calls the keys and values of the first
            `kv_length` slots, views [B, Hkv, kv_length, D] of the cache.
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
        """Return the length of the keys that `update` will return, and their offset 0, as in transformers."""
        return (query_length if self._next_slots.slots is None else self._next_slots.kv_length), 0

    def get_seq_length(self) -> int:
        """Return the key-value length that the last `place` set; 0 if it was for a prompt."""
        return self._next_slots.kv_length if self._next_slots.slots is not None else 0

    def get_max_length(self) -> int:
        """Return the capacity."""
        return self._next_slots.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.23


class NextSlots:
    """Where the tokens of the next call are written; one object for all layers of a cache.

    Attributes:
        capacity: number of slots of each layer.
        slots: int64 [B, Q], slot of each token, `capacity` for one that is not stored; None for a prompt, which is
            written to slots 0 to P - 1.
        kv_length: number of slots, from the first, whose keys and values attention receives.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.slots: Tensor | None = None
        self.kv_length = capacity


class TopologyCache(CapturableCache, Cache):
    """Keys and values [B, Hkv, capacity, D] of each layer, written to the slots that `place` sets.

    Call `place` before each forward pass. Memory for keys and values is allocated at the first one.

    Args:
        layers: number of layers.
        batch: B, the number of sequences.
        capacity: number of slots of each sequence, at least; `round_capacity` rounds it up.
        device: device of `segments`; keys and values are on the device where the model computes them.

    Attributes:
        segments: int32 [B, capacity + 1], segment of the token in each slot, -1 for an unused slot. The decoding loop
            writes it. The last entry belongs to the slot for tokens that are not stored.
    """

    def __init__(self, layers: int, batch: int, capacity: int, device: torch.device) -> None:
        self.next_slots = NextSlots(round_capacity(capacity))
        super().__init__(layers=[TopologyLayer(self.next_slots) for _ in range(layers)])
        with torch.inference_mode(False):  # the cache may outlive the caller's inference mode
            self.segments = torch.full((batch, self.capacity + 1), -1, dtype=torch.int32, device=device)

    @property
    def batch_size(self) -> int:
        """B, the number of sequences."""
        return self.segments.shape[0]

    @property
    def capacity(self) -> int:
        """Number of slots of each sequence."""
        return self.next_slots.capacity

    def memory(self) -> list[Tensor]:
        """Return every tensor that a step reads or writes: `segments`, then keys and values of the allocated layers."""
        states = [x for layer in self.layers if layer.is_initialized for x in (layer.keys, layer.values)]
        return [self.segments, *states]

    def state_tensors(self) -> list[Tensor]:
        """Return the tensors that make a repeated step differ: none, since it writes the same slots again."""
        return []

    def truncate(self, length: int) -> None:
        """Keep the first `length` slots of each sequence: the segments of the others are set to -1.

        Keys and values stay in memory, but no query may attend to them until they are overwritten.
        """
        self.segments[:, length:] = -1

    def place(self, slots: Tensor | None, kv_length: int | None = None) -> None:
        """Set where the tokens of the next forward pass are written.

        Args:
            slots: int64 [B, Q], slot of each token, `capacity` for one that is not stored; None for a prompt, which is
                written to the first slots of an empty cache.
            kv_length: number of slots, from the first, whose keys and values attention receives; None for all.
        """
        self.next_slots.slots = slots
        self.next_slots.kv_length = self.capacity if kv_length is None else kv_length

    def next_write(self, layer_idx: int) -> CacheWrite | None:
        """Return the memory and slots to which a kernel may write the next tokens' keys and values itself.

        None if the model must call `update` instead: for a prompt, before memory is allocated, or if attention receives
        only part of the slots.

        Args:
            layer_idx: number of the layer.
        """
        layer, following = self.layers[layer_idx], self.next_slots
        if not layer.is_initialized or following.slots is None or following.kv_length != following.capacity:
            return None
        return CacheWrite(layer.keys, layer.values, following.slots)

    @torch.inference_mode(False)
    @torch.no_grad()
    def grow(self, capacity: int) -> None:
        """Reallocate with at least `capacity` slots, and at least twice as many as before, and copy the contents.

        CUDA graphs captured before refer to the old memory and must be discarded. Call `place` before the next forward
        pass, since its key-value length and the slot for tokens that are not stored refer to the old capacity.

        Raises:
            torch.OutOfMemoryError: the device has too little memory; the cache must then not be used any more.
        """
        capacity = round_capacity(max(capacity, 2 * self.capacity))
        for layer in self.layers:
            if layer.is_initialized:
                layer.grow(capacity)
        segments = self.segments.new_full((self.segments.shape[0], capacity + 1), -1)
        segments[:, : self.capacity] = self.segments[:, :-1]
        self.segments = segments
        self.next_slots.capacity = capacity

    def reset(self) -> None:
        """Remove all tokens without freeing memory, and expect a prompt; keys and values stay until overwritten."""
        self.segments.fill_(-1)
        self.place(None)
