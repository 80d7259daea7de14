"""Scheduling of one sequence in parallel generation: which branches run, and which tokens each of them gets.

The scheduler works on token ids, on the host and without tensors. Each step of the decoding loop is:

1. `schedule` joins finished forks and starts queued branches. It appends their forced tokens.
2. A forward pass computes the tokens from `num_computed_tokens` on, which the loop then sets to `len(tokens)`.
3. `accept` appends the token sampled for each active branch. A control token may fork or end the branch.

Token i of a sequence is stored in cache slot i, counted from the first slot after the left padding of its batch row.

Terms:

- control token: a tag that is one token of the vocabulary, such as `<Path>`; all others except EOS are ordinary tokens.
- forced token: a token that the scheduler appends without sampling: headers (`<Path>` and a label, `<Step>` and a
  title), closing tags of truncated branches, separators (white space), and the control tokens of a join.
- segment: a run of consecutive tokens. A token may attend to the tokens before it in its own segment and to all tokens
  of the segment's ancestors in the graph of segments.
- branch: a part of the sequence that is decoded in parallel with its siblings: a Multiverse path or a MedVerse step.
  The trunk is the root branch: it has no parent, and all other branches descend from it.
- fork: a branch stops sampling and waits for its child branches. Join: when they are done, the parent goes on in a
  segment whose parents are the last segments of all children.
- block: a group of parallel branches in the text: `<Parallel>` … `</Parallel>` of Multiverse, which may be nested in a
  path, or `<Execution>` … `</Execution>` of MedVerse. A block is open until its closing tag.
- active: a branch that samples a token in the next step. Queued: a child that has not started. Skipped: a child that
  never starts, because its budget is too small or the sequence is stopped. Done: ended with its closing tag.
- reserve: positions that a branch keeps free for forced tokens: its own closing tag and separator, and the joins and
  closing tags of the branches above it.
- left padding: ids before the prompt that make all rows of a batch equally long; they are no tokens of the sequence.
- budget: `max_new_tokens`, counted in rotary positions after the prompt or in tokens; see `Limits`. A position is
  shared by parallel branches, so the number of positions is the length of the longest dependency path of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_efficient.modeling.topology.generation.branches import Branch, BranchState, Fork
from hf_efficient.modeling.topology.generation.limits import Limits
from hf_efficient.modeling.topology.generation.sequence_state import SequenceState
from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder
from hf_efficient.modeling.topology.grammar.forced_text import ForcedText
from hf_efficient.modeling.topology.grammar.plan import Plan, step_schedule


class SequenceScheduler(SequenceState):
    """Decides which branches of one sequence run, and appends their sampled and forced tokens.

    The attributes are those of `SequenceState`. If the prompt ends where branches begin, the constructor forks the
    trunk, unless the fork is rejected (see `_fork`); call `schedule` to start the branches.

    Args:
        row: batch row.
        prompt: token ids [P] of the prompt, without left padding.
        builder: a new builder with `strict=False`, which assigns a segment and a position to each token.
        forced: the forced tokens of the builder's grammar, as ids.
        limits: the budget and the limits of branches.
        padding: ids of the left padding. They are only part of the ids that logits processors and stopping criteria
            receive.

    Raises:
        UsageError: `prompt` does not consist of integers.
        TopologyError: the tokenizer encodes the control token of a forced header as another id.
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
        super().__init__(row, prompt, builder, forced, limits, padding)
        # Ordinary tokens only need to be appended; these may change the state of their branch.
        self._special_ids = forced.control_ids | set(limits.eos_ids)
        self._needs_scheduling = False
        self._executed_plan: Plan | None = None  # each plan is executed at most once
        self._fork_at_prompt_end(np.asarray(prompt, dtype=np.int64))

    # Interface of the decoding loop

    def accept(self, tokens: Sequence[int]) -> None:
        """Append the sampled token of each active branch and act on control tokens and exhausted budgets.

        This may fork or end branches, append forced tokens and finish the sequence. Call `schedule` afterwards.

        Args:
            tokens: a token id for each branch, in the order of `active_branches`.

        Raises:
            ValueError: the number of tokens is not that of the active branches.
            TopologyError: the tokenizer encodes the control token of a forced header as another id.
        """
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
        """End an active branch with the given finish reason; stopping the trunk ends the sequence.

        A branch other than the trunk is closed with forced tokens, so that its fork can join at the next `schedule`.

        Args:
            branch: one of `active_branches`.
            reason: its finish reason; for the trunk also that of the sequence.
        """
        if branch.is_trunk:
            self._finish_sequence(reason)
        else:
            self._close_branch(branch, reason)

    def stop_all(self, reason: str) -> None:
        """End the sequence: close and join all active branches with forced tokens, and skip the queued ones.

        It does nothing if the sequence is finished. Skipped branches get no finish reason.

        Args:
            reason: finish reason of the sequence and of each branch that is closed. A branch whose budget the join
                tokens of its children exhaust gets `length` or `branch_max_new_tokens` instead, the sequence `length`.
        """
        while self.active_branches and not self.finish_reason:
            for branch in list(self.active_branches):
                self.stop(branch, reason)
            for fork in self._forks:
                for branch in fork.branches:
                    if branch.state is BranchState.QUEUED:
                        branch.state = BranchState.SKIPPED
            self.schedule()

    def schedule(self) -> None:
        """Join finished forks and start queued branches, appending their forced tokens, until neither is possible.

        With a token budget, first close all branches except the trunk if the budget does not suffice for another token
        in each. A join may exhaust the budget and so finish the sequence. It does nothing if the sequence is finished.
        """
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
        """Act on a sampled control or EOS token: end, close or fork the branch, or finish the sequence.

        The token itself is appended, except in a branch other than the trunk where it is EOS, is invalid there or
        opens a block that the budget cannot hold: the branch is then closed with forced tokens instead.

        Args:
            branch: an active branch.
            token: id of a control token or EOS.

        Raises:
            TopologyError: the tokenizer encodes the control token of a forced header as another id.
        """
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

    # Budget

    def _check_budget(self, branch: Branch) -> None:
        """End a branch if the budget cannot hold one more token plus the closing tokens after it.

        The trunk needs no closing tokens: it finishes the sequence when the budget is exhausted. The token budget of
        other branches is enforced in `schedule`. Updates `branch.budget_check_position`.
        """
        self._update_budget_check_position(branch)
        if branch.is_trunk:
            if self._remaining_budget(branch) <= 0:
                self._finish_sequence("length")
        elif (
            self.limits.branch_max_new_tokens is not None
            and branch.num_sampled_tokens >= self.limits.branch_max_new_tokens
        ):
            self._close_branch(branch, "branch_max_new_tokens")
        elif self.limits.budget == "positions" and self._remaining_budget(branch) <= self._reserved_positions(branch):
            self._close_branch(branch, "length")

    def _update_budget_check_position(self, branch: Branch) -> None:
        """Set `branch.budget_check_position`: `accept` checks the budget for tokens at this position or later.

        Before it, ordinary tokens cannot exhaust a budget of positions, so `accept` skips the check. With a token
        budget, or with `branch_max_new_tokens` for a branch other than the trunk, the value is 0: the budget is checked
        after every token. Call this again after each control token, since it may change the number of open blocks and
        so the reserved positions.
        """
        limits = self.limits
        branch.budget_check_position = 0
        if limits.budget == "positions" and (branch.is_trunk or limits.branch_max_new_tokens is None):
            # The first token after which no more than the reserved positions are left. Hence - 1: the budget is
            # compared with the position of the next token, which is one more than that of the appended token.
            end = self.prompt_end + limits.max_new_tokens
            branch.budget_check_position = end - self._reserved_positions(branch) - 1

    def _enforce_token_budget(self) -> None:
        """Close all active branches except the trunk if the token budget does not suffice for another token in each.

        Their finish reason is `length`.
        """
        branches = [branch for branch in self.active_branches if not branch.is_trunk]
        if branches and self._unreserved_tokens() < len(self.active_branches):
            for branch in branches:
                self._close_branch(branch, "length")

    # Ends

    def _end_branch(self, branch: Branch) -> None:
        """Mark an active branch as done after its closing tag, and append the separator, which belongs to it.

        The branch is removed from `active_branches`; the next `schedule` looks for forks to join.
        """
        self._append_all(branch, self.forced.separator_ids)
        branch.state = BranchState.DONE
        self.active_branches.remove(branch)
        self._needs_scheduling = True

    def _close_branch(self, branch: Branch, reason: str) -> None:
        """End a branch by appending the forced tokens that close its open blocks and itself, and the separator.

        Args:
            branch: an active branch other than the trunk.
            reason: its finish reason.
        """
        branch.finish_reason = reason
        while branch.open_blocks:
            self._append_all(branch, self.forced.close_block_ids(branch.builder.in_path))
        self._append(branch, self.forced.close_id)
        self._end_branch(branch)

    def _finish_sequence(self, reason: str) -> None:
        """End the trunk and with it the sequence; no branch is active afterwards."""
        self.finish_reason = self.trunk.finish_reason = reason
        self.trunk.state = BranchState.DONE
        self.active_branches = []

    # Forks

    def _fork_at_prompt_end(self, prompt: np.ndarray) -> None:
        """Fork the trunk if the prompt ends where branches begin: after `</Goal>`, `</Plan>` or `<Execution>`.

        Only white space may follow the control token; without `builder.decode` the text after it is not checked. The
        trunk stays active if the fork is rejected. A prompt that ends inside the branches of a block is continued
        without forks in that block, with a warning.

        Args:
            prompt: int64 [P], ids without padding.

        Raises:
            TopologyError: as for `_fork`.
        """
        builder, forced = self.trunk.builder, self.forced
        control = np.flatnonzero(np.isin(prompt, list(forced.control_ids)))
        if not len(control):
            return
        last, tail = int(prompt[control[-1]]), prompt[control[-1] + 1 :].tolist()
        unjoined = forced.execution_ids and last == forced.join_ids[0]
        if unjoined or any(frame.in_path or (frame.path_ends and not frame.joined) for frame in builder.frames):
            # By default forced tokens have no loss in training, so a model that must sample them itself does it badly.
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
        """Fork a branch after `</Goal>` or `</Plan>`: append the forced separator and queue the child branches.

        Args:
            branch: an active branch whose last control token was `</Goal>` or `</Plan>`.
            separated: the separator after that token is already written.

        Returns:
            False if there is nothing to fork, or if the fork is rejected (labels missing or repeated, too little
            budget, too many blocks or segments), which adds a warning. The branch then stays active and the text is
            decoded sequentially; in MedVerse the separator and `<Execution>` may have been appended already.

        Raises:
            TopologyError: the tokenizer encodes the control token of a forced header as another id.
        """
        forced, builder = self.forced, branch.builder
        remaining = self._remaining_budget(branch)
        if forced.grammar == "medverse":
            if builder.frames or builder.parsed_plan is self._executed_plan or not builder.plan:
                return False
            if builder.parsed_plan.repeated:
                return self._reject_fork(branch, f"step {min(builder.parsed_plan.repeated)} is planned twice")
            if remaining <= len(forced.separator_ids + forced.execution_ids + forced.join_ids):
                return self._reject_fork(branch, f"{remaining} {self.limits.budget} are left")
            if not separated:
                self._append_all(branch, forced.separator_ids)
            self._append_all(branch, forced.execution_ids)
            return self._fork_execution(branch)
        frame = builder.frame
        if frame is None or frame.in_path or frame.joined or frame.path_ends:
            return False
        labels = frame.outline_labels
        if not all(labels) or len(set(labels)) < len(labels) or not labels:
            return self._reject_fork(branch, f"the outlines are labelled {labels}")
        if builder.depth > self.limits.max_depth:
            return self._reject_fork(
                branch, f"blocks are {builder.depth} deep, and max_depth is {self.limits.max_depth}"
            )
        headers = [forced.path_header(label) for label in labels]
        if remaining < max(self.limits.min_fork_budget, self._required_budget(branch, headers)):
            return self._reject_fork(branch, f"{remaining} {self.limits.budget} are left")
        if not self._has_segments_for(len(labels)):
            return self._reject_fork(branch, f"there are {len(self.graph)} segments")
        if not separated:
            self._append_all(branch, forced.separator_ids)
        self._create_fork(branch, labels, headers, [[] for _ in labels], self.limits.max_branches)
        return True

    def _fork_execution(self, branch: Branch, separated: bool = True) -> bool:
        """Fork a branch into the steps of its MedVerse plan after `<Execution>`: queue a child branch for each step.

        With less than `min_fork_budget` left, the steps run one at a time.

        Args:
            branch: an active branch whose last control token was `<Execution>`.
            separated: the separator after `<Execution>` is already written.

        Returns:
            False if no execution is open, if there is no plan or it repeats a step, or if the fork is rejected for lack
            of budget or segments, which adds a warning. The branch then stays active.

        Raises:
            TopologyError: as for `_fork`.
        """
        builder = branch.builder
        plan = builder.parsed_plan
        if not builder.frames or not plan.dependencies or plan.repeated:
            return False
        if self._remaining_budget(branch) <= len(self.forced.join_ids):
            return self._reject_fork(branch, f"{self._remaining_budget(branch)} {self.limits.budget} are left")
        if not self._has_segments_for(len(plan.dependencies)):
            return self._reject_fork(branch, f"there are {len(self.graph)} segments")
        self._executed_plan = plan
        if not separated:
            self._append_all(branch, self.forced.execution_ids[1:])
        schedule = step_schedule(plan, builder.mode)
        numbers = list(schedule)
        index = {number: i for i, number in enumerate(numbers)}
        headers = [self.forced.step_header(number, plan.titles.get(number, "")) for number in numbers]
        dependencies = [[index[other] for other in schedule[number]] for number in numbers]
        low_budget = self._remaining_budget(branch) < self.limits.min_fork_budget
        self._create_fork(branch, numbers, headers, dependencies, 1 if low_budget else self.limits.max_branches)
        return True

    def _reject_fork(self, branch: Branch, reason: str) -> bool:
        """Add a warning that the branch was not forked, and return False."""
        branch.builder.warnings.append(f"token {branch.last_slot}: fork rejected, {reason}")
        return False

    def _create_fork(
        self,
        branch: Branch,
        labels: Sequence[str | int],
        headers: list[tuple[int, ...]],
        dependencies: list[list[int]],
        max_active: int,
    ) -> None:
        """Queue one child branch for each label and make the branch wait for them.

        No token is appended here: `_start` appends the header of a child. The branch is removed from `active_branches`
        until the join.

        Args:
            branch: the active branch that forks. Its last tokens are those that begin the branches: `</Goal>` or
                `<Execution>`, and a separator.
            labels: different labels of the paths, or numbers of the steps, in the order of the text.
            headers: forced token ids that each child begins with.
            dependencies: for each child, the indices of the children that must be done before it starts.
            max_active: limit of children that are active at the same time.
        """
        reserve = self._reserve_of_children(branch)  # positions that each child keeps free for closing tokens
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

    def _start_queued_branches(self) -> None:
        """Start queued branches whose dependencies are done, those of inner forks first.

        At most `max_branches` branches of the sequence are active, and at most `max_active` children of a fork run. A
        branch whose budget is too small is skipped, and so is one that depends on a skipped one.
        """
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
        """Append the header of a queued branch and make it active, or skip it if its budget is too small.

        Args:
            branch: the queued branch.
            dependencies: the branches that it follows, all of them done.
        """
        start = max(other.position for other in (branch, *dependencies))  # position of its first token
        if self.limits.budget == "tokens":
            remaining = self._unreserved_tokens() - len(branch.header) - 1 - len(self.forced.separator_ids)
        else:
            remaining = self.prompt_end + self.limits.max_new_tokens - start - len(branch.header) - branch.reserve
        if remaining < 1:
            self._skip(branch)
            return
        branch.state = BranchState.ACTIVE
        self.active_branches.append(branch)
        self._append(branch, branch.header[0], branch.step)
        self._append_all(branch, branch.header[1:])
        self._update_budget_check_position(branch)

    def _skip(self, branch: Branch) -> None:
        """Mark a queued branch as skipped because of its budget, and add a warning."""
        branch.state = BranchState.SKIPPED
        branch.finish_reason = "length"
        branch.builder.warnings.append(f"branch {branch.path[-1][1]} was not started: the budget is exhausted")
        self._needs_scheduling = True

    def _join_finished_forks(self) -> None:
        """For each fork whose children are done or skipped, append the forced join tokens to the parent.

        The parent becomes active again, in a segment that follows all children that are done, and takes over their
        warnings. If its budget is exhausted then, it is closed, or the sequence finished if it is the trunk.
        """
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
