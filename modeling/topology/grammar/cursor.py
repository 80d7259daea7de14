"""The state that the rules of both grammars change: the current segment of a graph, and the blocks open around it.

Terms: a control token is a tag such as `<Path>` that is one token of the vocabulary. A segment is a run of consecutive
tokens; a token may attend to the tokens before it in its own segment and to all tokens of the segment's ancestors. A
block is a group of parallel paths or steps: `<Parallel>` … `</Parallel>` of Multiverse, which may be nested, or
`<Execution>` … `</Execution>` of MedVerse. Each path or step is a segment (with nested blocks, several) that follows
the block's trunk segment, or the steps that it depends on; a join is a segment that follows the last segments of all
paths. An outline announces a path or step before it: `<Outline>` … `</Outline>`. To fork a cursor is to make one for
each path, so that paths can be extended in any order.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.grammar.control_tokens import Decode
from hf_efficient.modeling.topology.grammar.plan import Plan, StepOrder
from hf_efficient.modeling.topology.grammar.segment_graph import MAX_SEGMENTS, SegmentGraph

# Largest number of blocks that may be nested.
MAX_DEPTH = 64
CursorType = TypeVar("CursorType", bound="Cursor")


@dataclass
class Steps:
    """The steps of one MedVerse execution, shared by the cursors that `TopologyBuilder.fork` makes for its steps.

    A step has a number, which the text gives it, and an index, its place in the order in which steps were added.

    Attributes:
        order: determines the parents of each step from the plan.
        segments: index of a step -> its segment, for the steps opened so far.
        schedule: number of a step -> (its index, indices of its parents), for the steps added by `register`.
    """

    order: StepOrder
    segments: dict[int, int] = field(default_factory=dict)
    schedule: dict[int, tuple[int, list[int]]] = field(default_factory=dict)

    def register(self, numbers: Sequence[int]) -> None:
        """Add steps to `order` and `schedule` before they open, so that their indices do not depend on when they open.

        Args:
            numbers: numbers of the steps in the order of the text.
        """
        for number in numbers:
            index = self.order.count
            self.schedule[number] = index, list(self.order.add(number))


@dataclass
class Frame:
    """An open block: Multiverse's `<Parallel>`, MedVerse's `<Execution>`.

    Attributes:
        tag: control token that opened the block.
        token_index: index of that token in its row.
        trunk: segment that the paths follow: the one that was current when the block opened, or, for paths of a forked
            cursor, at the fork.
        prefix: start of the paths' labels, such as ``2.`` for the paths ``2.1`` and ``2.2``; empty in an outermost
            block.
        path_ends: last segment of each closed path or step.
        in_path: a path or step is open.
        joined: the paths have been joined.
        outline_labels: labels of the outlines, an empty string for one without a label.
        path_labels: labels in the headers of the paths opened so far, an empty string for one without.
        steps: the steps of an execution; None for Multiverse.
    """

    tag: str
    token_index: int
    trunk: int
    prefix: str
    path_ends: list[int] = field(default_factory=list)
    in_path: bool = False
    joined: bool = False
    outline_labels: list[str] = field(default_factory=list)
    path_labels: list[str] = field(default_factory=list)
    steps: Steps | None = None

    def copy(self) -> Frame:
        """Return a copy with its own lists; `steps` is shared with this frame."""
        return replace(
            self,
            path_ends=list(self.path_ends),
            outline_labels=list(self.outline_labels),
            path_labels=list(self.path_labels),
        )


class Cursor:
    """The segment of a graph where tokens are appended, and the open blocks around it.

    `MultiverseRules` and `MedVerseRules` derive from it and add the rules: a method for each control token, which runs
    before the token itself is appended. A rule changes `segment` and `frames`. It returns True if it applied its token,
    and False if the token has no meaning at this place and is treated as an ordinary token.

    Attributes:
        graph: the segments; cursors of one fork share it.
        segment: segment of the next token.
        frames: open blocks, the innermost last.
        parsed_plan: the last plan of a MedVerse text.
        warnings: a message for each malformed token; always empty if `strict`.
        num_tokens: number of tokens appended so far.
        mode: what a MedVerse step may attend to: `dag`, `layers` or `flat`; see `StepOrder`.
        strict: raise `TopologyError` at malformed tokens instead of adding a warning.
        row: batch row that messages name; None for no row.
        decode: function from token ids to text; None if labels need not be read.
        base_depth: number of blocks that are open in the cursors that this one was forked from.
        outline_ids: token ids since `<Outline>`; None outside outlines.
    """

    graph: SegmentGraph
    segment: int
    frames: list[Frame]
    parsed_plan: Plan
    warnings: list[str]
    num_tokens: int
    mode: str
    strict: bool
    row: int | None
    decode: Decode | None
    base_depth: int = 0
    outline_ids: list[int] | None = None

    def copy(self: CursorType) -> CursorType:
        """Return a cursor at the same segment of the same graph, with its own copies of the frames and no warnings."""
        cursor = copy.copy(self)
        cursor.frames = [frame.copy() for frame in self.frames]
        cursor.warnings = []
        cursor.outline_ids = None if self.outline_ids is None else list(self.outline_ids)
        return cursor

    @property
    def depth(self) -> int:
        """Number of open blocks, including those of the cursors that this one was forked from."""
        return self.base_depth + len(self.frames)

    @property
    def frame(self) -> Frame | None:
        """The innermost open block; None outside blocks."""
        return self.frames[-1] if self.frames else None

    @property
    def in_path(self) -> bool:
        """True in a path or step of the innermost open block."""
        return bool(self.frames) and self.frames[-1].in_path

    def report_malformed(self, problem: str, tag: str, remedy: str) -> bool:
        """Raise `TopologyError` if `strict`; otherwise append a warning and return False, so that a rule can return it.

        Args:
            problem: what is malformed.
            tag: the control token at which it was found.
            remedy: how to correct the text.
        """
        if self.strict:
            raise TopologyError(problem, remedy, index=self.num_tokens, tag=tag, row=self.row)
        self.warnings.append(f"token {self.num_tokens}, {tag}: {problem}")
        return False

    def open_frame(self, tag: str) -> Frame | None:
        """Push a new block on `frames` and return it; None, after `report_malformed`, if it exceeds `MAX_DEPTH`.

        Args:
            tag: control token that opens the block.
        """
        if self.depth >= MAX_DEPTH:
            self.report_malformed(f"blocks are nested deeper than {MAX_DEPTH}", tag, "close the blocks before")
            return None
        prefix = ""
        if self.frames:
            prefix = f"{self.graph.labels[self.segment]}." if self.in_path else self.frames[-1].prefix
        frame = Frame(tag, self.num_tokens, self.segment, prefix)
        self.frames.append(frame)
        return frame

    def can_add_path(self, tag: str) -> bool:
        """Return True if the graph has room for a path.

        Otherwise call `report_malformed`, which raises `TopologyError` if `strict` and returns False if not: the last
        ``2 * MAX_DEPTH`` segments are reserved for the joins of open blocks.

        Args:
            tag: control token that opens the path.
        """
        if len(self.graph) + 2 * MAX_DEPTH < MAX_SEGMENTS:
            return True
        return self.report_malformed(f"there are nearly {MAX_SEGMENTS} segments", tag, "shorten or split the text")

    def close_path(self, frame: Frame) -> None:
        """Mark the open path of a block as closed, with the current segment as its last.

        `segment` stays, so that a separator after the closing tag still belongs to the path.
        """
        frame.in_path = False
        frame.path_ends.append(self.segment)

    def join_paths(self, frame: Frame) -> None:
        """Make `segment` a new segment whose parents are the last segments of the block's paths; mark it as joined.

        Raises:
            TopologyError: the graph is full (`MAX_SEGMENTS`); `can_add_path` keeps room for joins.
        """
        self.segment = self.graph.new(frame.path_ends, f"{frame.prefix}join")
        frame.joined = True

    def open_outline(self) -> bool:
        """Start to collect the outline's token ids; returns True."""
        self.outline_ids = []
        return True

    def pop_outline(self) -> str:
        """Return the text of the ids since `open_outline` and stop collecting; an empty string without `decode`."""
        ids, self.outline_ids = self.outline_ids, None
        return self.decode(ids) if self.decode is not None and ids else ""
