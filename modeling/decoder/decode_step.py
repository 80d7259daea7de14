"""One decoding step over a static cache, captured in a CUDA graph: nothing of it runs in Python when it is replayed.

Replayed is only what would run anyway. Before a replay the model is looked over (`step_signature`): a module with a
hook, an adapter or a wrapper, a weight of another kind or one that moved since, and the step runs as a call.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from hf_efficient.errors import HFEError
from hf_efficient.modeling.decoder.cache_compat import cache_argument
from hf_efficient.modeling.decoder.decode_interface import pack_decode_mask
from hf_efficient.modeling.decoder.fused_steps import is_unhooked

# Modules of other packages whose forward does nothing but compute; our own are known by where they come from.
_KNOWN_MODULES = ("torch.nn.modules.", "transformers.activations")
_OWN_PACKAGE = f"{__name__.partition('.modeling.')[0] if '.modeling.' in __name__ else __name__.rpartition('.')[0]}."
# Capacities are rounded up, so that prompts of similar lengths share a cache and its capture.
_LEAST_CAPACITY = 256
_ROUNDS_PER_DOUBLING = 8
# Attributes of a module or configuration that a forward may read without any tensor telling of them.
_SETTINGS = (bool, int, float, str, type(None))
# Captures share a stream, so there is one at a time.
_CAPTURING = threading.Lock()


class DecodeCache(StaticCache):
    """A static cache whose every layer keeps all columns, windowed layers too, in its place.

    To those whom `generate` returns it to, it is what a dynamic cache would be: it grows when the model is called with
    it, can be cropped, and its rows can be repeated and selected.

    Args:
        config: of the model.
        batch: rows.
        capacity: columns.
        dtype, device: of keys and values.
    """

    def __init__(self, config: Any, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        Cache.__init__(self, layers=[StaticLayer(max_cache_len=capacity) for _ in range(config.num_hidden_layers)])
        with torch.inference_mode(False), torch.no_grad():  # the cache may outlive the caller's inference mode
            self._allocate(config, batch, dtype, device)

    def _allocate(self, config: Any, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        empty = torch.empty(batch, config.num_key_value_heads, 0, config.head_dim, dtype=dtype, device=device)
        # In one tensor, so that they are set at once.
        self.lengths = torch.zeros(config.num_hidden_layers, dtype=torch.long, device=device)
        for layer, length in zip(self.layers, self.lengths, strict=True):
            layer.lazy_initialization(empty, empty)
            layer.cumulative_length = length

    @property
    def capacity(self) -> int:
        return self.layers[0].max_cache_len

    @property
    def is_compileable(self) -> bool:
        """False: nobody asked for the model to be compiled, so transformers shall not, where a step is not captured."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that are filled; waits for the device."""
        return int(self.layers[layer_idx].cumulative_length)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As in transformers; this is what a call of the model asks first, so room is made for its tokens here."""
        columns = self.get_seq_length(layer_idx) + query_length
        if columns > self.capacity:
            self.grow(round_capacity(columns))
        return self.capacity, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns; a positive number is an error, as in transformers."""
        if tokens_to_remove > 0:
            raise HFEError(f"crop({tokens_to_remove}) is not supported", "pass minus the number of tokens to remove")
        for layer in self.layers:
            layer.cumulative_length.add_(tokens_to_remove).clamp_(min=0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row in place."""
        self._change_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._change_rows(lambda rows: rows[indices])

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)
            layer.batch_size = layer.keys.shape[0]

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    @torch.inference_mode(False)
    @torch.no_grad()
    def grow(self, capacity: int) -> None:
        """Move to memory of `capacity` columns, with all that is stored."""
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                new[:, :, : old.shape[2]] = old
                setattr(layer, name, new)
            layer.max_cache_len = capacity


def round_capacity(columns: int) -> int:
    """The capacity given to a cache that needs `columns`: at most an eighth more, from 256 on."""
    if columns <= _LEAST_CAPACITY:
        return _LEAST_CAPACITY
    step = (1 << (columns - 1).bit_length()) // (2 * _ROUNDS_PER_DOUBLING)
    return -(-columns // step) * step


def _is_known(module: nn.Module) -> bool:
    origin = type(module).__module__
    return origin.startswith(_OWN_PACKAGE) or origin.startswith(_KNOWN_MODULES)


def step_signature(model: Any) -> tuple | None:
    """Identity of every weight and setting that a captured step reads; None when the step may not be captured."""
    signature: list[Any] = [tuple(model.config.layer_types), _settings(model.config)]
    device = None
    for module in model.modules():
        if not _is_known(module) or not is_unhooked(module) or module.training or module._compiled_call_impl:
            return None
        signature.append((type(module), _settings(module)))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            device = device or tensor.device
            # Quantised and distributed weights have types of their own, and so have fake ones.
            if type(tensor) not in (nn.Parameter, Tensor) or not _is_readable(tensor, device):
                return None
            signature.append((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()))
    return (device, *signature)


def _is_readable(tensor: Tensor, device: torch.device) -> bool:
    """True on the device, and in pinned memory, which kernels may read as well."""
    return tensor.device == device or (tensor.device.type == "cpu" and device.type == "cuda" and tensor.is_pinned())


def _settings(thing: Any) -> tuple:
    """Public numbers, texts and switches among the attributes of a module or configuration."""
    return tuple(item for item in vars(thing).items() if type(item[1]) in _SETTINGS and item[0][0] != "_")


def _addresses(cache: Cache) -> list[int]:
    """Where the memory of every layer is."""
    return [x.data_ptr() for layer in cache.layers for x in (layer.keys, layer.values, layer.cumulative_length)]


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that steps are captured on; libraries keep a workspace for each stream, so there is one a device."""
    return torch.cuda.Stream(device)


def record_graph(run: Callable[[], Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor, int]:
    """What `run` launches as a graph, the tensor that each replay fills with its result, and bytes that it holds.

    Runs it once before: that compiles kernels and makes library handles, neither of which belongs in a graph.
    """
    stream = _capture_stream(device)
    with _CAPTURING:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(device).wait_stream(stream)
        held = torch.cuda.memory_reserved(device)
        graph = torch.cuda.CUDAGraph()
        # Another thread, say one that loads data, may use the device meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = run()
    return graph, result, max(torch.cuda.memory_reserved(device) - held, 0)


class DecodeStep:
    """A step of one token a row over one cache, with the buffers that it reads and advances.

    Args:
        cache: the cache; only its memory is kept, so that a step dies with its cache.
        kinds: names of the layer kinds that the model wants masks for.
        padded: some row begins with padding, so the step looks at which columns are visible.
    """

    _graph: torch.cuda.CUDAGraph
    _logits: Tensor

    def __init__(self, cache: Cache, kinds: set[str], padded: bool) -> None:
        keys = cache.layers[0].keys
        batch, _, self.capacity, _ = keys.shape
        self.padded = padded
        self._memory = _addresses(cache)
        with torch.inference_mode(False), torch.no_grad():  # these outlive the caller's inference mode
            self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=keys.device)
            self.positions = torch.zeros_like(self.tokens)
            visible = torch.ones(batch, self.capacity, dtype=torch.bool, device=keys.device) if padded else None
            self.mask = pack_decode_mask(1, torch.zeros((), dtype=torch.int32, device=keys.device), batch, visible)
        self.masks = dict.fromkeys(kinds, self.mask)
        # Of the model when it was captured; None before.
        self.signature: tuple | None = None
        self.graph_bytes = 0

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    def fits(self, cache: Cache) -> bool:
        """True when the cache's memory is still the one that the step was made for."""
        return _addresses(cache) == self._memory

    def reset(self, length: int, positions: Tensor, columns: Tensor | None) -> None:
        """Stand behind `length` columns.

        Args:
            positions: position of each row's next token [B].
            columns: [B, length], false at padding; None when there is none.
        """
        self.positions.copy_(positions[:, None])
        self.mask[:, 0, 0, 0] = length
        self.mask[:, 0, 0, 1] = length + 1
        if self.padded:
            self.mask[:, 0, 1] = 0
            if columns is not None:
                self.mask[:, 0, 1, : columns.shape[1]] = columns.to(torch.int32) - 1

    def run(self, model: Any, cache: Cache) -> Tensor:
        """Logits [B, vocabulary] after `self.tokens`, by calling the model; and one column on."""
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
        """Record the step in a CUDA graph; the column that it writes on the way, the next step writes anew."""
        buffers = (self.positions, self.mask, *(layer.cumulative_length for layer in cache.layers))
        before = [buffer.clone() for buffer in buffers]
        try:
            recorded = record_graph(lambda: self.run(model, cache), self.tokens.device)
            self._graph, self._logits, self.graph_bytes = recorded
            self.signature = signature
        finally:  # out of memory or interrupted, the caller's cache is as it was
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    def replay(self) -> Tensor:
        """Logits [B, vocabulary] after `self.tokens`, once captured; in a buffer that the next replay overwrites."""
        self._graph.replay()
        return self._logits


class StepPool:
    """Caches that wait for the next call of `generate`, each with its captured step: few, and of bounded size."""

    def __init__(self, most: int, share_of_memory: float) -> None:
        self.most = most
        self.share_of_memory = share_of_memory
        self._idle: list[tuple[DecodeCache, DecodeStep]] = []
        self._lock = threading.Lock()

    def take(self, batch: int, capacity: int, padded: bool, signature: tuple) -> tuple[DecodeCache, DecodeStep] | None:
        """A fitting cache and step, now the caller's; None when there is none.

        Those captured from the model as it was before it changed or moved are freed.
        """
        with self._lock:
            self._idle = [entry for entry in self._idle if entry[1].signature == signature]
            for i, (_, step) in enumerate(self._idle):
                if (step.batch, step.capacity, step.padded) == (batch, capacity, padded):
                    return self._idle.pop(i)
        return None

    def put(self, cache: DecodeCache, step: DecodeStep) -> None:
        """Keep a cache and its step for later; the longest unused ones go when there are too many."""
        limit = self.share_of_memory * torch.cuda.get_device_properties(step.tokens.device).total_memory
        with self._lock:
            self._idle.append((cache, step))
            while len(self._idle) > self.most or (self._idle and self.nbytes() > limit):
                self._idle.pop(0)

    def nbytes(self) -> int:
        """Bytes that the waiting caches and graphs hold."""
        return sum(cache.nbytes() + step.graph_bytes for cache, step in self._idle)

    def report(self) -> list[dict[str, Any]]:
        """Each waiting capture: rows, columns, whether for padded prompts, bytes of its cache and of its graph."""
        return [
            {
                "batch": step.batch,
                "capacity": step.capacity,
                "padded": step.padded,
                "cache_bytes": cache.nbytes(),
                "graph_bytes": step.graph_bytes,
            }
            for cache, step in self._idle
        ]

    def clear(self) -> None:
        """Free them all."""
        self._idle.clear()


# Steps of caches that users hold, found again when a cache comes back for another turn.
RETURNED_CACHE_STEPS: WeakKeyDictionary[Cache, DecodeStep] = WeakKeyDictionary()
# Not attributes of the models, which are copied, pickled and moved; a graph is none of these.
_POOLS: WeakKeyDictionary[nn.Module, StepPool] = WeakKeyDictionary()
MOST_IDLE_STEPS = 4
IDLE_SHARE_OF_MEMORY = 0.25


def step_pool(model: Any) -> StepPool:
    """The pool of `model`."""
    if model not in _POOLS:
        _POOLS[model] = StepPool(MOST_IDLE_STEPS, IDLE_SHARE_OF_MEMORY)
    return _POOLS[model]
