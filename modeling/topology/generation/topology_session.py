"""The session of one call of parallel generation: a shared key-value cache and the decoding steps captured for it.

`acquire_session` takes a session from the model's pool or makes a new one, and `release_session` returns it, so that
the next call with as many sequences reuses its memory and CUDA graphs. A step is one forward pass of the new tokens of
all branches (the parts of a sequence that are decoded in parallel); see `TopologyStep`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_efficient.logging import get_logger
from hf_efficient.modeling.decoder.graph_capture import (
    SIGNATURE_CHECK_INTERVAL,
    capture_obstacle,
    step_pool,
    step_signature,
)
from hf_efficient.modeling.topology.attention.topology_cache import TopologyCache
from hf_efficient.modeling.topology.attention.topology_interface import TOPOLOGY_ATTENTION
from hf_efficient.modeling.topology.generation.topology_step import TopologyStep

# Largest number of queries of each sequence in a captured step. More are rare (many headers in one step) and are
# computed by calling the model.
MAX_CAPTURED_QUERIES = 64


class TopologySession:
    """The key-value cache of B sequences and the decoding steps that use it.

    Args:
        model: the causal language model; the session keeps no reference to it.
        batch: B, the number of sequences.
        capacity: initial capacity of the cache in slots per sequence; the first forward pass allocates keys and
            values.
        signature: `step_signature` of the model, which identifies all weights and settings that a CUDA graph reads;
            None if steps must not be captured but are computed by calling the model.

    Attributes:
        cache: the `TopologyCache` that all branches of a sequence share.
        device: the device on which the model computes.
        signature: as passed; `execute` renews it from time to time.
        may_capture: False if the model or device does not support captured steps, or if a capture ran out of memory.
    """

    def __init__(self, model: Any, batch: int, capacity: int, signature: tuple | None = None) -> None:
        self.batch = batch
        self.device = execution_device(model)
        self.cache = TopologyCache(model.config.num_hidden_layers, batch, capacity, self.device)
        self.may_capture = can_capture_steps(model)
        self.signature = signature
        # By number of queries, number of words of a segment bitmap, and whether log-probabilities are computed.
        self._steps: dict[tuple[int, int, bool], TopologyStep] = {}
        self._steps_until_check = SIGNATURE_CHECK_INTERVAL
        # The most likely tokens of the last step, which the next step can read on the device; shared by all steps.
        with torch.inference_mode(False):
            self._chosen = torch.zeros(batch * MAX_CAPTURED_QUERIES, dtype=torch.int64, device=self.device)
        self._suppressed: tuple[int, ...] = ()
        self._suppressed_ids: Tensor | None = None

    def can_speculate(self) -> bool:
        """True if a step can be dispatched before the host has the tokens of the last one: steps are captured."""
        return self.may_capture and self.signature is not None

    def step_for(self, slots: int, queries: int, segments: int, with_logprobs: bool) -> TopologyStep:
        """Return a step for up to `queries` tokens of each sequence, created at the first request and then reused.

        If the cache has fewer than `slots` slots, it is reallocated, which discards all captured steps. A step of more
        than `MAX_CAPTURED_QUERIES` queries is created anew each time.

        Args:
            slots: cache slots that the longest sequence fills after this step, its left padding included.
            queries: new tokens of the sequence that has most; rounded up to a power of two.
            segments: number of segments of the sequence that has most.
            with_logprobs: the step computes the log-probabilities of the most likely tokens too.

        Raises:
            torch.OutOfMemoryError: the cache must be reallocated, and the device has too little memory.
        """
        if slots > self.cache.capacity:
            self._steps.clear()  # their graphs write to the memory of the old cache
            self.cache.grow(slots)
        key = _round_up(queries), _round_up(-(-segments // 64)), with_logprobs
        if key[0] > MAX_CAPTURED_QUERIES:
            return TopologyStep(self.batch, *key, self._chosen, self._suppressed_ids)
        if key not in self._steps:
            self._steps[key] = TopologyStep(self.batch, *key, self._chosen, self._suppressed_ids)
        return self._steps[key]

    def execute(self, step: TopologyStep, model: Any) -> Tensor:
        """Compute a step whose inputs have been sent to the device; returns the result of `TopologyStep.run`.

        The result is int64 [1, B, Q], the most likely tokens, or [2, B, Q] with the bits of their log-probabilities; of
        a captured step it is a buffer that the next call with the same step overwrites. Keys, values and segments are
        written to the cache. `step` must come from `step_for` after the last reallocation of the cache.

        Captured steps are replayed. If a capture runs out of memory, this session calls the model from then on. Every
        `SIGNATURE_CHECK_INTERVAL` steps it computes `signature` anew, in case the model has changed.
        """
        if not self.may_capture or step.queries > MAX_CAPTURED_QUERIES:
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
        """Empty the cache for other prompts, and make all steps never choose the token ids `suppressed`.

        If these ids differ from the last ones, all captured steps are discarded.
        """
        if suppressed != self._suppressed:
            self._steps.clear()  # the ids are part of their graphs
            self._suppressed = suppressed
            with torch.inference_mode(False):
                self._suppressed_ids = torch.tensor(suppressed, device=self.device) if suppressed else None
        self.cache.reset()
        self._steps_until_check = SIGNATURE_CHECK_INTERVAL

    def fits(self, batch: int, capacity: int) -> bool:
        """True if the session can serve a call with `batch` sequences of at least `capacity` slots."""
        return self.batch == batch and capacity <= self.cache.capacity

    def nbytes(self) -> int:
        """Bytes of device memory that the cache and the CUDA graphs hold."""
        return self.cache.nbytes() + sum(step.graph_bytes for step in self._steps.values())

    def report(self) -> list[dict[str, int]]:
        """Return for each captured step its batch size, queries, 64-bit words of a bitmap, and bytes of its graph."""
        return [
            {"batch": self.batch, "queries": step.queries, "words": step.words, "graph_bytes": step.graph_bytes}
            for step in self._steps.values()
            if step.signature is not None
        ]


def execution_device(model: Any) -> torch.device:
    """Return the device on which the model computes.

    A model offloaded by accelerate has weights on `meta`; its hooks then name the device. `meta` if no hook does.
    """
    if model.device.type != "meta":
        return model.device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    each = (hook for several in hooks for hook in getattr(several, "hooks", (several,)))
    devices = (getattr(hook, "execution_device", None) for hook in each)
    return torch.device(next((device for device in devices if device is not None), "meta"))


def can_capture_steps(model: Any) -> bool:
    """True if steps of this model can be captured in CUDA graphs: on CUDA, unless `capture_obstacle` finds a reason.

    Of the attention implementations, only ``hfe_topology`` is captured, and only in models of this package.
    """
    attention = (TOPOLOGY_ATTENTION,) if getattr(model, "supports_topology", False) else ()
    return model.device.type == "cuda" and not capture_obstacle(model, attention)


def _round_up(count: int) -> int:
    """Return `count` rounded up to a power of two, at least 1, or `count` itself above `MAX_CAPTURED_QUERIES`."""
    return count if count > MAX_CAPTURED_QUERIES else 1 << max(count - 1, 0).bit_length()


def acquire_session(model: Any, batch: int, capacity: int, suppressed: tuple[int, ...] = ()) -> TopologySession:
    """Return an empty session for one call: a fitting one from the model's pool, which is removed there, or a new one.

    Before a new one is created, idle sessions in the pool are freed.

    Args:
        model: the causal language model.
        batch: number of sequences.
        capacity: cache slots of each sequence that are needed at first.
        suppressed: token ids that are never chosen.
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
    """Return a session to the model's pool for the next call, unless it has no captured steps."""
    if session.report():
        step_pool(model).put(session)
