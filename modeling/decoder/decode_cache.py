"""Static key-value caches that captured decoding steps write to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from hf_efficient.errors import HFEError
from hf_efficient.modeling.decoder.cache_contract import CapturableCache


class StaticSlots(CapturableCache):
    """The cache contract over `StaticLayer`s: token i of a sequence is in slot i of every layer.

    Attributes:
        layers: each with keys and values [B, Hkv, capacity, D] and its length, a scalar on the device.
    """

    layers: list[Any]

    @property
    def batch_size(self) -> int:
        return self.layers[0].keys.shape[0]

    @property
    def capacity(self) -> int:
        return self.layers[0].max_cache_len

    def memory(self) -> list[Tensor]:
        return [x for layer in self.layers for x in (layer.keys, layer.values, layer.cumulative_length)]

    def state_tensors(self) -> list[Tensor]:
        """The lengths: a slot that a step has written is written again by the next one at this length."""
        return [layer.cumulative_length for layer in self.layers]

    def truncate(self, length: int) -> None:
        for layer in self.layers:
            layer.cumulative_length.fill_(length)


class StaticCacheView(StaticSlots):
    """The cache contract of a caller's `StaticCache`, whose size is fixed."""

    def __init__(self, cache: StaticCache) -> None:
        self.layers = cache.layers

    def grow(self, capacity: int) -> None:
        raise HFEError(
            f"a static cache has a fixed size, here {self.capacity} slots", "make it with a larger max_cache_len"
        )

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()


class DecodeCache(StaticSlots, StaticCache):
    """A static cache in which every layer, sliding-window layers too, keeps all tokens in their slots.

    Returned by `generate`, it can be used like a dynamic cache: it grows when the model is called with it, can be
    cropped, and its sequences can be repeated and selected.

    Args:
        config: of the model.
        batch_size: number of sequences.
        capacity: slots of each layer.
        dtype, device: of keys and values.
    """

    def __init__(self, config: Any, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        Cache.__init__(self, layers=[StaticLayer(max_cache_len=capacity) for _ in range(config.num_hidden_layers)])
        with torch.inference_mode(False), torch.no_grad():  # the cache may outlive the caller's inference mode
            self._allocate(config, batch_size, dtype, device)

    def _allocate(self, config: Any, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        empty = torch.empty(batch_size, config.num_key_value_heads, 0, config.head_dim, dtype=dtype, device=device)
        # All lengths are views of one tensor.
        self.lengths = torch.zeros(config.num_hidden_layers, dtype=torch.long, device=device)
        for layer, length in zip(self.layers, self.lengths, strict=True):
            layer.lazy_initialization(empty, empty)
            layer.cumulative_length = length

    @property
    def is_compileable(self) -> bool:
        """Always False, so that `generate` never auto-compiles the eager fallback."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens; waits for the device."""
        return int(self.layers[layer_idx].cumulative_length)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Key-value length and offset, as in transformers; grows the cache when the call's tokens do not fit.

        Every forward asks for its mask sizes before it writes to the cache.
        """
        self.ensure_capacity(self.get_seq_length(layer_idx) + query_length)
        return self.capacity, 0

    def reset(self) -> None:
        """Forget all tokens. Keys and values become zero: a masked slot has weight zero, and 0 * inf would be NaN."""
        StaticCache.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is an error, as in transformers."""
        if tokens_to_remove > 0:
            raise HFEError(f"crop({tokens_to_remove}) is not supported", "pass minus the number of tokens to remove")
        for layer in self.layers:
            layer.cumulative_length.add_(tokens_to_remove).clamp_(min=0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence in place."""
        self._map_sequences(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences with these indices."""
        self._map_sequences(lambda states: states[indices])

    def _map_sequences(self, function: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.keys, layer.values = function(layer.keys), function(layer.values)
            layer.batch_size = layer.keys.shape[0]

    @torch.inference_mode(False)
    @torch.no_grad()
    def grow(self, capacity: int) -> None:
        """Move to memory of `capacity` slots, with all that is stored."""
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                new[:, :, : old.shape[2]] = old
                setattr(layer, name, new)
            layer.max_cache_len = capacity


def contract_of(cache: Cache) -> CapturableCache:
    """The cache contract of `cache`.

    Raises:
        HFEError: steps cannot be captured over this cache.
    """
    contract = find_contract(cache)
    if contract is None:
        raise HFEError(f"steps cannot be captured over a {type(cache).__name__}", "pass no cache, or a StaticCache")
    return contract


def find_contract(cache: Cache) -> CapturableCache | None:
    """The cache contract of `cache`, or None where steps cannot be captured over it.

    A plain `StaticCache` gets a view; sliding-window layers, which move their slots, and subclasses of layers do not.
    """
    if isinstance(cache, CapturableCache):
        return cache
    is_static = isinstance(cache, StaticCache) and not cache.offloading
    if is_static and all(type(layer) is StaticLayer for layer in cache.layers):
        return StaticCacheView(cache)
    return None


__all__ = ["DecodeCache", "StaticCacheView", "StaticSlots", "contract_of", "find_contract"]
