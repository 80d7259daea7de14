"""Scheduling of one sequence in parallel generation: which branches run, and which tokens each of them gets.

The scheduler works on token ids, on the host and without tensors. Each step of the decoding loop is:

1. `schedule` joins finished forks and starts queued branches. It appends their forced tokens.
2. A forward pass computes the tokens from `num_computed_tokens` on, which the loop then sets to `len(tokens)`.
3. `accept` appends the token sampled for each active branch. A control token may fork or end the branch.

Token i of a sequence is stored in cache slot i, counted from the first slot after the left padding of its batch row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hf_efficient.modeling.topology.generation.branches import Branch, BranchState, Fork, slots_in_text_order
from hf_efficient.modeling.topology.generation.limits import Limits
from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder
from hf_efficient.modeling.topology.grammar.cursor import MAX_DEPTH
from hf_efficient.modeling.topology.grammar.forced_text import ForcedText
from hf_efficient.modeling.topology.grammar.plan import Plan, step_schedule
from hf_efficient.modeling.topology.grammar.segment_graph import MAX_SEGMENTS, bitmap_bytes


class SequenceScheduler:
    """Tokens of one sequence in the order in which they were written, and its branches.

    Args:
        row: batch row.
        prompt: ids without padding.
        builder: a new, lenient builder (`strict=False`).
        forced: the grammar's forced tokens.
        limits: limits of the sequence.
        padding: ids of the left padding, which transformers' logits processors see before the prompt.

    Attributes:
        tokens, segments, positions: id, segment and position of the token in each cache slot.
        token_branches: the branch that wrote each token after the prompt.
        num_computed_tokens: tokens whose keys and values a forward pass has computed, or computes now.
        active_branches: branches that sample a token after the next forward pass.
        trunk: the branch that contains all others.
        finish_reason: why the sequence ended, or an empty text while it runs.
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
        self.prompt_end = max(self.graph.end) + 1  # position after the prompt
        # Every other token is text: it only needs to be appended.
        self._special_ids = forced.control_ids | set(limits.eos_ids)
        self.trunk = Branch(row, (), builder, None, self._visible_ids)
        self.trunk.state = BranchState.ACTIVE
        self.trunk.last_slot = self.prompt_length - 1
        self.active_branches = [self.trunk]
        self._padding = list(padding)
        self._segment_tokens: dict[int, list[int]] = {}  # ids of each segment's tokens
        self._num_grouped_tokens = 0  # tokens that `_segment_tokens` contains
        self._segments_in_text_order: list[int] = []
        self._forks: list[Fork] = []  # unfinished forks, the innermost last
        self._needs_scheduling = False
        self._executed_plan: Plan | None = None  # each plan is executed at most once
        self._fork_at_prompt_end(np.asarray(prompt, dtype=np.int64))

    # Interface of the decoding loop

    def slots_in_text_order(self) -> Iterator[int]:
        """All cache slots in the order of the text."""
        yield from range(self.prompt_length)
        yield from slots_in_text_order(self.trunk)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens after the prompt, including forced ones."""
        return len(self.tokens) - self.prompt_length

    @property
    def critical_path(self) -> int:
        """Number of positions after the prompt: the length of the longest chain of tokens."""
        return max(self.graph.end) + 1 - self.prompt_end

    def bitmaps(self, segments: Sequence[int], words: int) -> bytes:
        """Bitmap of the segments that each of `segments` sees: `words` little-endian 64-bit integers for each."""
        closure = self.graph.closure
        return bitmap_bytes([closure[segment] for segment in segments], words)

    def accept(self, tokens: Sequence[int]) -> None:
        """Append the sampled token of each active branch, in the order of `active_branches`."""
        special = self._special_ids
        for branch, token in zip(list(self.active_branches), tokens, strict=True):
            branch.num_sampled_tokens += 1
            if token in special:
                self._accept_special(branch, token)
                continue
            self._append(branch, token)
            if self.positions[-1] >= branch.budget_check_position:
                self._check_budget(branch)

    def stop(self, branch: Branch, reason: str) -> None:
        """End an active branch; stopping the trunk ends the sequence."""
        if branch.is_trunk:
            self._finish_sequence(reason)
        else:
            self._close_branch(branch, reason)

    def stop_all(self, reason: str) -> None:
        """End the sequence: close all branches and join them, and skip the queued ones."""
        while self.active_branches and not self.finish_reason:
            for branch in list(self.active_branches):
                self.stop(branch, reason)
            for fork in self._forks:
                for branch in fork.branches:
                    if branch.state is BranchState.QUEUED:
                        branch.state = BranchState.SKIPPED
            self.schedule()

    def schedule(self) -> None:
        """Join finished forks and start queued branches, until neither is possible."""
        while not self.finish_reason:
            if self.limits.budget == "tokens":
                self._enforce_token_budget()
            if not self._needs_scheduling:
                return
            self._needs_scheduling = False
            self._join_finished_forks()
            self._start_queued_branches()

    # Tokens

    def _accept_special(self, branch: Branch, token: int) -> None:
        """Append a sampled control or EOS token and act on it: end the branch, close it or fork it."""
        forced = self.forced
        if token in self.limits.eos_ids:
            if branch.is_trunk:
                self._append(branch, token)
                self._finish_sequence("eos")
            else:
                self._close_branch(branch, "eos")
            return
        if not branch.is_trunk and not branch.open_blocks:
            if token == forced.close_id:
                self._append(branch, token)
                self._end_branch(branch)
                return
            if token in forced.invalid_in_branch:
                self._close_branch(branch, forced.invalid_in_branch[token])
                return
        if token == forced.open_id and not branch.is_trunk and not self._can_open_block(branch):
            self._close_branch(branch, "length")
            return
        self._append(branch, token)
        if token == forced.fork_id and self._fork(branch):
            return
        self._check_budget(branch)

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
        for slot in range(self._num_grouped_tokens, len(self.tokens)):
            self._segment_tokens.setdefault(self.segments[slot], []).append(self.tokens[slot])
        self._num_grouped_tokens = len(self.tokens)
        if len(self._segments_in_text_order) != len(self._segment_tokens):
            # Not in the order of their numbers, which depends on when each branch was started.
            self._segments_in_text_order = list(
                dict.fromkeys(self.segments[slot] for slot in self.slots_in_text_order())
            )
        visible, ids = self.graph.closure[branch.builder.segment], list(self._padding)
        for segment in self._segments_in_text_order:
            if visible >> segment & 1:
                ids += self._segment_tokens[segment]
        return ids

    # Budget

    def _remaining_budget(self, branch: Branch) -> int:
        """Positions that a branch may still fill, or tokens that the sequence may still write."""
        if self.limits.budget == "tokens":
            return self.limits.max_new_tokens - self.num_generated_tokens
        return self.prompt_end + self.limits.max_new_tokens - branch.position

    def _check_budget(self, branch: Branch) -> None:
        """End a branch when its budget does not suffice for another token and the reserved ones after it."""
        self._update_budget_check_position(branch)
        if branch.is_trunk:
            if self._remaining_budget(branch) <= 0:
                self._finish_sequence("length")
        elif (
            self.limits.branch_max_new_tokens is not None
            and branch.num_sampled_tokens >= self.limits.branch_max_new_tokens
        ):
            self._close_branch(branch, "branch_max_new_tokens")
        elif (
            self.limits.budget == "positions"
            and self._remaining_budget(branch) <= branch.reserve + 2 * branch.open_blocks
        ):
            self._close_branch(branch, "length")

    def _update_budget_check_position(self, branch: Branch) -> None:
        """Skip budget checks while text alone cannot use up the budget; a control token changes `open_blocks`."""
        limits = self.limits
        branch.budget_check_position = 0
        if limits.budget == "positions" and (branch.is_trunk or limits.branch_max_new_tokens is None):
            reserved = 0 if branch.is_trunk else branch.reserve + 2 * branch.open_blocks
            branch.budget_check_position = self.prompt_end + limits.max_new_tokens - 1 - reserved

    def _can_open_block(self, branch: Branch) -> bool:
        """True when the budget suffices for a control token that opens a block and those that close it."""
        if self.limits.budget == "tokens":
            return self._unreserved_tokens() >= len(self.active_branches) + 2
        return self._remaining_budget(branch) > 2 + branch.reserve + 2 * branch.open_blocks

    def _closing_tokens(self, branch: Branch) -> int:
        """Number of tokens that close a branch, without those that close the branches above it."""
        return 0 if branch.is_trunk else 2 * branch.open_blocks + 1 + len(self.forced.separator_ids)

    def _unreserved_tokens(self) -> int:
        """Tokens of a token budget that remain after everything open has been closed."""
        joins = sum(len(self.forced.join_ids) + self._closing_tokens(fork.parent) for fork in self._forks)
        closing = sum(self._closing_tokens(branch) for branch in self.active_branches)
        return self.limits.max_new_tokens - self.num_generated_tokens - joins - closing

    def _enforce_token_budget(self) -> None:
        """Close all branches when the tokens do not suffice for another one in each."""
        branches = [branch for branch in self.active_branches if not branch.is_trunk]
        if branches and self._unreserved_tokens() < len(self.active_branches):
            for branch in branches:
                self._close_branch(branch, "length")

    # Ends

    def _end_branch(self, branch: Branch) -> None:
        """End a branch after its closing token: append the separator, which belongs to the branch."""
        self._append_all(branch, self.forced.separator_ids)
        branch.state = BranchState.DONE
        self.active_branches.remove(branch)
        self._needs_scheduling = True

    def _close_branch(self, branch: Branch, reason: str) -> None:
        """Force the tokens that close a branch and its open blocks."""
        branch.finish_reason = reason
        while branch.open_blocks:
            self._append_all(branch, self.forced.close_block_ids(branch.builder.in_path))
        self._append(branch, self.forced.close_id)
        self._end_branch(branch)

    def _finish_sequence(self, reason: str) -> None:
        self.finish_reason = self.trunk.finish_reason = reason
        self.trunk.state = BranchState.DONE
        self.active_branches = []

    # Forks

    def _fork_at_prompt_end(self, prompt: np.ndarray) -> None:
        """Fork the trunk when the prompt ends where branches begin; white space may follow."""
        builder, forced = self.trunk.builder, self.forced
        control = np.flatnonzero(np.isin(prompt, list(forced.control_ids)))
        if not len(control):
            return
        last, tail = int(prompt[control[-1]]), prompt[control[-1] + 1 :].tolist()
        unjoined = forced.execution_ids and last == forced.join_ids[0]
        if unjoined or any(frame.in_path or (frame.path_ends and not frame.joined) for frame in builder.frames):
            # A trained model never writes the forced tokens itself, so it continues such a prompt badly.
            builder.warnings.append(
                f"token {len(prompt)}: the prompt ends inside the branches of a block; the block's rest is decoded "
                "sequentially, without forced headers; end a prompt where branches begin, or after they have joined"
            )
        if builder.decode is not None and tail and builder.decode(tail).strip():
            return
        if last == forced.fork_id:
            self._fork(self.trunk, separated=bool(tail))
        elif forced.execution_ids and last == forced.execution_ids[0]:
            self._fork_execution(self.trunk, separated=bool(tail))

    def _fork(self, branch: Branch, separated: bool = False) -> bool:
        """Fork a branch after `</Goal>` or `</Plan>`; False when there is nothing to fork or it is refused.

        Args:
            separated: the separator is already written.
        """
        forced, builder = self.forced, branch.builder
        remaining = self._remaining_budget(branch)
        if forced.grammar == "medverse":
            if builder.frames or builder.parsed_plan is self._executed_plan or not builder.plan:
                return False
            if builder.parsed_plan.repeated:
                return self._refuse_fork(branch, f"step {min(builder.parsed_plan.repeated)} is planned twice")
            if remaining <= len(forced.separator_ids + forced.execution_ids + forced.join_ids):
                return self._refuse_fork(branch, f"{remaining} {self.limits.budget} are left")
            if not separated:
                self._append_all(branch, forced.separator_ids)
            self._append_all(branch, forced.execution_ids)
            return self._fork_execution(branch)
        frame = builder.frame
        if frame is None or frame.in_path or frame.joined or frame.path_ends:
            return False
        labels = frame.outline_labels
        if not all(labels) or len(set(labels)) < len(labels) or not labels:
            return self._refuse_fork(branch, f"the outlines are labelled {labels}")
        if builder.depth > self.limits.max_depth:
            return self._refuse_fork(
                branch, f"blocks are {builder.depth} deep, and max_depth is {self.limits.max_depth}"
            )
        headers = [forced.path_header(label) for label in labels]
        if remaining < max(self.limits.min_fork_budget, self._required_budget(branch, headers)):
            return self._refuse_fork(branch, f"{remaining} {self.limits.budget} are left")
        if not self._has_segments_for(len(labels)):
            return self._refuse_fork(branch, f"there are {len(self.graph)} segments")
        if not separated:
            self._append_all(branch, forced.separator_ids)
        self._create_fork(branch, labels, headers, [[] for _ in labels], self.limits.max_branches)
        return True

    def _fork_execution(self, branch: Branch, separated: bool = True) -> bool:
        """Fork a branch into the steps of its plan after `<Execution>`; False when there is no plan or it is refused.

        With less than `min_fork_budget` left, the steps run one at a time.
        """
        builder = branch.builder
        plan = builder.parsed_plan
        if not builder.frames or not plan.dependencies or plan.repeated:
            return False
        if self._remaining_budget(branch) <= len(self.forced.join_ids):
            return self._refuse_fork(branch, f"{self._remaining_budget(branch)} {self.limits.budget} are left")
        if not self._has_segments_for(len(plan.dependencies)):
            return self._refuse_fork(branch, f"there are {len(self.graph)} segments")
        self._executed_plan = plan
        if not separated:
            self._append_all(branch, self.forced.execution_ids[1:])
        schedule = step_schedule(plan, builder.mode)
        numbers = list(schedule)
        index = {number: i for i, number in enumerate(numbers)}
        headers = [self.forced.step_header(number, plan.titles.get(number, "")) for number in numbers]
        dependencies = [[index[other] for other in schedule[number]] for number in numbers]
        is_scarce = self._remaining_budget(branch) < self.limits.min_fork_budget
        self._create_fork(branch, numbers, headers, dependencies, 1 if is_scarce else self.limits.max_branches)
        return True

    def _has_segments_for(self, branches: int) -> bool:
        """True when a fork leaves enough of `MAX_SEGMENTS` for the joins of nested blocks."""
        return len(self.graph) + branches + 4 * MAX_DEPTH <= MAX_SEGMENTS

    def _refuse_fork(self, branch: Branch, reason: str) -> bool:
        branch.builder.warnings.append(f"token {branch.last_slot}: fork refused, {reason}")
        return False

    def _create_fork(
        self,
        branch: Branch,
        labels: Sequence[str | int],
        headers: list[tuple[int, ...]],
        dependencies: list[list[int]],
        max_active: int,
    ) -> None:
        """Queue one child for each label and let the branch wait for them; arguments as of `Fork`."""
        reserve = self._reserve_of_children(branch)
        is_step = self.forced.grammar == "medverse"
        children = [
            Branch(
                self.row,
                (*branch.path, (branch.num_forks, str(label))),
                builder,
                branch,
                self._visible_ids,
                header,
                int(label) if is_step else None,
                reserve,
            )
            for label, header, builder in zip(labels, headers, branch.builder.fork(labels), strict=True)
        ]
        fork = Fork(branch, children, dependencies, max_active)
        branch.contents.append(fork)
        branch.num_forks += 1
        branch.state = BranchState.WAITING
        self.active_branches.remove(branch)
        self._forks.append(fork)
        self._needs_scheduling = True

    def _reserve_of_children(self, branch: Branch) -> int:
        """Positions that each child of `branch` reserves: for its own end, the join, and the ends of those above."""
        above = 0
        if not branch.is_trunk:  # after the join, the branch's open blocks and then the branch itself must be closed
            above = 1 + 2 * (branch.open_blocks - 1) + branch.reserve
        return 1 + len(self.forced.separator_ids) + len(self.forced.join_ids) + above

    def _required_budget(self, branch: Branch, headers: list[tuple[int, ...]]) -> int:
        """Smallest remaining budget with which children with these headers can all be closed and joined."""
        reserve = self._reserve_of_children(branch)
        if self.limits.budget == "positions":
            return len(self.forced.separator_ids) + max(map(len, headers)) + 1 + reserve
        reserved = self._remaining_budget(branch) - self._unreserved_tokens()
        per_child = 2 + len(self.forced.separator_ids)
        return reserved + len(self.forced.join_ids) + sum(len(header) + per_child for header in headers) + 2

    def _start_queued_branches(self) -> None:
        """Start queued branches up to `max_branches`, those of inner forks first."""
        for fork in reversed(self._forks):
            for index, branch in enumerate(fork.branches):
                if len(self.active_branches) >= self.limits.max_branches:
                    return
                if branch.state is not BranchState.QUEUED:
                    continue
                dependencies = [fork.branches[i] for i in fork.dependencies[index]]
                if any(other.state is BranchState.SKIPPED for other in dependencies):
                    self._skip(branch)
                elif fork.can_start(index):
                    self._start(branch, dependencies)

    def _start(self, branch: Branch, dependencies: list[Branch]) -> None:
        """Append the header of a branch and make it active, or skip it when its budget is too small."""
        start = max(other.position for other in (branch, *dependencies))
        if self.limits.budget == "tokens":
            room = self._unreserved_tokens() - len(branch.header) - 1 - len(self.forced.separator_ids)
        else:
            room = self.prompt_end + self.limits.max_new_tokens - start - len(branch.header) - branch.reserve
        if room < 1:
            self._skip(branch)
            return
        branch.state = BranchState.ACTIVE
        self.active_branches.append(branch)
        self._append(branch, branch.header[0], branch.step)
        self._append_all(branch, branch.header[1:])
        self._update_budget_check_position(branch)

    def _skip(self, branch: Branch) -> None:
        branch.state = BranchState.SKIPPED
        branch.finish_reason = "length"
        branch.builder.warnings.append(f"branch {branch.path[-1][1]} was not started: the budget is used up")
        self._needs_scheduling = True

    def _join_finished_forks(self) -> None:
        """Append the join of each finished fork to its parent and make the parent active."""
        for fork in [fork for fork in self._forks if fork.is_finished()]:
            self._forks.remove(fork)
            parent = fork.parent
            for branch in fork.branches:
                if branch.state is BranchState.SKIPPED:
                    parent.builder.warnings.extend(branch.builder.warnings)
            parent.builder.join(branch.builder for branch in fork.branches if branch.state is BranchState.DONE)
            parent.state = BranchState.ACTIVE
            self.active_branches.append(parent)
            self._append_all(parent, self.forced.join_ids)
            self._needs_scheduling = True
            self._check_budget(parent)
