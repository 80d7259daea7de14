"""One decoding step over a cache, as a call of the model or as the replay of a CUDA graph that runs no Python."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_efficient.modeling.decoder.cache_compat import cache_argument
from hf_efficient.modeling.decoder.decode_cache import contract_of
from hf_efficient.modeling.decoder.decode_interface import pack_decode_mask
from hf_efficient.modeling.decoder.graph_capture import record_graph


class DecodeStep:
    """A step of one token per sequence over one cache, with the buffers that it reads and advances.

    Args:
        cache: the cache, of a kind that `contract_of` accepts; only the addresses of its memory are kept, so that the
            step does not keep the cache alive.
        layer_types: the layer types that the model has masks for.
        padded: some sequence begins with padding, so the step reads which slots are visible.

    Attributes:
        tokens, positions: int64 [B, 1], input of the next step.
        signature: `step_signature` of the model at capture; None before.
    """

    _graph: torch.cuda.CUDAGraph
    _logits: Tensor

    def __init__(self, cache: Cache, layer_types: Collection[str], padded: bool) -> None:
        contract = contract_of(cache)
        device = contract.memory()[0].device
        self.capacity = contract.capacity
        self.padded = padded
        self._addresses = contract.addresses()
        batch = contract.batch_size
        with torch.inference_mode(False), torch.no_grad():  # these outlive the caller's inference mode
            self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
            self.positions = torch.zeros_like(self.tokens)
            visible = torch.ones(batch, self.capacity, dtype=torch.bool, device=device) if padded else None
            self.mask = pack_decode_mask(1, torch.zeros((), dtype=torch.int32, device=device), batch, visible)
        self.masks = dict.fromkeys(layer_types, self.mask)
        self.signature: tuple | None = None
        self.graph_bytes = 0

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]

    def fits(self, cache: Cache) -> bool:
        """True when the cache's memory is still the one that the step was made for."""
        return contract_of(cache).addresses() == self._addresses

    def reset(self, length: int, positions: Tensor, padding_mask: Tensor | None) -> None:
        """Reset the step to resume after `length` cached tokens.

        Args:
            length: tokens in the cache, padding included.
            positions: int64 [B], position of each sequence's next token.
            padding_mask: bool [B, length], False at padding; None when there is none.
        """
        self.positions.copy_(positions[:, None])
        self.mask[:, 0, 0, 0] = length
        self.mask[:, 0, 0, 1] = length + 1
        if self.padded:
            self.mask[:, 0, 1] = 0
            if padding_mask is not None:
                self.mask[:, 0, 1, : padding_mask.shape[1]] = padding_mask.to(torch.int32) - 1

    def run(self, model: Any, cache: Cache) -> Tensor:
        """Logits [B, V] after `self.tokens`, by calling the model; positions and mask advance by one token."""
        logits = model(
            input_ids=self.tokens,
            position_ids=self.positions,
            attention_mask=self.masks,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
            **cache_argument(cache),
        ).logits[:, -1]
        self.positions += 1
        self.mask[:, :, 0, :2] += 1
        return logits

    @torch.no_grad()
    def capture(self, model: Any, cache: Cache, signature: tuple) -> None:
        """Record the step in a CUDA graph; the step's position and the cache's state stay as they are."""
        state = (self.positions, self.mask, *contract_of(cache).state_tensors())
        self._graph, self._logits, self.graph_bytes = record_graph(
            lambda: self.run(model, cache), self.tokens.device, state
        )
        self.signature = signature

    def replay(self) -> Tensor:
        """Logits [B, V] after `self.tokens`, once captured, in a buffer that the next replay overwrites."""
        self._graph.replay()
        return self._logits


class PooledStep:
    """A captured step and its cache, as the pool keeps them between calls of `generate`."""

    def __init__(self, cache: Any, step: DecodeStep) -> None:
        self.cache = cache
        self.step = step

    @property
    def signature(self) -> tuple | None:
        return self.step.signature

    @property
    def device(self) -> torch.device:
        return self.step.tokens.device

    def fits(self, batch_size: int, capacity: int, padded: bool) -> bool:
        """True for a step of this shape."""
        return (self.step.batch_size, self.step.capacity, self.step.padded) == (batch_size, capacity, padded)

    def nbytes(self) -> int:
        """Bytes of the cache and of the graph."""
        return self.cache.nbytes() + self.step.graph_bytes

    def report(self) -> list[dict[str, Any]]:
        """Batch size, capacity, whether for padded prompts, and bytes of the cache and of the graph."""
        return [
            {
                "batch": self.step.batch_size,
                "capacity": self.step.capacity,
                "padded": self.step.padded,
                "cache_bytes": self.cache.nbytes(),
                "graph_bytes": self.step.graph_bytes,
            }
        ]


# Steps of caches that callers keep, found again when a cache is passed to another call of `generate`.
RETURNED_CACHE_STEPS: WeakKeyDictionary[Cache, DecodeStep] = WeakKeyDictionary()
