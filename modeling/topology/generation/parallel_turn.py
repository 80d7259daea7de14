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
from hf_efficient.modeling.topology.generation.sampling import Choice, Sampler
from hf_efficient.modeling.topology.generation.scheduler import Limits, RowScheduler
from hf_efficient.modeling.topology.generation.streaming import StreamFeed
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
class _Flight:
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


class ParallelTurn:
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
            RowScheduler(
                b,
                ids[offset:],
                TopologyBuilder(grammar, token_ids, mode=mode, strict=False, decode=decode, row=b),
                forced,
                limits,
                ids[:offset].tolist(),
            )
            for b, (ids, offset) in enumerate(zip(self.prompt, self.offsets, strict=True))
        ]
        self.feed = None if streamer is None else StreamFeed(streamer, self.rows)
        self.passes = 0
        room = min(limits.max_new_tokens, FIRST_ROOM)
        self.session: TopologySession = take_session(
            model, len(self.rows), self.prompt.shape[1] + room, sampler.suppressed
        )

    def run(self) -> None:
        """Generate until every row has ended."""
        branches = [row.root for row in self.rows if row.live]
        logits = self._prefill()
        if branches:
            live = torch.tensor([branch.row for branch in branches], device=logits.device)
            self._accept(branches, *self._choose(branches, logits[live, -1]))
        for row in self.rows:
            row.advance()
        flight: _Flight | None = None
        while not all(row.finished for row in self.rows):
            flight = flight or self._launch()
            ahead = self._launch_ahead(flight)
            self._land(flight)
            flight = ahead if ahead is not None and self._came_true(ahead) else None
        if self.feed is not None:
            self.feed.end()
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
            row.fed = length - offset
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
            if getattr(self.model, "takes_topology", False):
                topology = topology._replace(blocks=topology_blocks(topology.segment_ids, topology.segment_visibility))
        elif any(self.offsets):
            padding = (segment_ids >= 0).long()
        cache.place(None)
        cache.segments[:, :length] = segment_ids
        self.passes += 1
        tokens, places = torch.from_numpy(self.prompt).to(device), torch.from_numpy(positions).to(device)
        return forward(self.model, tokens, places, topology, cache, 1, padding)

    # The steps

    def _launch(self) -> _Flight:
        """Begin a forward pass of all that no pass has computed."""
        columns = max(offset + len(row.tokens) for row, offset in zip(self.rows, self.offsets, strict=True))
        step = self._step_for(columns, max(len(row.tokens) - row.fed for row in self.rows))
        step.load(self.rows, self.offsets)
        return self._fly(step, [])

    def _launch_ahead(self, flight: _Flight) -> _Flight | None:
        """Begin the pass after one that is under way, as it will be if its tokens are nothing but text.

        The host learns while it runs whether they are; a tag, an end or a stop makes it a pass in vain, whose columns
        the next one overwrites. None where the device would wait for the host in any case.
        """
        session, rows, width = self.session, self.rows, flight.step.queries
        if flight.read is None or not session.can_speculate() or width > MOST_CAPTURED_QUERIES:
            return None
        columns = max(offset + len(row.tokens) + len(row.live) for row, offset in zip(rows, self.offsets, strict=True))
        if columns > session.cache.capacity:
            return None
        foretold = self.sampler.foretell(flight.branches)
        if foretold is None and type(self.sampler).settle is not Sampler.settle:
            return None
        queries, at = [], 0
        for b, row in enumerate(rows):
            end, count = len(row.tokens), len(row.live)
            queries.append(
                RowQueries(
                    [flight.step.placeholder_token(b, place) for place in range(width - count, width)]
                    if foretold is None
                    else foretold[at : at + count],
                    [branch.position for branch in row.live],
                    range(end, end + count),
                    [branch.builder.cur for branch in row.live],
                    end + count,
                )
            )
            at += count
        step = self._step_for(columns, max(len(row.live) for row in rows))
        step.send(rows, self.offsets, queries)
        return self._fly(step, queries)

    def _step_for(self, columns: int, queries: int) -> TopologyStep:
        with_logprobs = self.keeps_logprobs and not self.sampler.needs_logits
        return self.session.step_for(columns, queries, max(len(row.graph) for row in self.rows), with_logprobs)

    def _fly(self, step: TopologyStep, queries: Sequence[RowQueries]) -> _Flight:
        result = self.session.execute(step, self.model)
        self.passes += 1
        branches = [branch for row in self.rows for branch in row.live]
        return _Flight(step, branches, queries, None if self.sampler.needs_logits else step.fetch_async(result))

    def _land(self, flight: _Flight) -> None:
        """Take the tokens of a pass, and what follows from them."""
        step, width = flight.step, flight.step.queries
        places = [
            place
            for b, row in enumerate(self.rows)
            for place in range((b + 1) * width - len(row.live), (b + 1) * width)
        ]
        if flight.read is not None:
            found, logprobs = flight.read()
            tokens = found.reshape(-1)[places].tolist()
            chances = None if logprobs is None else logprobs.reshape(-1)[places].tolist()
        else:
            at = torch.tensor(places, device=step.logits.device)
            tokens, chances = self._choose(flight.branches, step.logits.flatten(0, 1)[at])
        self._accept(flight.branches, tokens, chances)
        for row in self.rows:
            row.advance()

    def _came_true(self, ahead: _Flight) -> bool:
        """True when the rows have become what a pass took them for; then it is theirs."""
        live = [branch for row in self.rows for branch in row.live]
        if live != ahead.branches:
            return False
        for row, foreseen in zip(self.rows, ahead.queries, strict=True):
            at = foreseen.end - len(foreseen.tokens)
            if (
                len(row.tokens) != foreseen.end
                or row.segments[at:] != list(foreseen.segments)
                or row.positions[at:] != list(foreseen.positions)
                # What the device chose stands; what a sampler foretold, it may have settled otherwise.
                or any(0 <= told != token for told, token in zip(foreseen.tokens, row.tokens[at:], strict=True))
            ):
                return False
        for row in self.rows:
            row.fed = len(row.tokens)
        return True

    def _choose(self, branches: Sequence[Branch], logits: Tensor) -> tuple[list[int], list[float] | None]:
        choice: Choice = self.sampler.choose(branches, logits)
        return choice.tokens.tolist(), choice.logprobs.tolist() if self.keeps_logprobs else None

    def _accept(self, branches: Sequence[Branch], tokens: list[int], chances: list[float] | None) -> None:
        """Give each branch its token; stop those, and all, for which a criterion holds."""
        tokens = self.sampler.settle(branches, tokens)
        if chances is not None:
            for branch, chance in zip(branches, chances, strict=True):
                branch.logprobs.append(chance)
        at = 0
        for row in self.rows:
            count = len(row.live)
            if count:
                row.accept(tokens[at : at + count])
                at += count
        if self.criteria:
            self._stop(branches)
        if any(_holds(clock, np.zeros(1)) for clock in self.clocks):
            for row in self.rows:
                row.stop_all("max_time")
        if self.feed is not None:
            self.feed.flush()

    def _stop(self, branches: Sequence[Branch]) -> None:
        for branch in branches:
            row = self.rows[branch.row]
            if branch in row.live:
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
