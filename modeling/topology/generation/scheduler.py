"""The course of one row in parallel generation: which branch writes what, where, and when.

Host code on token ids alone, without any tensor. `advance` opens, joins and starts what is due and leaves the columns
that the next forward pass must compute; `accept` takes the tokens that were chosen after it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from hf_efficient.errors import UsageError
from hf_efficient.modeling.topology.generation.branches import (
    Branch,
    BranchState,
    Fork,
    TextOrderReader,
    slots_in_text_order,
)
from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder
from hf_efficient.modeling.topology.grammar.cursor import MAX_DEPTH
from hf_efficient.modeling.topology.grammar.forced_text import ForcedText
from hf_efficient.modeling.topology.grammar.plan import step_schedule
from hf_efficient.modeling.topology.grammar.segment_graph import MAX_SEGMENTS, bitmap_bytes

BUDGETS = ("positions", "tokens")


def is_whole(value: Any) -> bool:
    """True for whole numbers, of numpy too; a truth value is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class Limits:
    """How far and how wide a row may grow.

    Attributes:
        max_new_tokens: the budget.
        budget: `positions` counts the longest chain of tokens, as the published engine does; `tokens` counts all.
        branch_max_new_tokens: tokens that a branch may sample; None for no limit but the budget.
        max_branches: branches that write at once; others begin as soon as one of them has ended.
        max_depth: blocks inside each other; deeper ones are written one path after the other.
        min_fork_budget: with less than this left, nothing is written side by side any more.
        eos_ids: tokens that end a branch.
    """

    max_new_tokens: int
    budget: str = "positions"
    branch_max_new_tokens: int | None = None
    max_branches: int = 32
    max_depth: int = 5
    min_fork_budget: int = 30
    eos_ids: Collection[int] = ()

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise UsageError(f"budget={self.budget!r} is unknown", f"choose one of {', '.join(BUDGETS)}")
        lowest = {"max_new_tokens": 1, "max_branches": 1, "max_depth": 0, "min_fork_budget": 0}
        if self.branch_max_new_tokens is not None:
            lowest["branch_max_new_tokens"] = 1
        for name, least in lowest.items():
            value = getattr(self, name)
            if not is_whole(value):
                raise UsageError(f"{name}={value!r} is not a whole number", f"pass one of at least {least}")
            if value < least:
                raise UsageError(f"{name}={value} is too small", f"pass at least {least}")


class SequenceScheduler:
    """One row: its tokens in the order in which they came, and the branches that write on.

    Args:
        row: of the batch.
        prompt: ids without padding.
        builder: new, lenient.
        forced: the grammar's own tokens.
        limits: how far and how wide the row may grow.
        padding: ids that transformers' logits processors would see before the prompt.

    Attributes:
        tokens, segments, positions: of each column.
        owners: branch that wrote each column after the prompt.
        fed: columns that a forward pass has computed.
        live: branches that want a token after the next forward pass.
        finished: why the row ended, or an empty text.
    """

    def __init__(
        self,
        row: int,
        prompt: Sequence[int],
        builder: TopologyBuilder,
        forced: ForcedText,
        limits: Limits,
        padding: Sequence[int] = (),
    ) -> None:
        self.row = row
        self.forced = forced
        self.limits = limits
        self.graph = builder.graph
        self.prompt_length = len(prompt)
        placed = builder.feed_many(prompt)
        self.tokens: list[int] = [int(token) for token in prompt]
        self.segments: list[int] = placed.segment_ids.tolist()
        self.positions: list[int] = placed.position_ids.tolist()
        self.token_branches: list[Branch] = []
        self.num_computed_tokens = 0
        self.finish_reason = ""
        self.prompt_end = max(self.graph.end) + 1
        # All other tokens are nothing but text.
        self._special = forced.control | set(limits.eos_ids)
        self.root = Branch(row, (), builder, None, self._visible_ids)
        self.root.state = BranchState.ACTIVE
        self.root.last_slot = self.prompt_length - 1
        self.active_branches = [self.root]
        self._padding = list(padding)
        self._segment_tokens: dict[int, list[int]] = {}
        self._segment_order: list[int] = []
        self._tokens_sorted = 0  # columns that `_segment_tokens` has
        self._forks: list[Fork] = []  # open ones, innermost last
        self._changed = False
        # MedVerse's plans are carried out once.
        self._executed: object = None
        self._take_up_prompt(np.asarray(prompt, dtype=np.int64))

    # What the engine asks

    @property
    def text_order_reader(self) -> TextOrderReader:
        """Reads generated columns in the order of the text."""
        return TextOrderReader(self.root)

    def slots_in_text_order(self) -> Iterator[int]:
        """All columns in the order of the text."""
        yield from range(self.prompt_length)
        yield from slots_in_text_order(self.root)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens after the prompt, forced ones among them."""
        return len(self.tokens) - self.prompt_length

    @property
    def critical_path(self) -> int:
        """Positions after the prompt: the longest chain of tokens that follow each other."""
        return max(self.graph.end) + 1 - self.prompt_end

    def bitmaps(self, segments: Sequence[int], words: int) -> bytes:
        """What tokens of these segments see: `words` little-endian integers of 64 bits for each."""
        closure = self.graph.closure
        return bitmap_bytes([closure[segment] for segment in segments], words)

    def accept(self, tokens: Sequence[int]) -> None:
        """Take the next token of each live branch, in their order."""
        special = self._special
        for branch, token in zip(list(self.active_branches), tokens, strict=True):
            branch.num_sampled_tokens += 1
            if token in special:
                self._take(branch, token)
                continue
            self._append(branch, token)
            if self.positions[-1] >= branch.checked_from:
                self._check_budget(branch)

    def stop(self, branch: Branch, reason: str) -> None:
        """End a live branch; for the trunk that ends the row."""
        if branch.parent is None:
            self._finish(reason)
        else:
            self._close(branch, reason)

    def stop_all(self, reason: str) -> None:
        """End the row with all that is open."""
        while self.active_branches and not self.finish_reason:
            for branch in list(self.active_branches):
                self.stop(branch, reason)
            for fork in self._forks:
                for branch in fork.branches:
                    if branch.state is BranchState.QUEUED:
                        branch.state = BranchState.SKIPPED
            self.advance()

    def advance(self) -> None:
        """Join what is done and start what is ready, until nothing more is due."""
        while not self.finish_reason:
            if self.limits.budget == "tokens":
                self._spend()
            if not self._changed:
                return
            self._changed = False
            self._join_forks()
            self._start_branches()

    # Tokens

    def _take(self, branch: Branch, token: int) -> None:
        forced, is_trunk = self.forced, branch.parent is None
        if token in self.limits.eos_ids:
            if is_trunk:
                self._append(branch, token)
                self._finish("eos")
            else:
                self._close(branch, "eos")
            return
        if not is_trunk and not branch.open_blocks:
            if token == forced.closer:
                self._append(branch, token)
                self._end(branch)
                return
            if token in forced.enders:
                self._close(branch, forced.enders[token])
                return
        if token == forced.opener and not is_trunk and not self._may_open(branch):
            self._close(branch, "length")
            return
        self._append(branch, token)
        if token == forced.fork and self._fork(branch):
            return
        self._check_budget(branch)

    def _foresee(self, branch: Branch) -> None:
        """Note from which position on the branch's budget must be looked at; tags may open blocks, so after each."""
        limits = self.limits
        branch.checked_from = 0
        if limits.budget == "positions" and (branch.parent is None or limits.branch_max_new_tokens is None):
            end = self.prompt_end + limits.max_new_tokens
            branch.checked_from = end - 1 - (branch.reserve + 2 * branch.open_blocks if branch.parent else 0)

    def _append(self, branch: Branch, token: int, step: int | None = None) -> None:
        placement = branch.builder.feed(token, step)
        branch.last_slot = len(self.tokens)
        branch.contents.append(branch.last_slot)
        self.tokens.append(token)
        self.segments.append(placement.segment)
        self.positions.append(placement.position)
        self.token_branches.append(branch)

    def _append_all(self, branch: Branch, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._append(branch, token)

    def _visible_ids(self, branch: Branch) -> list[int]:
        for column in range(self._tokens_sorted, len(self.tokens)):
            self._segment_tokens.setdefault(self.segments[column], []).append(self.tokens[column])
        self._tokens_sorted = len(self.tokens)
        if len(self._segment_order) != len(self._segment_tokens):
            # That of the text: numbers tell which branch began first, which is a matter of the schedule.
            self._segment_order = list(dict.fromkeys(self.segments[column] for column in self.slots_in_text_order()))
        seen, ids = self.graph.closure[branch.builder.cur], list(self._padding)
        for segment in self._segment_order:
            if seen >> segment & 1:
                ids += self._segment_tokens[segment]
        return ids

    # Budget

    def _left(self, branch: Branch) -> int:
        """Positions that a branch may still fill."""
        if self.limits.budget == "tokens":
            return self.limits.max_new_tokens - self.num_generated_tokens
        return self.prompt_end + self.limits.max_new_tokens - branch.position

    def _check_budget(self, branch: Branch) -> None:
        """End a branch that has no room for one more token and what must follow it."""
        self._foresee(branch)
        if branch.parent is None:
            if self._left(branch) <= 0:
                self._finish("length")
        elif (
            self.limits.branch_max_new_tokens is not None
            and branch.num_sampled_tokens >= self.limits.branch_max_new_tokens
        ):
            self._close(branch, "branch_max_new_tokens")
        elif self.limits.budget == "positions" and self._left(branch) <= branch.reserve + 2 * branch.open_blocks:
            self._close(branch, "length")

    def _may_open(self, branch: Branch) -> bool:
        """True when there is room for a tag that opens a block, and for those that close it."""
        if self.limits.budget == "tokens":
            return self._spendable() >= len(self.active_branches) + 2
        return self._left(branch) > 2 + branch.reserve + 2 * branch.open_blocks

    def _own_closing(self, branch: Branch) -> int:
        """Tokens that end a branch, apart from those above it."""
        return 2 * branch.open_blocks + 1 + len(self.forced.separator) if branch.parent is not None else 0

    def _spendable(self) -> int:
        """Of a budget of tokens, what is left once all that is open has been closed."""
        waiting = sum(len(self.forced.join) + self._own_closing(fork.parent) for fork in self._forks)
        closing = sum(self._own_closing(branch) for branch in self.active_branches)
        return self.limits.max_new_tokens - self.num_generated_tokens - waiting - closing

    def _spend(self) -> None:
        """Close all branches when there are not enough tokens for one more of each."""
        branches = [branch for branch in self.active_branches if branch.parent is not None]
        if branches and self._spendable() < len(self.active_branches):
            for branch in branches:
                self._close(branch, "length")

    # Ends

    def _end(self, branch: Branch) -> None:
        """A branch whose closing tag was written: the separator belongs to it, and nothing else."""
        self._append_all(branch, self.forced.separator)
        branch.state = BranchState.DONE
        self.active_branches.remove(branch)
        self._changed = True

    def _close(self, branch: Branch, reason: str) -> None:
        """End a branch in the model's place."""
        branch.finish_reason = reason
        while branch.open_blocks:
            self._append_all(branch, self.forced.closing(branch.builder.in_path))
        self._append(branch, self.forced.closer)
        self._end(branch)

    def _finish(self, reason: str) -> None:
        self.finish_reason = self.root.finish_reason = reason
        self.root.state = BranchState.DONE
        self.active_branches = []

    # Forks

    def _take_up_prompt(self, prompt: np.ndarray) -> None:
        """Fork at once when the prompt ends where branches begin, white space aside."""
        builder, forced = self.root.builder, self.forced
        control = np.flatnonzero(np.isin(prompt, list(forced.control)))
        if not len(control):
            return
        last, tail = int(prompt[control[-1]]), prompt[control[-1] + 1 :].tolist()
        unjoined = forced.execution and last == forced.join[0]
        if unjoined or any(frame.in_path or (frame.tails and not frame.joined) for frame in builder.frames):
            # A trained model has not learnt to write what is forced otherwise.
            builder.warnings.append(
                f"token {len(prompt)}: the prompt ends inside the branches of a block, whose rest is written token by "
                "token, headers included; end a prompt where branches begin, or after they have joined"
            )
        if builder.decode is not None and tail and builder.decode(tail).strip():
            return
        if last == forced.fork:
            self._fork(self.root, separated=bool(tail))
        elif forced.execution and last == forced.execution[0]:
            self._fork_execution(self.root, separated=bool(tail))

    def _fork(self, branch: Branch, separated: bool = False) -> bool:
        """Fork after the token that ends a goal or plan; False, with a warning, where that is refused."""
        builder = branch.builder
        if self.forced.grammar == "medverse":
            if builder.frames or builder.plan_read is self._executed or not builder.plan:
                return False
            if builder.plan_read.repeated:
                return self._refuse(branch, f"step {min(builder.plan_read.repeated)} is planned twice")
            if self._left(branch) <= len(self.forced.separator + self.forced.execution + self.forced.join):
                return self._refuse(branch, f"{self._left(branch)} {self.limits.budget} are left")
            if not separated:
                self._append_all(branch, self.forced.separator)
            self._append_all(branch, self.forced.execution)
            return self._fork_execution(branch)
        frame = builder.frames[-1] if builder.frames else None
        if frame is None or frame.in_path or frame.joined or frame.tails:
            return False
        labels = frame.labels
        if not all(labels) or len(set(labels)) < len(labels) or not labels:
            return self._refuse(branch, f"the outlines are labelled {labels}")
        if builder.depth > self.limits.max_depth:
            return self._refuse(branch, f"blocks are {builder.depth} deep, and max_depth is {self.limits.max_depth}")
        headers = [self.forced.path_header(label) for label in labels]
        if self._left(branch) < max(self.limits.min_fork_budget, self._least(branch, headers)):
            return self._refuse(branch, f"{self._left(branch)} {self.limits.budget} are left")
        if len(self.graph) + len(labels) + 4 * MAX_DEPTH > MAX_SEGMENTS:
            return self._refuse(branch, f"there are {len(self.graph)} segments")
        if not separated:
            self._append_all(branch, self.forced.separator)
        self._split(branch, labels, headers, [[] for _ in labels], self.limits.max_branches)
        return True

    def _fork_execution(self, branch: Branch, separated: bool = True) -> bool:
        """Begin the steps of the plan, once the execution is open; with little budget they run one at a time."""
        builder = branch.builder
        plan = builder.plan_read
        if not builder.frames or not plan.dependencies or plan.repeated:
            return False
        if self._left(branch) <= len(self.forced.join):
            return self._refuse(branch, f"{self._left(branch)} {self.limits.budget} are left")
        if len(self.graph) + len(plan.dependencies) + 4 * MAX_DEPTH > MAX_SEGMENTS:
            return self._refuse(branch, f"there are {len(self.graph)} segments")
        self._executed = plan
        if not separated:
            self._append_all(branch, self.forced.execution[1:])
        schedule = step_schedule(plan, builder.mode)
        numbers = list(schedule)
        place = {number: i for i, number in enumerate(numbers)}
        headers = [self.forced.step_header(number, plan.titles.get(number, "")) for number in numbers]
        needs = [[place[needed] for needed in schedule[number]] for number in numbers]
        scarce = self._left(branch) < self.limits.min_fork_budget
        self._split(branch, numbers, headers, needs, 1 if scarce else self.limits.max_branches)
        return True

    def _refuse(self, branch: Branch, reason: str) -> bool:
        branch.builder.warnings.append(f"column {branch.last_slot}: fork refused, {reason}")
        return False

    def _split(
        self,
        branch: Branch,
        labels: Sequence[str | int],
        headers: list[tuple[int, ...]],
        needs: list[list[int]],
        limit: int,
    ) -> None:
        """Let a branch wait for one branch for each label."""
        reserve = self._reserve_below(branch)
        is_steps = self.forced.grammar == "medverse"
        children = [
            Branch(
                self.row,
                (*branch.path, (branch.blocks, str(label))),
                builder,
                branch,
                self._visible_ids,
                header,
                int(label) if is_steps else None,
                reserve,
            )
            for label, header, builder in zip(labels, headers, branch.builder.fork(labels), strict=True)
        ]
        fork = Fork(branch, children, needs, limit)
        branch.contents.append(fork)
        branch.blocks += 1
        branch.state = BranchState.WAITING
        self.active_branches.remove(branch)
        self._forks.append(fork)
        self._changed = True

    def _reserve_below(self, branch: Branch) -> int:
        """Positions that each branch of `branch` must leave: to end itself, to join, and to end what is above."""
        above = 0
        if branch.parent is not None:  # after the join its open blocks, then the branch itself must be closed
            above = 1 + 2 * (branch.open_blocks - 1) + branch.reserve
        return 1 + len(self.forced.separator) + len(self.forced.join) + above

    def _least(self, branch: Branch, headers: list[tuple[int, ...]]) -> int:
        """The budget without which branches that begin with these headers could not be written to their ends."""
        reserve = self._reserve_below(branch)
        if self.limits.budget == "positions":
            return len(self.forced.separator) + max(map(len, headers)) + 1 + reserve
        held = self._left(branch) - self._spendable()
        each = 2 + len(self.forced.separator)
        return held + len(self.forced.join) + sum(len(header) + each for header in headers) + 2

    def _start_branches(self) -> None:
        """Begin queued branches, those of inner forks first."""
        for fork in reversed(self._forks):
            for index, branch in enumerate(fork.branches):
                if len(self.active_branches) >= self.limits.max_branches:
                    return
                if branch.state is not BranchState.QUEUED:
                    continue
                if any(fork.branches[i].state is BranchState.SKIPPED for i in fork.needs[index]):
                    self._skip(branch)
                elif fork.may_begin(index):
                    self._start(branch, [fork.branches[i] for i in fork.needs[index]])

    def _start(self, branch: Branch, needs: list[Branch]) -> None:
        start = max(above.position for above in (branch, *needs))
        if self.limits.budget == "tokens":
            room = self._spendable() - len(branch.header) - 1 - len(self.forced.separator)
        else:
            room = self.prompt_end + self.limits.max_new_tokens - start - len(branch.header) - branch.reserve
        if room < 1:
            self._skip(branch)
            return
        branch.state = BranchState.ACTIVE
        self.active_branches.append(branch)
        self._append(branch, branch.header[0], branch.step)
        self._append_all(branch, branch.header[1:])
        self._foresee(branch)

    def _skip(self, branch: Branch) -> None:
        branch.state = BranchState.SKIPPED
        branch.finish_reason = "length"
        branch.builder.warnings.append(f"branch {branch.path[-1][1]} was not begun: the budget is spent")
        self._changed = True

    def _join_forks(self) -> None:
        """Let every branch go on whose branches are over."""
        for fork in [fork for fork in self._forks if fork.is_over()]:
            self._forks.remove(fork)
            parent = fork.parent
            for branch in fork.branches:
                if branch.state is BranchState.SKIPPED:
                    parent.builder.warnings.extend(branch.builder.warnings)
            parent.builder.join(branch.builder for branch in fork.branches if branch.state is BranchState.DONE)
            parent.state = BranchState.ACTIVE
            self.active_branches.append(parent)
            self._append_all(parent, self.forced.join)
            self._changed = True
            self._check_budget(parent)
