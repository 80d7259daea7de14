"""The state that the rules of both grammars change: the current segment of a graph, and the blocks open around it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.grammar.control_tokens import Decode
from hf_efficient.modeling.topology.grammar.plan import Plan, StepOrder
from hf_efficient.modeling.topology.grammar.segment_graph import MAX_SEGMENTS, SegmentGraph

MAX_DEPTH = 64
CursorType = TypeVar("CursorType", bound="Cursor")


@dataclass
class Steps:
    """The steps of one execution, shared by the cursors that `TopologyBuilder.fork` makes of it.

    Attributes:
        order: gives the parents of each step.
        segments: index of a step in `order` -> its segment, for the steps opened so far.
        schedule: number of a step -> its index and those of its parents, for steps registered by `register`.
    """

    order: StepOrder
    segments: dict[int, int] = field(default_factory=dict)
    schedule: dict[int, tuple[int, list[int]]] = field(default_factory=dict)

    def register(self, numbers: Sequence[int]) -> None:
        """Fix the order of steps beforehand, so that it does not depend on which of them opens first."""
        for number in numbers:
            index = self.order.count
            self.schedule[number] = index, list(self.order.add(number))


@dataclass
class Frame:
    """An open block: Multiverse's `<Parallel>`, MedVerse's `<Execution>`.

    Attributes:
        tag: control token that opened it.
        token_index: index of that token.
        trunk: segment that the paths follow.
        prefix: start of the paths' labels, such as ``2.`` for the paths ``2.1`` and ``2.2``.
        path_ends: last segment of each closed path.
        in_path: a path or step is open.
        joined: the paths have been joined.
        outline_labels: labels of the outlines, an empty text where none could be read.
        path_labels: labels of the paths opened so far.
        steps: steps of an execution; None for Multiverse.
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
        """A frame with lists of its own; `steps` is shared."""
        return replace(
            self,
            path_ends=list(self.path_ends),
            outline_labels=list(self.outline_labels),
            path_labels=list(self.path_labels),
        )


class Cursor:
    """The segment of a graph where tokens are appended, and the open blocks.

    The rules derive from it. They are methods, one for each control token, which run before the token itself is
    appended. A rule returns True when it applied its token, and False when the token counts as ordinary text.

    Attributes:
        graph: the segments; cursors of one fork share it.
        segment: segment of the next token.
        frames: open blocks, the innermost last.
        parsed_plan: MedVerse's last plan.
        warnings: what was malformed; empty when `strict`.
        num_tokens: tokens so far.
        mode: what a MedVerse step sees; see `StepOrder`.
        strict: malformed input raises.
        row: batch row, for messages.
        decode: text of token ids.
        base_depth: blocks that are open in the cursors that this one was forked from.
        outline_ids: token ids since an outline opened; None outside outlines.
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
        """A cursor at the same segment of the same graph, with open blocks of its own and no warnings."""
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
        """The innermost open block."""
        return self.frames[-1] if self.frames else None

    @property
    def in_path(self) -> bool:
        """True inside a path or step of the innermost open block."""
        return bool(self.frames) and self.frames[-1].in_path

    def report_malformed(self, problem: str, tag: str, remedy: str) -> bool:
        """Raise `TopologyError` when `strict`; otherwise append a warning and return False."""
        if self.strict:
            raise TopologyError(problem, remedy, index=self.num_tokens, tag=tag, row=self.row)
        self.warnings.append(f"token {self.num_tokens}, {tag}: {problem}")
        return False

    def open_frame(self, tag: str) -> Frame | None:
        """Push a new block; None, after `report_malformed`, when blocks would be nested deeper than `MAX_DEPTH`."""
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
        """False, after `report_malformed`, when the segments that remain are reserved for joins."""
        if len(self.graph) + 2 * MAX_DEPTH < MAX_SEGMENTS:
            return True
        return self.report_malformed(f"there are nearly {MAX_SEGMENTS} segments", tag, "shorten or split the text")

    def close_path(self, frame: Frame) -> None:
        """End the open path at the current segment, which a separator may still extend."""
        frame.in_path = False
        frame.path_ends.append(self.segment)

    def join_paths(self, frame: Frame) -> None:
        """Continue in a new segment that follows every path of the block."""
        self.segment = self.graph.new(frame.path_ends, f"{frame.prefix}join")
        frame.joined = True

    def open_outline(self) -> bool:
        """Start collecting the outline's token ids."""
        self.outline_ids = []
        return True

    def pop_outline(self) -> str:
        """Text of the ids since `open_outline`; stops collecting."""
        ids, self.outline_ids = self.outline_ids, None
        return self.decode(ids) if self.decode is not None and ids else ""
