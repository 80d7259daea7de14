"""Static key-value caches whose memory does not move, so that CUDA graphs of decoding steps can write to them.

`CapturableCache` (see `cache_contract.py`) is the interface that decoding with CUDA graphs needs from a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from hf_efficient.errors import HFEError
from hf_efficient.modeling.decoder.cache_contract import CapturableCache


class StaticCacheMixin(CapturableCache):
    """`CapturableCache` over transformers' `StaticLayer`s: token i of a sequence is in slot i of every layer.

    Attributes:
        layers: `StaticLayer`s, each with `keys` and `values` [B, Hkv, capacity, D] and `cumulative_length`, the number
            of cached tokens as an int64 scalar tensor. `batch_size` and `memory` need initialised layers: transformers
            allocates keys and values in the first forward.
    """

    layers: list[Any]

    @property
    def batch_size(self) -> int:
        """Number of sequences; the layers must be initialised."""
        return self.layers[0].keys.shape[0]

    @property
    def capacity(self) -> int:
        """Number of slots of each layer."""
        return self.layers[0].max_cache_len

    def memory(self) -> list[Tensor]:
        """Keys, values and length of each layer, in this order."""
        return [x for layer in self.layers for x in (layer.keys, layer.values, layer.cumulative_length)]

    def state_tensors(self) -> list[Tensor]:
        """The length of each layer, a scalar; keys and values need not be restored.

        With the length restored, the next step overwrites the slot that a discarded step has written.
        """
        return [layer.cumulative_length for layer in self.layers]

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of each sequence, in place: sets the length of every layer.

        `length` must not exceed the number of cached tokens; this is not checked.
        """
        for layer in self.layers:
            layer.cumulative_length.fill_(length)


class StaticCacheView(StaticCacheMixin):
    """A user's `StaticCache` as a `CapturableCache`: it shares the layers of `cache`, and its size is fixed.

    The layers must be exactly `StaticLayer`s, see `as_capturable`; this is not checked.
    """

    def __init__(self, cache: StaticCache) -> None:
        self.layers = cache.layers

    def grow(self, capacity: int) -> None:
        """Always raises `HFEError`: a static cache has a fixed size."""
        raise HFEError(
            f"a static cache has a fixed size, here {self.capacity} slots", "make it with a larger max_cache_len"
        )

    def reset(self) -> None:
        """Remove all tokens, in place, and set keys and values to zero."""
        for layer in self.layers:
            layer.reset()


class DecodeCache(StaticCacheMixin, StaticCache):
    """A static cache in which every layer, sliding-window layers too, keeps all tokens in their slots.

    Returned by `generate`, it can be used like a dynamic cache: it grows when the model is called with it, can be
    cropped, and its sequences can be repeated and selected.

    Args:
        config: the model's configuration; `num_hidden_layers`, `num_key_value_heads` and `head_dim` are read.
        batch_size: number of sequences.
        capacity: slots of each layer, the number of tokens that fit; all memory is allocated here.
        dtype, device: dtype and device of keys and values.
    """

    def __init__(self, config: Any, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        Cache.__init__(self, layers=[StaticLayer(max_cache_len=capacity) for _ in range(config.num_hidden_layers)])
        with torch.inference_mode(False), torch.no_grad():  # the cache may outlive the caller's inference mode
            self._allocate(config, batch_size, dtype, device)

    def _allocate(self, config: Any, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate zero keys and values [B, Hkv, capacity, D] and the length, 0, of each layer."""
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
        """Number of cached tokens of a layer, padding included; synchronises with the device."""
        return int(self.layers[layer_idx].cumulative_length)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Key-value length (the capacity) and offset (0), as in transformers.

        Grows the cache if the call's `query_length` tokens do not fit: every forward calls this method before it
        writes to the cache. Synchronises with the device.
        """
        self.ensure_capacity(self.get_seq_length(layer_idx) + query_length)
        return self.capacity, 0

    def reset(self) -> None:
        """Remove all tokens and set keys and values to zero: a masked slot has weight zero, and 0 * inf is NaN."""
        StaticCache.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of each sequence in place.

        Args:
            tokens_to_remove: minus their number, as in transformers; at least all cached tokens empties the cache.

        Raises:
            HFEError: the number is positive.
        """
        if tokens_to_remove > 0:
            raise HFEError(f"crop({tokens_to_remove}) is not supported", "pass minus the number of tokens to remove")
        for layer in self.layers:
            layer.cumulative_length.add_(tokens_to_remove).clamp_(min=0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times, next to itself; this reallocates keys and values."""
        self._map_sequences(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences with these indices, an integer tensor [new batch size]; reallocates keys and values."""
        self._map_sequences(lambda states: states[indices])

    def _map_sequences(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace keys and values [B, Hkv, capacity, D] of every layer by `function` of them, of any batch size.

        CUDA graphs that were captured with the old memory no longer fit.
        """
        for layer in self.layers:
            layer.keys, layer.values = function(layer.keys), function(layer.values)
            layer.batch_size = layer.keys.shape[0]

    @torch.inference_mode(False)
    @torch.no_grad()
    def grow(self, capacity: int) -> None:
        """Reallocate keys and values with `capacity` slots, not fewer than now, and copy the contents.

        CUDA graphs that were captured with the old memory no longer fit.
        """
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                new[:, :, : old.shape[2]] = old
                setattr(layer, name, new)
            layer.max_cache_len = capacity


def require_capturable(cache: Cache) -> CapturableCache:
    """Return `cache` as a `CapturableCache`, as `as_capturable` does.

    Raises:
        HFEError: decoding with CUDA graphs does not support this kind of cache.
    """
    capturable = as_capturable(cache)
    if capturable is None:
        raise HFEError(
            f"decoding with CUDA graphs does not support a {type(cache).__name__}", "pass no cache, or a StaticCache"
        )
    return capturable


def as_capturable(cache: Cache) -> CapturableCache | None:
    """Return `cache` as a `CapturableCache`, which decoding with CUDA graphs needs, or None if it is not supported.

    A `CapturableCache` is returned as it is. A `StaticCache` without offloading whose layers are all exactly
    `StaticLayer` is wrapped in a `StaticCacheView`; its layers need not be initialised yet. Other caches are not
    supported: sliding-window layers shift their contents, and subclasses of `StaticLayer` may override `update`.
    """
    if isinstance(cache, CapturableCache):
        return cache
    is_static = isinstance(cache, StaticCache) and not cache.offloading
    if is_static and all(type(layer) is StaticLayer for layer in cache.layers):
        return StaticCacheView(cache)
    return None


__all__ = ["DecodeCache", "StaticCacheMixin", "StaticCacheView", "as_capturable", "require_capturable"]
