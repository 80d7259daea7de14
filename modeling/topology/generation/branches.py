"""Branches of a row while it is generated: what each has written, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum

from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder

# From the root to a branch: at each fork its number among those of the branch above, and the label taken there.
BranchPath = tuple[tuple[int, str], ...]


class BranchState(Enum):
    """Where a branch stands."""

    QUEUED = "queued"  # not begun: it waits for other steps, or for room
    ACTIVE = "active"  # samples tokens
    WAITING = "waiting"  # has forked, and waits for its branches
    DONE = "done"
    SKIPPED = "skipped"  # there was no budget to begin it


class Branch:
    """One line of text: the trunk of a row, a path, a step.

    Attributes:
        row: of the batch.
        path: which branch this is.
        builder: gives its tokens their segments and positions.
        parent: the branch that forked into this one; None for the trunk.
        header: tokens that it begins with.
        step: number of a MedVerse step.
        record: what it has written: columns, and forks in their places.
        reserve: positions to be left for its closing tag, and for the joins and closing tags above.
        sampled: tokens that were chosen for it, forced ones not among them.
        blocks: forks so far.
        last: column of its newest token, whose logits choose the next.
        ended: why it ended before its own closing tag, or an empty text.
        logprobs: log-probability of each chosen token, where they are kept.
        key: of its random numbers.
        checked_from: position from which on its budget must be looked at.
    """

    __slots__ = (
        *(
            "blocks",
            "builder",
            "checked_from",
            "finish_reason",
            "header",
            "key",
            "last_slot",
            "logprobs",
            "parent",
            "path",
            "contents",
            "reserve",
        ),
        *("row", "num_sampled_tokens", "state", "step", "_visible"),
    )

    def __init__(
        self,
        row: int,
        path: BranchPath,
        builder: TopologyBuilder,
        parent: Branch | None,
        visible: Callable[[Branch], list[int]],
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
        self.num_sampled_tokens = 0
        self.blocks = 0
        self.last_slot = -1
        self.finish_reason = ""
        self.logprobs: list[float] = []
        self.key: int | None = None
        self.checked_from = 0
        self.state = BranchState.QUEUED
        self._visible = visible

    @property
    def position(self) -> int:
        """Position of the next token, unless it opens a segment."""
        return self.builder.graph.end[self.builder.cur] + 1

    @property
    def open_blocks(self) -> int:
        """Blocks open inside this branch, that of its own path not among them."""
        return len(self.builder.frames) - (self.parent is not None)

    @property
    def context(self) -> str:
        """Name of the set of tags that may not come next, for those who constrain the choice."""
        if self.parent is None and not self.builder.frames:
            return "outside"
        if self.parent is not None and not self.open_blocks:
            return "branch"
        return "path" if self.builder.in_path else "block"

    def visible_ids(self) -> list[int]:
        """Ids of all tokens that the next one sees, in the order of the text."""
        return self._visible(self)


class Fork:
    """The branches that one branch has split into.

    Args:
        branches: in the order of the text.
        needs: for each of them the indices of those that must be done before it begins.
        limit: how many of them may be live at once.
    """

    __slots__ = ("branches", "limit", "needs", "parent")

    def __init__(self, parent: Branch, branches: list[Branch], needs: list[list[int]], limit: int) -> None:
        self.parent = parent
        self.branches = branches
        self.needs = needs
        self.limit = limit

    def may_begin(self, index: int) -> bool:
        """True when all that the branch waits for is done and there is room for it."""
        live = sum(branch.state in (BranchState.ACTIVE, BranchState.WAITING) for branch in self.branches)
        return live < self.limit and all(self.branches[i].state is BranchState.DONE for i in self.needs[index])

    def is_over(self) -> bool:
        """True when no branch will write any more."""
        return all(branch.state in (BranchState.DONE, BranchState.SKIPPED) for branch in self.branches)


def slots_in_text_order(branch: Branch) -> Iterator[int]:
    """Columns of a branch in the order of the text: what it wrote, with its branches one after the other."""
    for item in branch.contents:
        if isinstance(item, Fork):
            for child in item.branches:
                yield from slots_in_text_order(child)
        else:
            yield item


def all_branches(branch: Branch) -> Iterator[Branch]:
    """A branch and all that came out of it, in the order of the text."""
    yield branch
    for item in branch.contents:
        if isinstance(item, Fork):
            for child in item.branches:
                yield from all_branches(child)


class TextOrderReader:
    """Hands out the tokens of a growing tree of branches in the order of the text, as soon as that is known.

    The first branch that still writes holds back those after it.
    """

    def __init__(self, root: Branch) -> None:
        self._open: list[tuple[Branch, int]] = [(root, 0)]

    def read(self) -> Iterator[int]:
        """Columns that have become known since the last call."""
        while self._open:
            branch, at = self._open.pop()
            if at < len(branch.contents):
                item = branch.contents[at]
                self._open.append((branch, at + 1))
                if isinstance(item, Fork):
                    self._open.extend((child, 0) for child in reversed(item.branches))
                else:
                    yield item
            elif branch.state not in (BranchState.DONE, BranchState.SKIPPED):
                self._open.append((branch, at))
                return
