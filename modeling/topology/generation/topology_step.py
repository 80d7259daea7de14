"""One step of parallel generation: a forward pass of the new tokens of all branches; on CUDA replayed from a graph.

A branch is a part of a sequence that is decoded in parallel with others. All branches of a sequence share its key-value
cache; the segment of each cache slot (a run of consecutive tokens between forks and joins) determines which queries may
attend to it. For each step the host sends one buffer (tokens, positions, slots, segments, bitmaps) to the device and
receives one (the most likely tokens). Query counts are rounded up to powers of two, so that few graphs are captured.

B is the number of sequences, Q that of queries (new tokens) of each sequence, V the vocabulary size, and W the number
of 64-bit words in a bitmap of segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.modeling.decoder.cache_compat import cache_argument
from hf_efficient.modeling.decoder.configuration_decoder import length_dependent_rope
from hf_efficient.modeling.decoder.decode_interface import DECODE_ATTENTION
from hf_efficient.modeling.decoder.graph_capture import capture_graph
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


def check_attention(model: Any) -> None:
    """Raise `HFEError` if the model cannot generate in parallel.

    Required are: an attention implementation that accepts a topology or a dense mask; full attention in every layer;
    rotary frequencies that do not depend on the sequence length; and no gradient checkpointing in training mode, in
    which transformers fills no cache.
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
            f"{type(model).__name__} has layers of {windowed} (sliding_window={window}), but a branch must attend to "
            "all of the text before it",
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
    """Run any causal language model; return the logits [B, logits_to_keep, V] of the last tokens.

    The tokens' keys and values are written to the slots of the cache that the last `cache.place` has set. The caller
    has written the tokens' segments to `cache.segments`, and `check_attention` has accepted the model.

    Args:
        model: the model. With ``hfe_topology`` or topology support it receives `topology` itself, otherwise a dense
            mask made of it.
        tokens, positions: token ids and rotary positions, int64 [B, Q].
        topology: a `TopologyMask` for prompts with blocks; `TopologyQueries` for tokens that follow a filled cache;
            None for plain prompts, which have causal attention.
        cache: the shared cache.
        logits_to_keep: number of tokens, from the end, whose logits are computed.
        padding: int64 [B, Q], 0 at padding, for plain prompts; None without padding.
    """
    mask: Any = padding
    given: dict[str, Any] = {}
    implementation = model.config._attn_implementation
    if topology is not None and (implementation == TOPOLOGY_ATTENTION or getattr(model, "supports_topology", False)):
        given["topology"] = topology
        if not getattr(model, "supports_topology", False):
            # transformers passes a 4-D mask through unchanged; without one it would build a mask that is not used.
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
    """The n ≤ Q tokens of one sequence that a step computes; last come those that the active branches continue from.

    Attributes:
        tokens: n token ids; a negative one is a placeholder, see `TopologyStep.placeholder_token`.
        positions: rotary position of each token.
        slots: cache slot of each token, counted from the sequence's first token, without left padding.
        segments: segment of each token.
        end: total number of tokens of the sequence, including these.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    segments: Sequence[int]
    end: int


class _HostBuffers:
    """Host memory for the inputs and the result of one step in flight.

    A step has two, so that the host can fill or read one while the device uses the other.

    Args:
        sizes: number of int64 elements of each section of the input buffer, see `_sections`.
        batch, queries, words: B, Q and W of the step.
        pinned: allocate pinned memory and copy asynchronously; True for a CUDA device.

    Attributes:
        host: the input buffer, int64.
        views: numpy views of its sections, in the order of `_sections`.
    """

    def __init__(self, sizes: list[int], batch: int, queries: int, words: int, pinned: bool) -> None:
        with torch.inference_mode(False):
            self.host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=pinned)
            self._result = torch.zeros(2, batch, queries, dtype=torch.int64, pin_memory=pinned)
        self.views = _sections(self.host.numpy(), sizes, batch, queries, words)
        self._sent, self._arrived = (torch.cuda.Event(), torch.cuda.Event()) if pinned else (None, None)

    def wait_until_sent(self) -> None:
        """Wait until the last copy to the device has finished, after which the buffer may be filled again."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, device_buffer: Tensor) -> None:
        """Start to copy the input buffer to `device_buffer`, an int64 tensor of the same size."""
        device_buffer.copy_(self.host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def fetch_async(self, result: Tensor) -> None:
        """Start to copy a step's result, int64 [1 or 2, B, Q], to the host."""
        self._result[: result.shape[0]].copy_(result, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> np.ndarray:
        """Wait for the copy of `fetch_async` and return the result, int64 [2, B, Q].

        The array is a view of the host memory, which the next `fetch_async` overwrites. Entry 1 is unused if the result
        was [1, B, Q].
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._result.numpy()


class TopologyStep:
    """Buffers of a step of B sequences with Q queries each, and its CUDA graph once it is captured.

    A sequence with n < Q tokens uses its last n queries; the others are padding.

    Args:
        batch, queries: B and Q.
        words: W, the number of 64-bit words in each query's bitmap of segments.
        with_logprobs: the result includes the log-probabilities of the most likely tokens.
        chosen: int64 [n] on the device, shared by all steps. Each step writes its B * Q most likely tokens here (the
            first n of them, if there are more), from which the next step fills its placeholders.
        suppressed: token ids that are never chosen, int64 [n] on the device; or None.

    Attributes:
        tokens, positions: int64 [B, Q] on the device, token ids and rotary positions.
        segment_visibility: int64 [B, Q, W], bitmap of the segments that each query may attend to.
        slots: int32 [B, Q], cache slot of each query, left padding included; -1 for a padding query.
        segments: int32 [B, Q], segment of each query.
        kv_len: int32 [B], cache slots that each sequence fills after the step.
        logits: [B, Q, V] of the last run, -inf at suppressed ids; the active branches of a sequence have its last
            queries. The next replay of the graph overwrites them.
        signature: `step_signature` of the model when the graph was captured; None before.
        graph_bytes: bytes of device memory that the graph holds.
    """

    logits: Tensor
    # Of the graph, once it is captured.
    _graph: torch.cuda.CUDAGraph
    _result: Tensor
    _captured_logits: Tensor

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
        """Send all tokens of each sequence that are not yet computed to the device.

        The newest tokens of the active branches, whose logits give the next tokens, come last in each row. Sets
        `num_computed_tokens` of each sequence to the number of its tokens. Otherwise as `send`.

        Args:
            rows: the B sequences, each with at most Q tokens that are not computed.
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
        """Fill a host buffer with each sequence's queries and start its copy to the device.

        The two host buffers take turns. It waits for the copy of the last `send` but one, which used the same buffer.
        `tokens`, `positions` and the other inputs on the device are overwritten in the order of the device's work.

        Args:
            rows: the B sequences, which give the bitmaps of the segments.
            offsets: cache slot of each sequence's first token.
            queries: 0 to Q tokens of each sequence (this is not checked), at least one in total.

        Raises:
            OverflowError: the bitmap of a segment does not fit in W words.
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
        """Return a negative id that stands, in the next step, for the token that this step chooses at a query.

        The device replaces it by the chosen token, which the host need not know. The next step is the one that is
        computed after this one, with the same `chosen`; its length n must be at least B * Q.

        Args:
            row: batch row of the query.
            place: index of the query in its row, 0 to Q - 1.
        """
        return -1 - (row * self.queries + place)

    def run(self, model: Any, cache: TopologyCache) -> Tensor:
        """Compute the step by calling the model, on the inputs in the device buffer.

        Writes the tokens' keys, values and segments to the cache, sets `logits` (-inf at suppressed ids) and overwrites
        `chosen`. The inputs are those of the last `load` or `send`. It does not synchronise with the device.

        Args:
            model: a model that `check_attention` accepts.
            cache: the cache of the B sequences, with a capacity of at least the largest entry of `kv_len`.

        Returns:
            Most likely tokens, int64 [1, B, Q] on the device; with log-probabilities int64 [2, B, Q], where the second
            entry holds the bits of their float64 values. Entries of padding queries have no meaning.
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
        """Compute the step on the inputs in the device buffer by replaying its CUDA graph; has the effects of `run`.

        The graph is captured first if there is none or if the signature has changed.

        Args:
            model: the causal language model.
            cache: the cache of the B sequences. Replays need the cache of the capture, not reallocated since: the graph
                contains the addresses of its memory, but only `signature` is compared. For another cache, make a new
                step.
            signature: present `step_signature` of the model, which identifies all weights and settings that the graph
                reads; with None the step is computed by `run`.

        Returns:
            The result of `run`. With a signature it is a buffer of the graph, which the next replay overwrites, as it
            does `logits`.

        Raises:
            torch.OutOfMemoryError: the device has too little memory for the graph or for the model's intermediate
                values.
        """
        if signature is None:
            return self.run(model, cache)
        if self.signature != signature:
            # The warm-up run before the capture overwrites `_chosen`, which this step's placeholders refer to, so
            # capture_graph restores it.
            self._graph, self._result, self.graph_bytes = capture_graph(
                lambda: self.run(model, cache), self.tokens.device, (self._chosen, *cache.state_tensors())
            )
            self._captured_logits = self.logits
            self.signature = signature
        self._graph.replay()
        self.logits = self._captured_logits
        return self._result

    def fetch_async(self, result: Tensor) -> Callable[[], tuple[np.ndarray, np.ndarray | None]]:
        """Start to copy a result of `run` to the host; return a function that waits for the copy.

        That function returns the most likely tokens, int64 [B, Q], and their log-probabilities, float64 [B, Q], or None
        if the step does not compute them. Its arrays are views of a host buffer, which is used again after two more
        calls of `send`. Call it once after each `send`.
        """
        buffers = self._buffers[0]
        buffers.fetch_async(result)

        def read() -> tuple[np.ndarray, np.ndarray | None]:
            tokens, logprob_bits = buffers.read()
            return tokens, logprob_bits.view(np.float64) if self.with_logprobs else None

        return read


def _sections(buffer: Any, sizes: list[int], batch: int, queries: int, words: int) -> tuple[Any, ...]:
    """Return views of the sections of a step's int64 buffer, a tensor or a numpy array.

    Args:
        buffer: int64, one-dimensional.
        sizes: number of int64 elements of the token, position, bitmap and int32 sections.
        batch, queries, words: B, Q and W.

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
