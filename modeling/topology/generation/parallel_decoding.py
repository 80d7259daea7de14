"""One call of parallel generation: prompt, steps, tokens, until every row has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import MaxTimeCriteria

from hf_efficient.errors import HFEError, TopologyError
from hf_efficient.kernels.topology_blocks.api import topology_blocks
from hf_efficient.modeling.topology.attention.topology_mask import TopologyMask
from hf_efficient.modeling.topology.generation.branches import Branch
from hf_efficient.modeling.topology.generation.limits import Limits
from hf_efficient.modeling.topology.generation.sampling import Choice, Sampler
from hf_efficient.modeling.topology.generation.scheduler import SequenceScheduler
from hf_efficient.modeling.topology.generation.streaming import StreamWriter
from hf_efficient.modeling.topology.generation.topology_step import (
    MOST_CAPTURED_QUERIES,
    RowQueries,
    TopologySession,
    TopologyStep,
    check_attention,
    forward,
    leave_session,
    take_session,
)
from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder
from hf_efficient.modeling.topology.grammar.control_tokens import Decode
from hf_efficient.modeling.topology.grammar.forced_text import ForcedText

# Room for new tokens that a cache begins with; more is made when it is needed.
FIRST_ROOM = 4096


@dataclass(frozen=True)
class PendingStep:
    """A forward pass that is under way.

    Attributes:
        branches: that want a token of it, all rows one after the other.
        queries: what the rows were taken to want computed, where that was not known.
        read: waits for the most likely tokens; None where the logits are looked at instead.
    """

    step: TopologyStep
    branches: list[Branch]
    queries: Sequence[RowQueries]
    read: Callable[[], tuple[np.ndarray, np.ndarray | None]] | None


class ParallelDecodeLoop:
    """Rows of one batch while they are generated.

    Args:
        model: any causal language model with full attention and rotary positions.
        input_ids: [B, P], padded on the left.
        padding: [B, P], false at padding; None where there is none.
        grammar, token_ids, mode, decode: as for `TopologyBuilder`.
        forced: the grammar's own tokens.
        limits: how far and how wide a row may grow.
        sampler: chooses tokens.
        criteria: transformers' stopping criteria; they end the branch for which they hold.
        keeps_logprobs: keep the log-probability of each chosen token.
        streamer: gets the tokens as they come; or None.
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
        keeps_logprobs: bool = False,
        streamer: Any = None,
    ) -> None:
        check_attention(model)
        self.model = model
        self.sampler = sampler
        self.keeps_logprobs = keeps_logprobs
        self.clocks = [criterion for criterion in criteria if isinstance(criterion, MaxTimeCriteria)]
        self.criteria = [criterion for criterion in criteria if not isinstance(criterion, MaxTimeCriteria)]
        self.prompt = input_ids.cpu().numpy()
        self.offsets = _left_padding(padding, *input_ids.shape)
        self.rows = [
            SequenceScheduler(
                b,
                ids[offset:],
                TopologyBuilder(grammar, token_ids, mode=mode, strict=False, decode=decode, row=b),
                forced,
                limits,
                ids[:offset].tolist(),
            )
            for b, (ids, offset) in enumerate(zip(self.prompt, self.offsets, strict=True))
        ]
        self.stream = None if streamer is None else StreamWriter(streamer, self.rows)
        self.passes = 0
        room = min(limits.max_new_tokens, FIRST_ROOM)
        self.session: TopologySession = take_session(
            model, len(self.rows), self.prompt.shape[1] + room, sampler.suppressed
        )

    def run(self) -> None:
        """Generate until every row has ended."""
        branches = [row.trunk for row in self.rows if row.active_branches]
        logits = self._prefill()
        if branches:
            live = torch.tensor([branch.row for branch in branches], device=logits.device)
            self._accept(branches, *self._choose(branches, logits[live, -1]))
        for row in self.rows:
            row.schedule()
        pending: PendingStep | None = None
        while not all(row.finish_reason for row in self.rows):
            pending = pending or self._dispatch()
            speculative = self._dispatch_speculative(pending)
            self._complete(pending)
            pending = speculative if speculative is not None and self._speculation_holds(speculative) else None
        if self.stream is not None:
            self.stream.end()
        leave_session(self.model, self.session)

    # The prompt

    def _prefill(self) -> Tensor:
        """Logits [B, 1, V] after the prompts, which fill the first columns of the cache."""
        batch, length = self.prompt.shape
        segments = np.full((batch, length), -1, dtype=np.int32)
        positions = np.zeros((batch, length), dtype=np.int64)
        for b, (row, offset) in enumerate(zip(self.rows, self.offsets, strict=True)):
            segments[b, offset:] = row.segments[: length - offset]
            positions[b, offset:] = row.positions[: length - offset]
            row.num_computed_tokens = length - offset
        device, cache = self.session.device, self.session.cache
        segment_ids = torch.from_numpy(segments).to(device)
        topology, padding = None, None
        if segments.max(initial=0) > 0:
            count = int(segments.max()) + 1
            words = -(-count // 64)
            segment_visibility = np.zeros((batch, count, words), dtype=np.int64)
            for b, row in enumerate(self.rows):
                known = min(count, len(row.graph))
                segment_visibility[b, :known] = np.frombuffer(row.bitmaps(range(known), words), dtype="<i8").reshape(
                    -1, words
                )
            topology = TopologyMask(segment_ids, torch.from_numpy(segment_visibility).to(device))
            if getattr(self.model, "supports_topology", False):
                topology = topology._replace(blocks=topology_blocks(topology.segment_ids, topology.segment_visibility))
        elif any(self.offsets):
            padding = (segment_ids >= 0).long()
        cache.place(None)
        cache.segments[:, :length] = segment_ids
        self.passes += 1
        tokens, places = torch.from_numpy(self.prompt).to(device), torch.from_numpy(positions).to(device)
        return forward(self.model, tokens, places, topology, cache, 1, padding)

    # The steps

    def _dispatch(self) -> PendingStep:
        """Begin a forward pass of all that no pass has computed."""
        columns = max(offset + len(row.tokens) for row, offset in zip(self.rows, self.offsets, strict=True))
        step = self._step_for(columns, max(len(row.tokens) - row.num_computed_tokens for row in self.rows))
        step.load(self.rows, self.offsets)
        return self._enqueue(step, [])

    def _dispatch_speculative(self, pending: PendingStep) -> PendingStep | None:
        """Begin the pass after one that is under way, as it will be if its tokens are nothing but text.

        The host learns while it runs whether they are; a tag, an end or a stop makes it a pass in vain, whose columns
        the next one overwrites. None where the device would wait for the host in any case.
        """
        session, rows, width = self.session, self.rows, pending.step.queries
        if pending.read is None or not session.can_speculate() or width > MOST_CAPTURED_QUERIES:
            return None
        columns = max(
            offset + len(row.tokens) + len(row.active_branches) for row, offset in zip(rows, self.offsets, strict=True)
        )
        if columns > session.cache.capacity:
            return None
        proposed = self.sampler.propose(pending.branches)
        if proposed is None and type(self.sampler).finalize is not Sampler.finalize:
            return None
        queries, at = [], 0
        for b, row in enumerate(rows):
            end, count = len(row.tokens), len(row.active_branches)
            queries.append(
                RowQueries(
                    [pending.step.placeholder_token(b, place) for place in range(width - count, width)]
                    if proposed is None
                    else proposed[at : at + count],
                    [branch.position for branch in row.active_branches],
                    range(end, end + count),
                    [branch.builder.segment for branch in row.active_branches],
                    end + count,
                )
            )
            at += count
        step = self._step_for(columns, max(len(row.active_branches) for row in rows))
        step.send(rows, self.offsets, queries)
        return self._enqueue(step, queries)

    def _step_for(self, columns: int, queries: int) -> TopologyStep:
        with_logprobs = self.keeps_logprobs and not self.sampler.needs_logits
        return self.session.step_for(columns, queries, max(len(row.graph) for row in self.rows), with_logprobs)

    def _enqueue(self, step: TopologyStep, queries: Sequence[RowQueries]) -> PendingStep:
        result = self.session.execute(step, self.model)
        self.passes += 1
        branches = [branch for row in self.rows for branch in row.active_branches]
        return PendingStep(step, branches, queries, None if self.sampler.needs_logits else step.fetch_async(result))

    def _complete(self, pending: PendingStep) -> None:
        """Take the tokens of a pass, and what follows from them."""
        step, width = pending.step, pending.step.queries
        places = [
            place
            for b, row in enumerate(self.rows)
            for place in range((b + 1) * width - len(row.active_branches), (b + 1) * width)
        ]
        if pending.read is not None:
            found, logprobs = pending.read()
            tokens = found.reshape(-1)[places].tolist()
            logprobs = None if logprobs is None else logprobs.reshape(-1)[places].tolist()
        else:
            at = torch.tensor(places, device=step.logits.device)
            tokens, logprobs = self._choose(pending.branches, step.logits.flatten(0, 1)[at])
        self._accept(pending.branches, tokens, logprobs)
        for row in self.rows:
            row.schedule()

    def _speculation_holds(self, speculative: PendingStep) -> bool:
        """True when the rows have become what a pass took them for; then it is theirs."""
        live = [branch for row in self.rows for branch in row.active_branches]
        if live != speculative.branches:
            return False
        for row, speculated in zip(self.rows, speculative.queries, strict=True):
            at = speculated.end - len(speculated.tokens)
            if (
                len(row.tokens) != speculated.end
                or row.segments[at:] != list(speculated.segments)
                or row.positions[at:] != list(speculated.positions)
                # What the device chose stands; what a sampler proposed, it may have settled otherwise.
                or any(0 <= told != token for told, token in zip(speculated.tokens, row.tokens[at:], strict=True))
            ):
                return False
        for row in self.rows:
            row.num_computed_tokens = len(row.tokens)
        return True

    def _choose(self, branches: Sequence[Branch], logits: Tensor) -> tuple[list[int], list[float] | None]:
        choice: Choice = self.sampler.choose(branches, logits)
        return choice.tokens.tolist(), choice.logprobs.tolist() if self.keeps_logprobs else None

    def _accept(self, branches: Sequence[Branch], tokens: list[int], logprobs: list[float] | None) -> None:
        """Give each branch its token; stop those, and all, for which a criterion holds."""
        tokens = self.sampler.finalize(branches, tokens)
        if logprobs is not None:
            for branch, logprob in zip(branches, logprobs, strict=True):
                branch.logprobs.append(logprob)
        at = 0
        for row in self.rows:
            count = len(row.active_branches)
            if count:
                row.accept(tokens[at : at + count])
                at += count
        if self.criteria:
            self._stop(branches)
        if any(_holds(clock, np.zeros(1)) for clock in self.clocks):
            for row in self.rows:
                row.stop_all("max_time")
        if self.stream is not None:
            self.stream.flush()

    def _stop(self, branches: Sequence[Branch]) -> None:
        for branch in branches:
            row = self.rows[branch.row]
            if branch in row.active_branches:
                ids = branch.visible_ids()
                if any(_holds(criterion, ids) for criterion in self.criteria):
                    row.stop(branch, "stopping_criteria")


def _holds(criterion: Any, ids: Any) -> bool:
    """What a stopping criterion says of one text."""
    return bool(torch.as_tensor(criterion(torch.as_tensor([list(ids)], dtype=torch.long), None)).all())


def _left_padding(padding: Tensor | None, batch: int, length: int) -> list[int]:
    """Number of padding columns before each row's prompt."""
    if padding is None:
        return [0] * batch
    real = padding.to(torch.bool).cpu()
    if real.shape != (batch, length):
        raise HFEError(
            f"attention_mask has shape {list(padding.shape)} and the prompt {[batch, length]}", "give one for each id"
        )
    if not bool(real[:, -1].all()) or bool((real[:, 1:] < real[:, :-1]).any()):
        raise TopologyError(
            "attention_mask hides ids that are not at the beginning of their row",
            "pad prompts on the left: tokenizer.padding_side = 'left'",
        )
    return (~real).sum(1).tolist()
