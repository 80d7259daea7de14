"""One forward pass of all branches of all rows over their shared cache; on CUDA replayed from a graph.

The host sends one buffer a step (tokens, positions, columns, segments, bitmaps) and gets one back (the most likely
tokens). Numbers of queries are rounded up to a few sizes, so that few graphs are captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from hf_efficient.environment import check_data
from hf_efficient.errors import HFEError
from hf_efficient.kernels.decode_attention.api import MAX_HEAD_DIM
from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.logging import get_logger
from hf_efficient.modeling.decoder.cache_compat import cache_argument
from hf_efficient.modeling.decoder.configuration_decoder import length_dependent_rope
from hf_efficient.modeling.decoder.decode_interface import DECODE_ATTENTION
from hf_efficient.modeling.decoder.decode_step import IDLE_SHARE_OF_MEMORY, record_graph, step_signature
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

# Queries of each row that a captured step may take; more are rare (many headers at once) and run as a call.
MOST_CAPTURED_QUERIES = 64
# Steps between two looks at whether a callback has changed the model.
SIGNATURE_CHECK_INTERVAL = 8


def check_attention(model: Any) -> None:
    """Raise `HFEError` for a model whose attention takes neither a topology nor a mask of every pair, or needs more."""
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
    # A mask of every pair would take the place of the model's own windows without a word.
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
    """Logits [B, logits_to_keep, V] of any model; one that knows no topology gets it as a mask of every pair."""
    mask: Any = padding
    given: dict[str, Any] = {}
    implementation = model.config._attn_implementation
    if topology is not None and (implementation == TOPOLOGY_ATTENTION or getattr(model, "supports_topology", False)):
        given["topology"] = topology
        if not getattr(model, "supports_topology", False):
            # A mask of rank 4 is handed through; without one the model would make its own in vain.
            mask = tokens.new_zeros(1, 1, 1, 1, dtype=torch.bool)
    elif topology is not None:
        columns = cache.next_slots.width if isinstance(topology, TopologyQueries) else None
        eager = implementation == "eager"
        mask = additive_mask(topology, model.dtype, columns) if eager else dense_mask(topology, columns)
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
    """What a row wants computed: tokens, their positions, columns and segments; and how many columns it then has."""

    tokens: Sequence[int]
    positions: Sequence[int]
    columns: Sequence[int]
    segments: Sequence[int]
    end: int


class _Transfer:
    """One of a step's two ways to the device and back: while one is under way, the host fills or reads the other."""

    def __init__(self, sizes: list[int], batch: int, queries: int, words: int, pinned: bool) -> None:
        with torch.inference_mode(False):
            self.host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=pinned)
            self._answer = torch.zeros(2, batch, queries, dtype=torch.int64, pin_memory=pinned)
        self.views = _sections(self.host.numpy(), sizes, batch, queries, words)
        self._sent, self._arrived = (torch.cuda.Event(), torch.cuda.Event()) if pinned else (None, None)

    def clear(self) -> None:
        """Let the buffer be filled anew, once the device has what was in it."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, device_buffer: Tensor) -> None:
        """Copy the buffer to the device."""
        device_buffer.copy_(self.host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def ask(self, result: Tensor) -> None:
        """Begin to fetch what a step gave."""
        self._answer[: result.shape[0]].copy_(result, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> np.ndarray:
        """What was asked for; waits for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._answer.numpy()


class TopologyStep:
    """Buffers of a step of B rows with Q queries each, and its graph once it is captured.

    Args:
        batch, queries: B and Q.
        words: of 64 segments in each query's bitmap.
        with_logprobs: log-probabilities of the most likely tokens are wanted too.
        chosen: [B Q] at least, int64: each step leaves its most likely tokens here, and a step may begin with them.
        suppressed: ids that are never the most likely, [n] on the device; or None.

    Attributes:
        logits: [B, Q, V] of the last run; a row's live branches have the last ones of its queries.
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
        self._transfers = [_Transfer(sizes, batch, queries, words, chosen.is_cuda) for _ in range(2)]
        with torch.inference_mode(False):
            self._device = torch.zeros(sum(sizes), dtype=torch.int64, device=chosen.device)
        self.tokens, self.positions, self.segment_visibility, self.columns, self.segments, self.kv_len = _sections(
            self._device, sizes, batch, queries, words
        )
        self._width = 0  # columns that are filled once the step has run
        self.signature: tuple | None = None
        self.graph_bytes = 0

    def load(self, rows: Sequence[SequenceScheduler], offsets: Sequence[int]) -> None:
        """Send the columns of each row that no pass has computed; those whose logits are wanted come last.

        Args:
            offsets: column of the cache that each row's first token has: what is before it is padding.
        """
        queries = []
        for row in rows:
            end = len(row.tokens)
            order: Sequence[int] = [branch.last_slot for branch in row.active_branches]
            if end - row.num_computed_tokens != len(order):
                last = set(order)
                order = [*(column for column in range(row.num_computed_tokens, end) if column not in last), *order]
            row.num_computed_tokens = end
            queries.append(
                RowQueries(
                    [row.tokens[column] for column in order],
                    [row.positions[column] for column in order],
                    order,
                    [row.segments[column] for column in order],
                    end,
                )
            )
        self.send(rows, offsets, queries)

    def send(self, rows: Sequence[SequenceScheduler], offsets: Sequence[int], queries: Sequence[RowQueries]) -> None:
        """Send each row's queries.

        A token below zero is one that the step before has chosen: see `placeholder_token`."""
        self._transfers.reverse()
        transfer = self._transfers[0]
        transfer.clear()
        places: list[int] = []
        fields: tuple[list[int], ...] = ([], [], [], [])  # as long as `places`, so that numpy is called once for each
        maps: list[bytes] = []
        tokens, positions, segment_visibility, columns, segments, kv_len = transfer.views
        for b, (row, offset, of) in enumerate(zip(rows, offsets, queries, strict=True)):
            kv_len[b] = offset + of.end
            if of.tokens:
                places += range((b + 1) * self.queries - len(of.tokens), (b + 1) * self.queries)
                fields[0].extend(of.tokens)
                fields[1].extend(of.positions)
                fields[2].extend([column + offset for column in of.columns])
                fields[3].extend(of.segments)
                maps.append(row.bitmaps(of.segments, self.words))
        columns.fill(-1)
        for view, values in zip((tokens, positions, columns, segments), fields, strict=True):
            view.reshape(-1)[places] = values
        segment_visibility.reshape(-1, self.words)[places] = np.frombuffer(b"".join(maps), dtype="<i8").reshape(
            -1, self.words
        )
        self._width = int(kv_len.max())
        transfer.send(self._device)

    def placeholder_token(self, row: int, place: int) -> int:
        """What stands, in the next step's tokens, for the one that this step chooses at a place of a row's queries."""
        return -1 - (row * self.queries + place)

    def run(self, model: Any, cache: TopologyCache) -> Tensor:
        """Compute the step by calling the model: most likely tokens, and log-probabilities as bits [2, B, Q]."""
        slots = torch.where(self.columns < 0, cache.capacity, self.columns).long()
        cache.segments.scatter_(1, slots, self.segments)
        width = None if model.config._attn_implementation == TOPOLOGY_ATTENTION else self._width
        cache.place(slots, width)
        queries = TopologyQueries(self.columns, self.kv_len, cache.segments[:, :-1], self.segment_visibility)
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
        """Compute the step, from its graph where the model has this signature; None: by a call."""
        if signature is None:
            return self.run(model, cache)
        if self.signature != signature:
            chosen = self._chosen.clone()  # recording runs the step, which then has tokens of its own there
            try:
                self._graph, self._result, self.graph_bytes = record_graph(
                    lambda: self.run(model, cache), self.tokens.device
                )
            finally:  # out of memory, the step is called instead and begins with the same tokens
                self._chosen.copy_(chosen)
            self._recorded_logits = self.logits
            self.signature = signature
        self._graph.replay()
        self.logits = self._recorded_logits
        return self._result

    def fetch_async(self, result: Tensor) -> Callable[[], tuple[np.ndarray, np.ndarray | None]]:
        """Begin to fetch a result; a function that waits for it.

        It gives the most likely tokens [B, Q], and their log-probabilities where they are wanted.
        """
        transfer = self._transfers[0]
        transfer.ask(result)

        def read() -> tuple[np.ndarray, np.ndarray | None]:
            found = transfer.read()
            return found[0], found[1].view(np.float64) if self.with_logprobs else None

        return read


def _sections(buffer: Any, sizes: list[int], batch: int, queries: int, words: int) -> tuple[Any, ...]:
    """The parts of a step's buffer: tokens, positions, bitmaps; and, of 32 bits, columns, segments, filled columns."""
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
    """A cache and the steps over it: what one call of parallel generation leaves to the next one of the same size.

    Args:
        model: only looked at, not kept.
        batch: rows.
        capacity: columns that are needed at first.
    """

    def __init__(self, model: Any, batch: int, capacity: int) -> None:
        self.batch = batch
        self.device = execution_device(model)
        self.cache = TopologyCache(model.config.num_hidden_layers, batch, capacity, self.device)
        self.may_capture = capture_obstacle(model) == ""
        self.signature: tuple | None = None
        self._looked = False
        self._steps: dict[tuple[int, int, bool], TopologyStep] = {}
        self._until_look = 0
        with torch.inference_mode(False):
            self._chosen = torch.zeros(batch * MOST_CAPTURED_QUERIES, dtype=torch.int64, device=self.device)
        self._suppressed: tuple[int, ...] = ()
        self._suppressed_ids: Tensor | None = None

    def can_speculate(self) -> bool:
        """True where a step may be computed before the host knows the tokens of the last: where the device computes
        while the host goes on."""
        return self.may_capture and self.signature is not None

    def step_for(self, columns: int, queries: int, segments: int, with_logprobs: bool) -> TopologyStep:
        """The step that takes so many queries of each row; the cache has room for so many columns.

        Args:
            segments: of the row that has most.
        """
        if columns > self.cache.capacity:
            self._steps.clear()  # their graphs write to the old memory
            self.cache.grow(columns)
        key = _round_up(queries), _round_up(-(-segments // 64)), with_logprobs
        if key[0] > MOST_CAPTURED_QUERIES:
            return TopologyStep(self.batch, *key, self._chosen, self._suppressed_ids)
        if key not in self._steps:
            self._steps[key] = TopologyStep(self.batch, *key, self._chosen, self._suppressed_ids)
        return self._steps[key]

    def execute(self, step: TopologyStep, model: Any) -> Tensor:
        """Compute a loaded step: what `TopologyStep.run` gives."""
        if not self.may_capture or step.queries > MOST_CAPTURED_QUERIES:
            return step.run(model, self.cache)
        if not self._looked:
            self._look(model)
        try:
            result = step.execute(model, self.cache, self.signature)
            self._until_look -= 1
            if self._until_look == 0:  # a callback may have changed the model; the device is busy now
                self._look(model)
            return result
        except torch.OutOfMemoryError:
            get_logger().info("parallel generation calls its steps: a graph of them does not fit into memory")
            self.may_capture = False
            self._steps.clear()
            return step.run(model, self.cache)

    def _look(self, model: Any) -> None:
        """See whether steps of the model may be replayed, and which."""
        self.signature = step_signature(model)
        self._looked, self._until_look = True, SIGNATURE_CHECK_INTERVAL

    def begin(self, suppressed: tuple[int, ...]) -> None:
        """Stand ready for a prompt, and for steps that never choose these ids."""
        if suppressed != self._suppressed:
            self._steps.clear()  # their graphs leave out others
            self._suppressed = suppressed
            with torch.inference_mode(False):
                self._suppressed_ids = torch.tensor(suppressed, device=self.device) if suppressed else None
        self.cache.reset()
        self._looked = False

    def fits(self, batch: int, capacity: int, model: Any) -> bool:
        """True when another call may go on with this memory."""
        dtype = self.cache.layers[0].dtype if self.cache.layers[0].is_initialized else model.dtype
        return (
            (self.batch, self.device, dtype) == (batch, execution_device(model), model.dtype)
            and capacity <= self.cache.capacity
            and self.may_capture == (capture_obstacle(model) == "")
        )

    def nbytes(self) -> int:
        """Bytes of the cache and of the graphs."""
        return self.cache.nbytes() + sum(step.graph_bytes for step in self._steps.values())

    def report(self) -> list[dict[str, int]]:
        """RowQueries, words and bytes of each captured step."""
        return [
            {"batch": self.batch, "queries": step.queries, "words": step.words, "graph_bytes": step.graph_bytes}
            for step in self._steps.values()
            if step.signature is not None
        ]


def execution_device(model: Any) -> torch.device:
    """Where the model computes: its weights are elsewhere where accelerate's offloading keeps them."""
    if model.device.type != "meta":
        return model.device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    each = (hook for several in hooks for hook in getattr(several, "hooks", (several,)))
    devices = (getattr(hook, "execution_device", None) for hook in each)
    return torch.device(next((device for device in devices if device is not None), "meta"))


def capture_obstacle(model: Any) -> str:
    """Why steps of this model are called and not captured, or an empty text."""
    tested = {
        "the model is not on a CUDA device where Triton runs": model.device.type != "cuda"
        or select_backend("decode_attention", None, model.device) != "triton",
        "the model is not of this package": not getattr(model, "supports_topology", False),
        "another attention implementation is set": model.config._attn_implementation != TOPOLOGY_ATTENTION,
        "heads are wider than the kernel takes": (getattr(model.config, "head_dim", None) or 0) > MAX_HEAD_DIM,
        "HFE_CHECK asks for checks that wait for the device": check_data(),
        "gradients or autocast are on": torch.is_grad_enabled()
        or torch.is_autocast_enabled(execution_device(model).type),
    }
    return next((reason for reason, holds in tested.items() if holds), "")


def _round_up(count: int) -> int:
    """The next power of two; beyond what is captured the number itself."""
    return count if count > MOST_CAPTURED_QUERIES else 1 << max(count - 1, 0).bit_length()


# One for each model, from its last call; not an attribute of the model, which is copied, pickled and moved.
_IDLE: WeakKeyDictionary[nn.Module, TopologySession] = WeakKeyDictionary()


def take_session(model: Any, batch: int, capacity: int, suppressed: tuple[int, ...] = ()) -> TopologySession:
    """The session that an earlier call left, if it fits, or a new one; it is the caller's now."""
    session = _IDLE.pop(model, None)
    if session is None or not session.fits(batch, capacity, model):
        del session
        session = TopologySession(model, batch, capacity)
    session.begin(suppressed)
    return session


def leave_session(model: Any, session: TopologySession) -> None:
    """Keep a session for the next call, unless it is large or has captured nothing."""
    if not session.report():
        return
    memory = torch.cuda.get_device_properties(session.device).total_memory
    if session.nbytes() <= IDLE_SHARE_OF_MEMORY * memory:
        _IDLE[model] = session


def idle_session(model: Any) -> TopologySession | None:
    """The session that waits for the model's next call."""
    return _IDLE.get(model)


def free_session(model: Any) -> None:
    """Free the session that waits."""
    _IDLE.pop(model, None)
