"""One forward pass of all branches of all sequences over their shared cache; on CUDA replayed from a graph.

For each step the host sends one buffer (tokens, positions, slots, segments, bitmaps) and gets one back (the most likely
tokens). Query counts are rounded up to powers of two, so that few graphs are captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.logging import get_logger
from hf_efficient.modeling.decoder.cache_compat import cache_argument
from hf_efficient.modeling.decoder.configuration_decoder import length_dependent_rope
from hf_efficient.modeling.decoder.decode_interface import DECODE_ATTENTION
from hf_efficient.modeling.decoder.graph_capture import (
    SIGNATURE_CHECK_INTERVAL,
    capture_graph,
    capture_obstacle,
    step_pool,
    step_signature,
)
from hf_efficient.modeling.topology.attention.topology_cache import TopologyCache
from hf_efficient.modeling.topology.attention.topology_interface import TOPOLOGY_ATTENTION
from hf_efficient.modeling.topology.attention.topology_mask import (
    TopologyMask,
    TopologyQueries,
    additive_mask,
    dense_mask,
)
from hf_efficient.modeling.topology.generation.sampling import most_likely
from hf_efficient.modeling.topology.generation.scheduler import SequenceScheduler

# Queries of each sequence that a captured step may take; more are rare (many headers together) and run as a call.
MOST_CAPTURED_QUERIES = 64


def check_attention(model: Any) -> None:
    """Raise `HFEError` for a model that cannot generate in parallel.

    Its attention must take a topology or a dense mask, see all tokens in every layer, and rotate keys by frequencies
    that do not depend on the length; and the model must fill a cache.
    """
    config = model.config
    implementation = config._attn_implementation
    known = {TOPOLOGY_ATTENTION, "sdpa", "eager"}
    if getattr(model, "supports_topology", False):
        known.add(DECODE_ATTENTION)
    if implementation not in known:
        raise HFEError(
            f"attn_implementation={implementation!r} cannot generate in parallel",
            f"call model.set_attn_implementation({TOPOLOGY_ATTENTION!r}), or use 'sdpa' or 'eager'",
        )
    # A dense mask would silently replace the model's sliding windows.
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
    windowed = next((kind for kind in kinds if kind != "full_attention"), None)
    if windowed is not None:
        raise HFEError(
            f"{type(model).__name__} has layers of {windowed} (sliding_window={window}), and a branch must see all of "
            "the text before it",
            "use a model with full attention in every layer",
        )
    unfit = length_dependent_rope(getattr(config, "rope_parameters", None))
    if unfit is not None:
        raise HFEError(
            f"the rotary embedding {unfit!r} of {type(model).__name__} changes with the longest position so far, so "
            "keys of different branches would disagree",
            "use a model with default, linear, llama3 or yarn",
        )
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise HFEError(
            "the model is in training mode with gradient checkpointing, where it fills no cache",
            "call model.eval() before generate",
        )


def forward(
    model: Any,
    tokens: Tensor,
    positions: Tensor,
    topology: TopologyMask | TopologyQueries | None,
    cache: TopologyCache,
    logits_to_keep: int,
    padding: Tensor | None = None,
) -> Tensor:
    """Logits [B, logits_to_keep, V] of any causal language model.

    Args:
        model: a model without topology support gets the topology as a dense mask.
        tokens, positions: int64 [B, Q].
        topology: `TopologyMask` for prompts, `TopologyQueries` for tokens that follow the cache, None for plain text.
        cache: where `cache.place` has said the tokens go.
        logits_to_keep: K; the logits of the last K tokens are computed.
        padding: [B, Q], 0 at padding, for plain prompts.
    """
    mask: Any = padding
    given: dict[str, Any] = {}
    implementation = model.config._attn_implementation
    if topology is not None and (implementation == TOPOLOGY_ATTENTION or getattr(model, "supports_topology", False)):
        given["topology"] = topology
        if not getattr(model, "supports_topology", False):
            # transformers passes a mask of rank 4 through; without one the model would build a mask that is not read.
            mask = tokens.new_zeros(1, 1, 1, 1, dtype=torch.bool)
    elif topology is not None:
        kv_length = cache.next_slots.kv_length if isinstance(topology, TopologyQueries) else None
        eager = implementation == "eager"
        mask = additive_mask(topology, model.dtype, kv_length) if eager else dense_mask(topology, kv_length)
    return model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=mask,
        use_cache=True,
        logits_to_keep=logits_to_keep,
        return_dict=True,
        **cache_argument(cache),
        **given,
    ).logits


class RowQueries(NamedTuple):
    """The tokens of one sequence that a step computes: Q or fewer of them, those whose logits are wanted last.

    Attributes:
        tokens: token ids; below zero a placeholder, see `TopologyStep.placeholder_token`.
        positions: rotary position of each token.
        slots: cache slot of each token, counted from the sequence's first token.
        segments: segment of each token.
        end: tokens that the sequence has with these.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    segments: Sequence[int]
    end: int


class _HostBuffers:
    """Host memory of one step in flight; a step has two, so that the host fills or reads one while the other is used.

    Args:
        sizes: int64 elements of each section, see `_sections`.
        batch, queries, words: B, Q and W of the step.
        pinned: the device is a CUDA device, and copies run asynchronously.
    """

    def __init__(self, sizes: list[int], batch: int, queries: int, words: int, pinned: bool) -> None:
        with torch.inference_mode(False):
            self.host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=pinned)
            self._result = torch.zeros(2, batch, queries, dtype=torch.int64, pin_memory=pinned)
        self.views = _sections(self.host.numpy(), sizes, batch, queries, words)
        self._sent, self._arrived = (torch.cuda.Event(), torch.cuda.Event()) if pinned else (None, None)

    def wait_until_sent(self) -> None:
        """Wait until the device has the buffer's content, after which it may be filled again."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, device_buffer: Tensor) -> None:
        """Start to copy the buffer to the device."""
        device_buffer.copy_(self.host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def fetch_async(self, result: Tensor) -> None:
        """Start to copy a step's result, int64 [1 or 2, B, Q], to the host."""
        self._result[: result.shape[0]].copy_(result, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> np.ndarray:
        """The result that was fetched, int64 [2, B, Q]; waits for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._result.numpy()


class TopologyStep:
    """Buffers of a step of B sequences with Q queries each, and its graph once it is captured.

    Args:
        batch, queries: B and Q.
        words: W, words of 64 segments in each query's bitmap.
        with_logprobs: the result includes log-probabilities of the most likely tokens.
        chosen: int64 [B Q] or longer; each step leaves its most likely tokens here, for the placeholders of the next.
        suppressed: ids that are never chosen, int64 [n] on the device; or None.

    Attributes:
        logits: [B, Q, V] of the last run; the active branches of a sequence have the last ones of its queries.
        signature: `step_signature` of the model at capture; None before.
    """

    logits: Tensor
    # Of the graph, once it is captured.
    _graph: torch.cuda.CUDAGraph
    _result: Tensor
    _recorded_logits: Tensor

    def __init__(
        self, batch: int, queries: int, words: int, with_logprobs: bool, chosen: Tensor, suppressed: Tensor | None
    ) -> None:
        self.batch, self.queries, self.words, self.with_logprobs = batch, queries, words, with_logprobs
        self._chosen, self._suppressed = chosen, suppressed
        count = batch * queries
        sizes = [count, count, count * words, -(-(2 * count + batch) // 2)]
        self._buffers = [_HostBuffers(sizes, batch, queries, words, chosen.is_cuda) for _ in range(2)]
        with torch.inference_mode(False):
            self._device = torch.zeros(sum(sizes), dtype=torch.int64, device=chosen.device)
        self.tokens, self.positions, self.segment_visibility, self.slots, self.segments, self.kv_len = _sections(
            self._device, sizes, batch, queries, words
        )
        self._kv_length = 0  # longest sequence, left padding included, once the step has run
        self.signature: tuple | None = None
        self.graph_bytes = 0

    def load(self, rows: Sequence[SequenceScheduler], offsets: Sequence[int]) -> None:
        """Send the tokens of each sequence that no step has computed; those whose logits are wanted come last.

        Args:
            rows: the sequences; their tokens count as computed from here on.
            offsets: cache slot of each sequence's first token, which is the length of its left padding.
        """
        queries = []
        for row in rows:
            end = len(row.tokens)
            order: Sequence[int] = [branch.last_slot for branch in row.active_branches]
            if end - row.num_computed_tokens != len(order):
                last = set(order)
                order = [*(slot for slot in range(row.num_computed_tokens, end) if slot not in last), *order]
            row.num_computed_tokens = end
            queries.append(
                RowQueries(
                    [row.tokens[slot] for slot in order],
                    [row.positions[slot] for slot in order],
                    order,
                    [row.segments[slot] for slot in order],
                    end,
                )
            )
        self.send(rows, offsets, queries)

    def send(self, rows: Sequence[SequenceScheduler], offsets: Sequence[int], queries: Sequence[RowQueries]) -> None:
        """Send each sequence's queries to the device.

        Args:
            rows: the sequences, for the bitmaps of their segments.
            offsets: cache slot of each sequence's first token.
            queries: at most Q tokens of each sequence.
        """
        self._buffers.reverse()
        buffers = self._buffers[0]
        buffers.wait_until_sent()
        places: list[int] = []
        fields: tuple[list[int], ...] = ([], [], [], [])  # as long as `places`, so that numpy is called once for each
        bitmaps: list[bytes] = []
        tokens, positions, segment_visibility, slots, segments, kv_len = buffers.views
        for b, (row, offset, of_row) in enumerate(zip(rows, offsets, queries, strict=True)):
            kv_len[b] = offset + of_row.end
            if of_row.tokens:
                places += range((b + 1) * self.queries - len(of_row.tokens), (b + 1) * self.queries)
                fields[0].extend(of_row.tokens)
                fields[1].extend(of_row.positions)
                fields[2].extend([slot + offset for slot in of_row.slots])
                fields[3].extend(of_row.segments)
                bitmaps.append(row.bitmaps(of_row.segments, self.words))
        slots.fill(-1)
        for view, values in zip((tokens, positions, slots, segments), fields, strict=True):
            view.reshape(-1)[places] = values
        segment_visibility.reshape(-1, self.words)[places] = np.frombuffer(b"".join(bitmaps), dtype="<i8").reshape(
            -1, self.words
        )
        self._kv_length = int(kv_len.max())
        buffers.send(self._device)

    def placeholder_token(self, row: int, place: int) -> int:
        """Placeholder, in the next step's tokens, for the token that this step chooses at one of a row's queries."""
        return -1 - (row * self.queries + place)

    def run(self, model: Any, cache: TopologyCache) -> Tensor:
        """Compute the step by calling the model.

        Returns:
            Most likely tokens, int64 [1, B, Q]; with log-probabilities [2, B, Q], these as the bits of float64.
        """
        slots = torch.where(self.slots < 0, cache.capacity, self.slots).long()
        cache.segments.scatter_(1, slots, self.segments)
        cache.place(slots, None if model.config._attn_implementation == TOPOLOGY_ATTENTION else self._kv_length)
        queries = TopologyQueries(self.slots, self.kv_len, cache.segments[:, :-1], self.segment_visibility)
        tokens = torch.where(self.tokens < 0, self._chosen[(-1 - self.tokens).clamp(min=0)], self.tokens)
        self.logits = forward(model, tokens, self.positions, queries, cache, self.queries)
        if self._suppressed is not None:
            self.logits.index_fill_(-1, self._suppressed, float("-inf"))
        if self.with_logprobs:
            choice = most_likely(self.logits)
            result = torch.stack((choice.tokens, choice.logprobs.double().view(torch.int64)))
        else:
            result = self.logits.argmax(dim=-1)[None]
        self._chosen[: result[0].numel()] = result[0].reshape(-1)[: len(self._chosen)]
        return result

    def execute(self, model: Any, cache: TopologyCache, signature: tuple | None) -> Tensor:
        """Compute the step, from its graph when the model has a signature, else by a call; result as of `run`."""
        if signature is None:
            return self.run(model, cache)
        if self.signature != signature:
            # The placeholders of this step refer to what the last one chose, which the warm-up must not replace.
            self._graph, self._result, self.graph_bytes = capture_graph(
                lambda: self.run(model, cache), self.tokens.device, (self._chosen, *cache.state_tensors())
            )
            self._recorded_logits = self.logits
            self.signature = signature
        self._graph.replay()
        self.logits = self._recorded_logits
        return self._result

    def fetch_async(self, result: Tensor) -> Callable[[], tuple[np.ndarray, np.ndarray | None]]:
        """Start to copy a result to the host; a function that waits for it.

        The function returns the most likely tokens [B, Q] and their log-probabilities, or None without them.
        """
        buffers = self._buffers[0]
        buffers.fetch_async(result)

        def read() -> tuple[np.ndarray, np.ndarray | None]:
            found = buffers.read()
            return found[0], found[1].view(np.float64) if self.with_logprobs else None

        return read


def _sections(buffer: Any, sizes: list[int], batch: int, queries: int, words: int) -> tuple[Any, ...]:
    """Views of a step's int64 buffer.

    Returns:
        Tokens and positions, int64 [B, Q]; bitmaps, int64 [B, Q, W]; slots and segments, int32 [B, Q]; key-value
        lengths, int32 [B].
    """
    ends = np.cumsum(sizes).tolist()
    count = batch * queries
    small = buffer[ends[2] :].view(np.int32 if isinstance(buffer, np.ndarray) else torch.int32)
    return (
        buffer[: ends[0]].reshape(batch, queries),
        buffer[ends[0] : ends[1]].reshape(batch, queries),
        buffer[ends[1] : ends[2]].reshape(batch, queries, words),
        small[:count].reshape(batch, queries),
        small[count : 2 * count].reshape(batch, queries),
        small[2 * count : 2 * count + batch],
    )


class TopologySession:
    """A cache and the steps over it, which one call of parallel generation leaves to the next one of the same size.

    Args:
        model: the causal language model; the session keeps no reference to it.
        batch: number of sequences.
        capacity: slots that are needed at first.
        signature: `step_signature` of the model; None when its steps are to be called.
    """

    def __init__(self, model: Any, batch: int, capacity: int, signature: tuple | None = None) -> None:
        self.batch = batch
        self.device = execution_device(model)
        self.cache = TopologyCache(model.config.num_hidden_layers, batch, capacity, self.device)
        self.may_capture = can_capture_steps(model)
        self.signature = signature
        self._steps: dict[tuple[int, int, bool], TopologyStep] = {}
        self._steps_until_check = SIGNATURE_CHECK_INTERVAL
        with torch.inference_mode(False):
            self._chosen = torch.zeros(batch * MOST_CAPTURED_QUERIES, dtype=torch.int64, device=self.device)
        self._suppressed: tuple[int, ...] = ()
        self._suppressed_ids: Tensor | None = None

    def can_speculate(self) -> bool:
        """True where a step may be dispatched before the host has the tokens of the last one."""
        return self.may_capture and self.signature is not None

    def step_for(self, slots: int, queries: int, segments: int, with_logprobs: bool) -> TopologyStep:
        """The step that takes `queries` tokens of each sequence; the cache grows to `slots` slots where needed.

        Args:
            slots: key-value length of the longest sequence with this step's tokens.
            queries: tokens of the sequence that has most.
            segments: segments of the sequence that has most.
            with_logprobs: as for `TopologyStep`.
        """
        if slots > self.cache.capacity:
            self._steps.clear()  # their graphs write to the old memory
            self.cache.grow(slots)
        key = _round_up(queries), _round_up(-(-segments // 64)), with_logprobs
        if key[0] > MOST_CAPTURED_QUERIES:
            return TopologyStep(self.batch, *key, self._chosen, self._suppressed_ids)
        if key not in self._steps:
            self._steps[key] = TopologyStep(self.batch, *key, self._chosen, self._suppressed_ids)
        return self._steps[key]

    def execute(self, step: TopologyStep, model: Any) -> Tensor:
        """Compute a loaded step; result as of `TopologyStep.run`. Falls back to calls where a graph has no memory."""
        if not self.may_capture or step.queries > MOST_CAPTURED_QUERIES:
            return step.run(model, self.cache)
        try:
            result = step.execute(model, self.cache, self.signature)
        except torch.OutOfMemoryError:
            get_logger().info("parallel generation calls its steps: a graph of them does not fit into memory")
            self.may_capture = False
            self._steps.clear()
            return step.run(model, self.cache)
        self._steps_until_check -= 1
        if self._steps_until_check == 0:  # a callback may have changed the model; the device is busy meanwhile
            self.signature = step_signature(model)
            self._steps_until_check = SIGNATURE_CHECK_INTERVAL
        return result

    def reset(self, suppressed: tuple[int, ...]) -> None:
        """Empty the cache for another prompt, with steps that never choose the ids `suppressed`."""
        if suppressed != self._suppressed:
            self._steps.clear()  # the ids are part of their graphs
            self._suppressed = suppressed
            with torch.inference_mode(False):
                self._suppressed_ids = torch.tensor(suppressed, device=self.device) if suppressed else None
        self.cache.reset()
        self._steps_until_check = SIGNATURE_CHECK_INTERVAL

    def fits(self, batch: int, capacity: int) -> bool:
        """True when another call may use this memory."""
        return self.batch == batch and capacity <= self.cache.capacity

    def nbytes(self) -> int:
        """Bytes of the cache and of the graphs."""
        return self.cache.nbytes() + sum(step.graph_bytes for step in self._steps.values())

    def report(self) -> list[dict[str, int]]:
        """Batch size, queries, words and bytes of each captured step."""
        return [
            {"batch": self.batch, "queries": step.queries, "words": step.words, "graph_bytes": step.graph_bytes}
            for step in self._steps.values()
            if step.signature is not None
        ]


def execution_device(model: Any) -> torch.device:
    """The device on which the model computes; under accelerate's offloading its weights are elsewhere."""
    if model.device.type != "meta":
        return model.device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    each = (hook for several in hooks for hook in getattr(several, "hooks", (several,)))
    devices = (getattr(hook, "execution_device", None) for hook in each)
    return torch.device(next((device for device in devices if device is not None), "meta"))


def can_capture_steps(model: Any) -> bool:
    """True when steps of this model are captured: on CUDA, for models of this package with ``hfe_topology``."""
    attention = (TOPOLOGY_ATTENTION,) if getattr(model, "supports_topology", False) else ()
    return model.device.type == "cuda" and not capture_obstacle(model, attention)


def _round_up(count: int) -> int:
    """The next power of two; the number itself above `MOST_CAPTURED_QUERIES`."""
    return count if count > MOST_CAPTURED_QUERIES else 1 << max(count - 1, 0).bit_length()


def acquire_session(model: Any, batch: int, capacity: int, suppressed: tuple[int, ...] = ()) -> TopologySession:
    """A session for one call: one that an earlier call left, if it fits, or a new one.

    Args:
        model: the causal language model.
        batch: number of sequences.
        capacity: slots that are needed at first.
        suppressed: ids that are never chosen.
    """
    pool = step_pool(model)
    signature = step_signature(model) if can_capture_steps(model) else None
    session = None
    if signature is not None:
        session = pool.take(TopologySession, signature, lambda idle: idle.fits(batch, capacity))
    if session is None:
        pool.clear(TopologySession)  # one such cache per model is enough
        session = TopologySession(model, batch, capacity, signature)
    session.reset(suppressed)
    return session


def release_session(model: Any, session: TopologySession) -> None:
    """Give a session to the pool for the next call, unless it has captured nothing."""
    if session.report():
        step_pool(model).put(session)
