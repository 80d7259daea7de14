"""Branches of a sequence in parallel generation: the tokens that each has written, and its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum

from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder

# From the trunk to a branch: at each fork, the number of that fork in its branch, and the label of the next branch.
BranchPath = tuple[tuple[int, str], ...]


class BranchState(Enum):
    """State of a branch in its life cycle."""

    QUEUED = "queued"  # not started: its dependencies are not done, or max_branches are active
    ACTIVE = "active"  # samples tokens
    WAITING = "waiting"  # has forked, and waits for its child branches
    DONE = "done"
    SKIPPED = "skipped"  # never started, because the budget was too small


class Branch:
    """The trunk of a sequence, or one path or step of it.

    Args:
        row: batch row.
        path: identifies the branch in its sequence.
        builder: assigns segments and positions to its tokens.
        parent: the branch that forked into this one; None for the trunk.
        visible_ids: gives `visible_ids` of a branch.
        header: tokens that the branch begins with.
        step: number of a MedVerse step.
        reserve: positions reserved for its closing tag, and for the joins and closing tags of the branches above.

    Attributes:
        contents: cache slots of its tokens, and its forks, in the order of the text.
        last_slot: cache slot of its newest token, whose logits give the next token.
        num_sampled_tokens: tokens chosen by the sampler; forced tokens do not count.
        num_forks: forks so far.
        finish_reason: why it ended without its own closing tag, or an empty text.
        logprobs: log-probability of each sampled token, where they are kept.
        rng_key: key of its random numbers; see `sampling.branch_key`.
        budget_check_position: position from which on the scheduler must check its budget after each token.
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
        return self.parent is None

    @property
    def position(self) -> int:
        """Position of the next token, unless that token opens a segment."""
        return self.builder.graph.end[self.builder.segment] + 1

    @property
    def open_blocks(self) -> int:
        """Number of blocks opened inside this branch and not closed; the block of its own path does not count."""
        return len(self.builder.frames) - (not self.is_trunk)

    @property
    def context(self) -> str:
        """Where the next token goes, as a key of `ForcedText.disallowed_ids`.

        `outside` blocks; directly inside a `branch`; in a `path` of a block that the branch opened, or in such a
        `block` between its paths.
        """
        if self.is_trunk and not self.builder.frames:
            return "outside"
        if not self.is_trunk and not self.open_blocks:
            return "branch"
        return "path" if self.builder.in_path else "block"

    def visible_ids(self) -> list[int]:
        """Ids of all tokens that the next token sees, in the order of the text."""
        return self._visible_ids(self)


class Fork:
    """The child branches of one fork.

    Args:
        parent: the branch that forked.
        branches: its children, in the order of the text.
        dependencies: for each child, the indices of the children that must be done before it starts.
        max_active: limit of active children.
    """

    __slots__ = ("branches", "dependencies", "max_active", "parent")

    def __init__(self, parent: Branch, branches: list[Branch], dependencies: list[list[int]], max_active: int) -> None:
        self.parent = parent
        self.branches = branches
        self.dependencies = dependencies
        self.max_active = max_active

    def can_start(self, index: int) -> bool:
        """True when all dependencies of a child are done and fewer than `max_active` children run."""
        running = sum(branch.state in (BranchState.ACTIVE, BranchState.WAITING) for branch in self.branches)
        return running < self.max_active and all(
            self.branches[i].state is BranchState.DONE for i in self.dependencies[index]
        )

    def is_finished(self) -> bool:
        """True when every child is done or skipped."""
        return all(branch.state in (BranchState.DONE, BranchState.SKIPPED) for branch in self.branches)


def slots_in_text_order(branch: Branch) -> Iterator[int]:
    """Cache slots of a branch and its descendants in the order of the text: children of a fork one after another."""
    for item in branch.contents:
        if isinstance(item, Fork):
            for child in item.branches:
                yield from slots_in_text_order(child)
        else:
            yield item


def all_branches(branch: Branch) -> Iterator[Branch]:
    """A branch and its descendants, in the order of the text."""
    yield branch
    for item in branch.contents:
        if isinstance(item, Fork):
            for child in item.branches:
                yield from all_branches(child)


class TextOrderReader:
    """Reads the cache slots of a growing tree of branches in the order of the text.

    A slot is given once all tokens before it in the text are written, so an unfinished branch holds back later ones.
    """

    def __init__(self, trunk: Branch) -> None:
        # A stack of branches with the index of the next item of their contents.
        self._stack: list[tuple[Branch, int]] = [(trunk, 0)]

    def read(self) -> Iterator[int]:
        """The slots that became readable since the last call."""
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
