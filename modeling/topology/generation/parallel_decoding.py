"""The decoding loop of parallel generation: prefill, then steps until every sequence is finished.

Terms, explained in full in `scheduler.py`: a branch is a part of a sequence that is decoded in parallel with others;
the trunk is the root branch, which contains all others. Control tokens such as `<Path>` fork a branch into children,
end it or join the children. Forced tokens (headers, separators, joins) are appended by the scheduler without sampling.
Each token belongs to a segment, a run of consecutive tokens between forks and joins, which determines what it may
attend to. B is the number of sequences, P the prompt length, Q the queries of each sequence in a step, V the vocabulary
size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import MaxTimeCriteria

from hf_efficient.errors import HFEError
from hf_efficient.kernels.topology_blocks.api import topology_blocks
from hf_efficient.modeling.topology.attention.topology_mask import TopologyMask
from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.generation.branches import Branch
from hf_efficient.modeling.topology.generation.limits import Limits
from hf_efficient.modeling.topology.generation.sampling import Choice, Sampler
from hf_efficient.modeling.topology.generation.scheduler import SequenceScheduler
from hf_efficient.modeling.topology.generation.streaming import StreamWriter
from hf_efficient.modeling.topology.generation.topology_session import (
    MAX_CAPTURED_QUERIES,
    TopologySession,
    acquire_session,
    release_session,
)
from hf_efficient.modeling.topology.generation.topology_step import RowQueries, TopologyStep, check_attention, forward
from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder
from hf_efficient.modeling.topology.grammar.control_tokens import Decode
from hf_efficient.modeling.topology.grammar.forced_text import ForcedText

# Cache slots allocated at first for new tokens of each sequence; the cache is reallocated when they are filled.
INITIAL_NEW_SLOTS = 4096


@dataclass(frozen=True)
class PendingStep:
    """A forward pass that has been dispatched to the device and whose result has not been read.

    Attributes:
        step: the buffers (and CUDA graph) that compute it.
        branches: the n branches that sample a token after it, ordered by sequence.
        queries: for a speculative step, the `RowQueries` (token ids, positions, cache slots and segments) assumed for
            each sequence; empty for other steps.
        read: a function that waits for the device and returns the most likely tokens, int64 [B, Q], and their
            log-probabilities, float64 [B, Q], or None if the step does not compute them. The arrays are overwritten
            when `step` is used again twice. The field is None if the sampler chooses from the logits instead.
    """

    step: TopologyStep
    branches: list[Branch]
    queries: Sequence[RowQueries]
    read: Callable[[], tuple[np.ndarray, np.ndarray | None]] | None


class ParallelDecodeLoop:
    """Decodes the sequences of one batch in parallel branches.

    Each forward pass computes the new tokens of all active branches of all sequences. While the device computes a step,
    the loop dispatches the next one speculatively, assuming that no sampled token is a control token. If one of them
    forks, joins or ends a branch, the result of the speculative step is discarded, and the next step overwrites its
    cache slots.

    Args:
        model: any causal language model with full attention and rotary positions.
        input_ids: int64 [B, P], padded on the left.
        padding: the attention mask [B, P], bool or integer, zero at padding; None without padding.
        grammar: `multiverse` or `medverse`.
        token_ids: control token -> id.
        mode: what a MedVerse step may attend to: `dag`, `layers` or `flat`; see `StepOrder`.
        decode: function from token ids to text.
        forced: the grammar's forced tokens.
        limits: limits of each sequence.
        sampler: chooses tokens.
        criteria: transformers' stopping criteria. A criterion that is met for a branch stops that branch; a
            `MaxTimeCriteria` that is met stops all sequences.
        keep_logprobs: store the log-probability of each sampled token in its branch.
        streamer: receives the tokens as they are generated; or None.

    Attributes:
        sequences: a `SequenceScheduler` for each sequence, with its tokens and branches.
        offsets: length of each sequence's left padding.
        session: the key-value cache and the decoding steps captured for it.
        num_forward_passes: forward passes dispatched so far, including the prefill and discarded speculative steps.

    Raises:
        HFEError: the model's attention cannot generate in parallel, or `padding` has another shape.
        TopologyError: `padding` is not on the left, `token_ids` lacks a control token, or the tokenizer encodes the
            control token of a forced header as another id.
        UsageError: `grammar` or `mode` is unknown, or `streamer` supports only one sequence and B is larger.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        padding: Tensor | None,
        *,
        grammar: str,
        token_ids: dict[str, int],
        mode: str,
        decode: Decode,
        forced: ForcedText,
        limits: Limits,
        sampler: Sampler,
        criteria: Sequence[Any] = (),
        keep_logprobs: bool = False,
        streamer: Any = None,
    ) -> None:
        check_attention(model)
        self.model = model
        self.sampler = sampler
        self.keep_logprobs = keep_logprobs
        self.time_criteria = [criterion for criterion in criteria if isinstance(criterion, MaxTimeCriteria)]
        self.criteria = [criterion for criterion in criteria if not isinstance(criterion, MaxTimeCriteria)]
        self.prompt = input_ids.cpu().numpy()
        self.offsets = _left_padding(padding, *input_ids.shape)
        self.sequences = [
            SequenceScheduler(
                row,
                ids[offset:],
                TopologyBuilder(grammar, token_ids, mode=mode, strict=False, decode=decode, row=row),
                forced,
                limits,
                ids[:offset].tolist(),
            )
            for row, (ids, offset) in enumerate(zip(self.prompt, self.offsets, strict=True))
        ]
        self.stream = None if streamer is None else StreamWriter(streamer, self.sequences)
        self.num_forward_passes = 0
        new_slots = min(limits.max_new_tokens, INITIAL_NEW_SLOTS)
        self.session: TopologySession = acquire_session(
            model, len(self.sequences), self.prompt.shape[1] + new_slots, sampler.suppressed
        )

    def run(self) -> None:
        """Generate until every sequence is finished; the tokens are then in `sequences`.

        Afterwards the session is released for the next call, so a loop runs only once; after an error it is not
        released. `generate` calls it with gradients off. Errors of the model, sampler, criteria and streamer are passed
        on.

        Raises:
            TopologyError: the tokenizer encodes the control token of a forced header as another id.
            torch.OutOfMemoryError: the device has too little memory for the cache or a forward pass.
        """
        # 1. Prefill: sample the first token of each trunk, unless its prompt ends with a fork.
        branches = [sequence.trunk for sequence in self.sequences if sequence.active_branches]
        logits = self._prefill()
        if branches:
            rows = torch.tensor([branch.row for branch in branches], device=logits.device)
            self._accept(branches, *self._choose(branches, logits[rows, -1]))
        for sequence in self.sequences:
            sequence.schedule()
        # 2. Decode: while one step is in flight, dispatch a second one speculatively if possible.
        pending: PendingStep | None = None
        while not all(sequence.finish_reason for sequence in self.sequences):
            pending = pending or self.dispatch()
            speculative = self.dispatch_speculative(pending)
            self.complete(pending)
            pending = None
            if speculative is not None and self.speculation_holds(speculative):
                for sequence in self.sequences:
                    sequence.num_computed_tokens = len(sequence.tokens)
                pending = speculative
        # 3. Flush the streamer and keep the cache and the captured steps for the next call.
        if self.stream is not None:
            self.stream.end()
        release_session(self.model, self.session)

    # Prefill

    def _prefill(self) -> Tensor:
        """Run the model on the prompts [B, P]; return the logits [B, 1, V] of their last tokens.

        The prompts' keys and values fill the first P cache slots. A prompt that contains blocks is computed with a
        `TopologyMask`, other prompts with a padding mask or none. Sets `num_computed_tokens` of each sequence to the
        length of its prompt, and writes the prompts' segments to the cache.
        """
        batch, length = self.prompt.shape
        segments = np.full((batch, length), -1, dtype=np.int32)
        position_ids = np.zeros((batch, length), dtype=np.int64)
        for row, (sequence, offset) in enumerate(zip(self.sequences, self.offsets, strict=True)):
            segments[row, offset:] = sequence.segments[: length - offset]
            position_ids[row, offset:] = sequence.positions[: length - offset]
            sequence.num_computed_tokens = length - offset
        device, cache = self.session.device, self.session.cache
        segment_ids = torch.from_numpy(segments).to(device)
        topology, padding_mask = None, None
        if segments.max(initial=0) > 0:
            count = int(segments.max()) + 1
            words = -(-count // 64)
            visibility = np.zeros((batch, count, words), dtype=np.int64)
            for row, sequence in enumerate(self.sequences):
                known = min(count, len(sequence.graph))
                bitmaps = np.frombuffer(sequence.bitmaps(range(known), words), dtype="<i8")
                visibility[row, :known] = bitmaps.reshape(-1, words)
            topology = TopologyMask(segment_ids, torch.from_numpy(visibility).to(device))
            if getattr(self.model, "supports_topology", False):
                topology = topology._replace(blocks=topology_blocks(topology.segment_ids, topology.segment_visibility))
        elif any(self.offsets):
            padding_mask = (segment_ids >= 0).long()
        cache.place(None)
        cache.segments[:, :length] = segment_ids
        self.num_forward_passes += 1
        input_ids, positions = torch.from_numpy(self.prompt).to(device), torch.from_numpy(position_ids).to(device)
        return forward(self.model, input_ids, positions, topology, cache, 1, padding_mask)

    # Decoding steps

    def dispatch(self) -> PendingStep:
        """Dispatch a forward pass of all tokens that are not yet computed, without waiting for its result.

        Sets `num_computed_tokens` of each sequence to the number of its tokens. Discards captured steps if the cache
        must be reallocated. At least one sequence must be unfinished.
        """
        slots = max(
            offset + len(sequence.tokens) for sequence, offset in zip(self.sequences, self.offsets, strict=True)
        )
        queries = max(len(sequence.tokens) - sequence.num_computed_tokens for sequence in self.sequences)
        step = self._step_for(slots, queries)
        step.load(self.sequences, self.offsets)
        return self._enqueue(step, [])

    def dispatch_speculative(self, pending: PendingStep) -> PendingStep | None:
        """Dispatch the step after `pending` before the result of `pending` is read.

        It assumes that each token sampled after `pending` is an ordinary token (not a control token), so that every
        active branch continues with one more token. The step takes these tokens from device memory, where `pending`
        leaves them, unless the sampler proposes them on the host. The sequences are not changed: if the speculation
        holds, the caller sets `num_computed_tokens`.

        Returns:
            The dispatched step; None if the device cannot continue before the host has the tokens: the sampler needs
            logits or may replace tokens, steps are not captured (`pending` may be too large for it), or the cache must
            be reallocated first.
        """
        session, sequences, width = self.session, self.sequences, pending.step.queries
        if pending.read is None or not session.can_speculate() or width > MAX_CAPTURED_QUERIES:
            return None
        slots = max(
            offset + len(sequence.tokens) + len(sequence.active_branches)
            for sequence, offset in zip(sequences, self.offsets, strict=True)
        )
        if slots > session.cache.capacity:
            return None
        proposed = self.sampler.propose(pending.branches)
        # A sampler that overrides `finalize` may replace tokens on the host, so those on the device may be wrong.
        if proposed is None and type(self.sampler).finalize is not Sampler.finalize:
            return None
        queries, first = [], 0
        for row, sequence in enumerate(sequences):
            end, count = len(sequence.tokens), len(sequence.active_branches)
            queries.append(
                RowQueries(
                    [pending.step.placeholder_token(row, index) for index in range(width - count, width)]
                    if proposed is None
                    else proposed[first : first + count],
                    [branch.position for branch in sequence.active_branches],
                    range(end, end + count),
                    [branch.builder.segment for branch in sequence.active_branches],
                    end + count,
                )
            )
            first += count
        step = self._step_for(slots, max(len(sequence.active_branches) for sequence in sequences))
        step.send(sequences, self.offsets, queries)
        return self._enqueue(step, queries)

    def _step_for(self, slots: int, queries: int) -> TopologyStep:
        """Return a step for at least `queries` tokens of each sequence; grow the cache to `slots` slots if needed."""
        with_logprobs = self.keep_logprobs and not self.sampler.needs_logits
        segments = max(len(sequence.graph) for sequence in self.sequences)
        return self.session.step_for(slots, queries, segments, with_logprobs)

    def _enqueue(self, step: TopologyStep, queries: Sequence[RowQueries]) -> PendingStep:
        """Start a step whose inputs are on the device, and the copy of its tokens to the host, without waiting.

        If the sampler needs logits, nothing is copied. Increases `num_forward_passes`.

        Args:
            step: the step.
            queries: for a speculative step, the assumed queries of each sequence; otherwise empty.
        """
        result = self.session.execute(step, self.model)
        self.num_forward_passes += 1
        branches = [branch for sequence in self.sequences for branch in sequence.active_branches]
        return PendingStep(step, branches, queries, None if self.sampler.needs_logits else step.fetch_async(result))

    def complete(self, pending: PendingStep) -> None:
        """Wait for a step, append the sampled tokens, then join finished forks and start queued branches.

        Stopping criteria are applied and the streamer is fed in between. `pending.branches` must still be the active
        branches. Steps are completed in the order in which they were dispatched.

        Raises:
            TopologyError: the tokenizer encodes the control token of a forced header as another id.
        """
        step, width = pending.step, pending.step.queries
        # The queries of the active branches are the last ones of their batch row; indices are into [B * Q].
        indices = [
            index
            for row, sequence in enumerate(self.sequences)
            for index in range((row + 1) * width - len(sequence.active_branches), (row + 1) * width)
        ]
        logprobs: list[float] | None
        if pending.read is not None:
            most_likely, most_likely_logprobs = pending.read()
            tokens = most_likely.reshape(-1)[indices].tolist()
            logprobs = None if most_likely_logprobs is None else most_likely_logprobs.reshape(-1)[indices].tolist()
        else:
            rows = torch.tensor(indices, device=step.logits.device)
            tokens, logprobs = self._choose(pending.branches, step.logits.flatten(0, 1)[rows])
        self._accept(pending.branches, tokens, logprobs)
        for sequence in self.sequences:
            sequence.schedule()

    def speculation_holds(self, speculative: PendingStep) -> bool:
        """Return True if the new tokens of all sequences are those that a speculative step assumed; changes nothing.

        Call it after the step before `speculative` is completed. True means that the same branches are active and that
        each sequence has exactly the assumed number of tokens, with the assumed segments, positions and token ids.

        Args:
            speculative: its `queries` hold for each sequence the assumed `tokens`, `positions` and `segments`
                (sequences of int, one entry per active branch) and `end`, the total number of tokens with these.
        """
        if speculative.branches != [branch for sequence in self.sequences for branch in sequence.active_branches]:
            return False
        for sequence, assumed in zip(self.sequences, speculative.queries, strict=True):
            start = assumed.end - len(assumed.tokens)
            tokens = sequence.tokens[start:]
            if (
                len(sequence.tokens) != assumed.end
                or sequence.segments[start:] != list(assumed.segments)
                or sequence.positions[start:] != list(assumed.positions)
                # Negative ids are placeholders that the device filled with the sampled token, so they always match.
                or any(0 <= guess != token for guess, token in zip(assumed.tokens, tokens, strict=True))
            ):
                return False
        return True

    # Sampled tokens

    def _choose(self, branches: Sequence[Branch], logits: Tensor) -> tuple[list[int], list[float] | None]:
        """Return the token ids that the sampler chooses for n branches from logits [n, V], and their log-probabilities.

        The log-probabilities are None unless `keep_logprobs` is set.
        """
        choice: Choice = self.sampler.choose(branches, logits)
        return choice.tokens.tolist(), choice.logprobs.tolist() if self.keep_logprobs else None

    def _accept(self, branches: Sequence[Branch], tokens: list[int], logprobs: list[float] | None) -> None:
        """Append the sampled token of each branch, apply the stopping criteria and stream the new tokens.

        Args:
            branches: all active branches of all sequences, ordered by sequence.
            tokens: the sampled token of each branch; `Sampler.finalize` may replace it.
            logprobs: log-probability of each token, or None if they are not kept.
        """
        tokens = self.sampler.finalize(branches, tokens)
        if logprobs is not None:
            for branch, logprob in zip(branches, logprobs, strict=True):
                branch.logprobs.append(logprob)
        first = 0
        for sequence in self.sequences:
            count = len(sequence.active_branches)
            if count:
                sequence.accept(tokens[first : first + count])
                first += count
        if self.criteria:
            self._apply_criteria(branches)
        if any(_is_met(criterion, np.zeros(1)) for criterion in self.time_criteria):
            for sequence in self.sequences:
                sequence.stop_all("max_time")
        if self.stream is not None:
            self.stream.flush()

    def _apply_criteria(self, branches: Sequence[Branch]) -> None:
        """Stop each active branch for which a stopping criterion is met.

        A criterion receives the ids that the branch attends to, int64 [1, n] on the CPU, including the left padding,
        and None as its scores. The finish reason is `stopping_criteria`.
        """
        for branch in branches:
            sequence = self.sequences[branch.row]
            if branch in sequence.active_branches:
                ids = branch.visible_ids()
                if any(_is_met(criterion, ids) for criterion in self.criteria):
                    sequence.stop(branch, "stopping_criteria")


def _is_met(criterion: Any, ids: Any) -> bool:
    """Call a stopping criterion with the ids of one branch as [1, n], and with None as its scores."""
    return bool(torch.as_tensor(criterion(torch.as_tensor([list(ids)], dtype=torch.long), None)).all())


def _left_padding(padding: Tensor | None, batch: int, length: int) -> list[int]:
    """Return the number of padding tokens before each prompt.

    Args:
        padding: attention mask [batch, length], bool or integer, zero at padding; None without padding.
        batch, length: shape of the prompts.

    Raises:
        HFEError: `padding` has another shape.
        TopologyError: `padding` hides tokens that are not at the beginning of their row.
    """
    if padding is None:
        return [0] * batch
    real = padding.to(torch.bool).cpu()
    if real.shape != (batch, length):
        raise HFEError(
            f"attention_mask has shape {list(padding.shape)} and the prompt {[batch, length]}",
            "pass a mask of the shape of input_ids",
        )
    if not bool(real[:, -1].all()) or bool((real[:, 1:] < real[:, :-1]).any()):
        raise TopologyError(
            "attention_mask hides ids that are not at the beginning of their row",
            "pad prompts on the left: tokenizer.padding_side = 'left'",
        )
    return (~real).sum(1).tolist()
