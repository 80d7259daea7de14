"""One decoding step of `generate` over a cache: a call of the model, or the replay of its CUDA graph."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_efficient.modeling.decoder.cache_compat import cache_argument
from hf_efficient.modeling.decoder.decode_cache import require_capturable
from hf_efficient.modeling.decoder.decode_interface import pack_decode_mask
from hf_efficient.modeling.decoder.graph_capture import capture_graph


class DecodeStep:
    """A step of one token per sequence over one cache, with the input tensors that it reads and advances.

    Call `reset`, set `tokens`, then call `run`, or after `capture` call `replay`: both return logits [B, V] and advance
    positions, mask and cache by one token. `model` and `cache` of all calls must be the same, and the cache must not
    have been reallocated since (`fits`).

    Args:
        cache: a cache that `as_capturable` of `decode_cache.py` supports, with allocated memory. Only the addresses of
            its memory are stored, so that the step does not keep the cache alive.
        layer_types: the layer types that the model has masks for; all get the same mask.
        padded: True if a sequence begins with padding: the mask then has a row that hides the slots of padding.

    Attributes:
        tokens: int64 [B, 1], the tokens that the next step feeds to the model.
        positions: int64 [B, 1], their position ids.
        mask: int32 [B, 1, 1, 2] or, if `padded`, [B, 1, 2, capacity] (at least 2); see `decode_interface.py`.
        signature: `step_signature` of the model when the step was captured (see `graph_capture.py`); None before.
        graph_bytes: device memory that the graph holds; 0 before.

    Raises:
        HFEError: the cache is not supported.
    """

    _graph: torch.cuda.CUDAGraph
    _logits: Tensor

    def __init__(self, cache: Cache, layer_types: Collection[str], padded: bool) -> None:
        capturable = require_capturable(cache)
        device = capturable.memory()[0].device
        self.capacity = capturable.capacity
        self.padded = padded
        self._addresses = capturable.addresses()
        batch = capturable.batch_size
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
        """Number of sequences B."""
        return self.tokens.shape[0]

    def fits(self, cache: Cache) -> bool:
        """True when the memory of `cache` is that of the step: it is the same cache and has not been reallocated.

        Raises:
            HFEError: the cache is not supported, see `as_capturable`.
        """
        return require_capturable(cache).addresses() == self._addresses

    def reset(self, length: int, positions: Tensor, padding_mask: Tensor | None) -> None:
        """Set positions and mask, in place, for a next step after `length` cached tokens; `tokens` is not changed.

        Args:
            length: number of tokens in the cache, padding included.
            positions: int64 [B], position id of each sequence's next token.
            padding_mask: bool [B, at most `length`], False at padding; None without padding. Not read unless `padded`.
                Slots after it are visible as soon as they hold a token.
        """
        self.positions.copy_(positions[:, None])
        self.mask[:, 0, 0, 0] = length
        self.mask[:, 0, 0, 1] = length + 1
        if self.padded:
            self.mask[:, 0, 1] = 0
            if padding_mask is not None:
                self.mask[:, 0, 1, : padding_mask.shape[1]] = padding_mask.to(torch.int32) - 1

    def run(self, model: Any, cache: Cache) -> Tensor:
        """Call the model with `self.tokens`; return logits [B, V].

        The model adds the tokens to the cache; positions and mask then advance by one token, in place.
        """
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
        """Capture `run` in a CUDA graph, for `replay`.

        Positions, mask and the cache's state are unchanged afterwards, so the step itself is still to be replayed. An
        earlier graph of this step is replaced; if the capture fails, its error propagates.

        Args:
            model: the causal language model, on a CUDA device.
            cache: the cache that the step was created for.
            signature: `step_signature` of the model; stored as `self.signature`.
        """
        state = (self.positions, self.mask, *require_capturable(cache).state_tensors())
        self._graph, self._logits, self.graph_bytes = capture_graph(
            lambda: self.run(model, cache), self.tokens.device, state
        )
        self.signature = signature

    def replay(self) -> Tensor:
        """Run the captured step with `self.tokens`; return logits [B, V], a tensor that the next replay overwrites.

        Call `capture` first. Model and cache are those that it was called with: the caller must check that
        `step_signature` of the model is still `self.signature` and that the step `fits` the cache.
        """
        self._graph.replay()
        return self._logits


class PooledStep:
    """A captured step and its cache: an entry of `StepPool` (see `graph_capture.py`) between calls of `generate`."""

    def __init__(self, cache: Any, step: DecodeStep) -> None:
        self.cache = cache
        self.step = step

    @property
    def signature(self) -> tuple | None:
        """`step_signature` of the model when the step was captured."""
        return self.step.signature

    @property
    def device(self) -> torch.device:
        """Device of the step and of its cache."""
        return self.step.tokens.device

    def fits(self, batch_size: int, capacity: int, padded: bool) -> bool:
        """True when the step has exactly this batch size, capacity and kind of mask."""
        return (self.step.batch_size, self.step.capacity, self.step.padded) == (batch_size, capacity, padded)

    def nbytes(self) -> int:
        """Device memory of the cache and of the graph, in bytes."""
        return self.cache.nbytes() + self.step.graph_bytes

    def report(self) -> list[dict[str, Any]]:
        """One dictionary: batch size, capacity, whether for padded prompts, and bytes of the cache and of the graph."""
        return [
            {
                "batch": self.step.batch_size,
                "capacity": self.step.capacity,
                "padded": self.step.padded,
                "cache_bytes": self.cache.nbytes(),
                "graph_bytes": self.step.graph_bytes,
            }
        ]


# Steps of caches that `generate` returned to the user, to reuse when the cache is passed to another call.
RETURNED_CACHE_STEPS: WeakKeyDictionary[Cache, DecodeStep] = WeakKeyDictionary()
