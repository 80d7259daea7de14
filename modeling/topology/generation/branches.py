"""Branches of a sequence in parallel generation: the tokens of each, its forks, and its state.

A branch is a part of a sequence that is decoded in parallel with its siblings: a Multiverse path or a MedVerse step.
The trunk is the root branch. At a fork a branch stops sampling and waits for its children; at the join, after all of
them have ended, it goes on. Control tokens (tags such as `<Path>`) mark these points; forced tokens are those that
generation appends without sampling (headers, separators, joins). Branches thus form a tree, whose traversal in
pre-order gives the order of the text: a branch's tokens up to a fork, the children one after another, then the branch's
further tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum

from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder

# Path in the tree from the trunk to a branch: for each fork on the way, its index in its branch (0 for the first) and
# the label of the child that the path enters. () for the trunk; ((0, "2"), (1, "2.1")) for a path inside path 2.
BranchPath = tuple[tuple[int, str], ...]


class BranchState(Enum):
    """State of a branch: queued, then active and possibly waiting in turns, then done; or queued, then skipped."""

    QUEUED = "queued"  # not started: its dependencies are not done, or max_branches are active
    ACTIVE = "active"  # samples tokens
    WAITING = "waiting"  # has forked, and waits for its child branches
    DONE = "done"
    SKIPPED = "skipped"  # never started: the budget was too small, or the sequence was stopped before


class Branch:
    """The trunk of a sequence, or one path or step of it; new branches are `QUEUED`.

    Args:
        row: batch row.
        path: identifies the branch in its sequence; see `BranchPath`.
        builder: state machine that assigns a segment and a position to each token fed to it.
        parent: the branch that forked into this one; None for the trunk.
        visible_ids: function behind the method `visible_ids`.
        header: forced token ids that the branch begins with.
        step: number of a MedVerse step; None for other branches.
        reserve: positions kept free for forced tokens: its closing tag and separator, and the joins and closing tags of
            the branches above it.

    Attributes:
        state: a `BranchState`.
        contents: cache slots of its tokens, and its forks (`Fork`), in the order of the text.
        last_slot: cache slot of its newest token, whose logits give the next token; -1 before the first token.
        num_sampled_tokens: tokens chosen by the sampler; forced tokens do not count.
        num_forks: number of forks so far.
        finish_reason: why it ended without its own closing tag, for the trunk why the sequence ended; otherwise an
            empty string.
        logprobs: log-probability of each sampled token; empty if they are not kept.
        rng_key: key of its random numbers, see `sampling.branch_key`; None until the first is drawn.
        budget_check_position: the scheduler checks the branch's budget after each token at this position or later.
    """

    __slots__ = (
        *("_visible_ids", "budget_check_position", "builder", "contents", "finish_reason", "header", "last_slot"),
        *("logprobs", "num_forks", "num_sampled_tokens", "parent", "path", "reserve", "rng_key", "row", "state"),
        "step",
    )

    def __init__(
        self,
        row: int,
        path: BranchPath,
        builder: TopologyBuilder,
        parent: Branch | None,
        visible_ids: Callable[[Branch], list[int]],
        header: tuple[int, ...] = (),
        step: int | None = None,
        reserve: int = 0,
    ) -> None:
        self.row = row
        self.path = path
        self.builder = builder
        self.parent = parent
        self.header = header
        self.step = step
        self.reserve = reserve
        self.contents: list[int | Fork] = []
        self.last_slot = -1
        self.num_sampled_tokens = 0
        self.num_forks = 0
        self.finish_reason = ""
        self.logprobs: list[float] = []
        self.rng_key: int | None = None
        self.budget_check_position = 0
        self.state = BranchState.QUEUED
        self._visible_ids = visible_ids

    @property
    def is_trunk(self) -> bool:
        """True for the root branch of the sequence."""
        return self.parent is None

    @property
    def position(self) -> int:
        """Rotary position of the next token, unless that token is a control token that starts a new segment."""
        return self.builder.graph.end[self.builder.segment] + 1

    @property
    def open_blocks(self) -> int:
        """Number of blocks (`<Parallel>`, `<Execution>`) that the branch has opened and not closed.

        The block in which the branch is itself a path or step does not count.
        """
        return len(self.builder.frames) - (not self.is_trunk)

    @property
    def context(self) -> str:
        """Where the next token will be, as a key of `ForcedText.disallowed_ids`.

        Returns:
            `outside`: in the trunk, in no block. `branch`: directly in a path or step that was forked. `path`: in a
            path of a block that is decoded sequentially inside this branch. `block`: in such a block, between its
            paths.
        """
        if self.is_trunk and not self.builder.frames:
            return "outside"
        if not self.is_trunk and not self.open_blocks:
            return "branch"
        return "path" if self.builder.in_path else "block"

    def visible_ids(self) -> list[int]:
        """Return the ids of all tokens that the next token may attend to, in the order of the text.

        Ids of the left padding come first.
        """
        return self._visible_ids(self)


class Fork:
    """The child branches of one fork and the order in which they may run.

    Args:
        parent: the branch that forked and waits for the children.
        branches: the children, in the order of the text.
        dependencies: for each child, the indices of the children that must be done before it starts.
        max_active: maximum number of children that run (are active or waiting) at the same time.
    """

    __slots__ = ("branches", "dependencies", "max_active", "parent")

    def __init__(self, parent: Branch, branches: list[Branch], dependencies: list[list[int]], max_active: int) -> None:
        self.parent = parent
        self.branches = branches
        self.dependencies = dependencies
        self.max_active = max_active

    def can_start(self, index: int) -> bool:
        """True if all dependencies of child `index` are done (not skipped) and fewer than `max_active` children run.

        Whether the child itself is still queued is not checked.
        """
        running = sum(branch.state in (BranchState.ACTIVE, BranchState.WAITING) for branch in self.branches)
        return running < self.max_active and all(
            self.branches[i].state is BranchState.DONE for i in self.dependencies[index]
        )

    def is_finished(self) -> bool:
        """True if every child is done or skipped, so that the parent can be continued."""
        return all(branch.state in (BranchState.DONE, BranchState.SKIPPED) for branch in self.branches)


def slots_in_text_order(branch: Branch) -> Iterator[int]:
    """Iterate over the cache slots of a branch and its descendants, in the order of the text."""
    for item in branch.contents:
        if isinstance(item, Fork):
            for child in item.branches:
                yield from slots_in_text_order(child)
        else:
            yield item


def all_branches(branch: Branch) -> Iterator[Branch]:
    """Iterate over a branch and its descendants in pre-order, which is the order of the text."""
    yield branch
    for item in branch.contents:
        if isinstance(item, Fork):
            for child in item.branches:
                yield from all_branches(child)


class TextOrderReader:
    """Reads the cache slots of a tree of branches in the order of the text while the tree is still growing.

    A slot is returned once all tokens before it in the text exist, so an unfinished branch delays its later siblings.

    Args:
        trunk: the root branch.
    """

    def __init__(self, trunk: Branch) -> None:
        # A stack of branches with the index of the next item of their contents.
        self._stack: list[tuple[Branch, int]] = [(trunk, 0)]

    def read(self) -> Iterator[int]:
        """Iterate over the slots that have become readable since the last call; each slot is returned once."""
        while self._stack:
            branch, index = self._stack.pop()
            if index < len(branch.contents):
                item = branch.contents[index]
                self._stack.append((branch, index + 1))
                if isinstance(item, Fork):
                    self._stack.extend((child, 0) for child in reversed(item.branches))
                else:
                    yield item
            elif branch.state not in (BranchState.DONE, BranchState.SKIPPED):
                self._stack.append((branch, index))
                return
