"""What the rules of both grammars work on: a place in a graph of segments, and the blocks that are open there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_efficient.errors import TopologyError
from hf_efficient.modeling.topology.grammar.control_tokens import Decode
from hf_efficient.modeling.topology.grammar.plan import Plan, StepOrder
from hf_efficient.modeling.topology.grammar.segment_graph import MAX_SEGMENTS, SegmentGraph

MAX_DEPTH = 64


@dataclass
class Steps:
    """The steps of one execution; cursors that run beside each other share it.

    Attributes:
        order: tells which steps a step follows.
        segments: segment of each step, in the order in which they count.
        schedule: number of a step -> its place and the places of the steps that it follows, where all is known ahead.
    """

    order: StepOrder
    segments: dict[int, int] = field(default_factory=dict)
    schedule: dict[int, tuple[int, list[int]]] = field(default_factory=dict)

    def foresee(self, numbers: Sequence[int]) -> None:
        """Let steps of these numbers count in this order, whichever is opened first."""
        for number in numbers:
            place = self.order.count
            self.schedule[number] = place, list(self.order.admit(number))


@dataclass
class Frame:
    """An open block.

    Attributes:
        tag: control token that opened it.
        opened: index of that token.
        trunk: segment that the paths follow.
        prefix: what the paths' labels begin with.
        tails: last segment of each path that was closed.
        in_path: a path or step is open.
        joined: the paths have been joined.
        labels: labels of the outlines, empty texts where unread.
        paths: labels of the paths that were opened.
        steps: of an execution.
    """

    tag: str
    opened: int
    trunk: int
    prefix: str
    tails: list[int] = field(default_factory=list)
    in_path: bool = False
    joined: bool = False
    labels: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    steps: Steps | None = None


class Cursor:
    """A place where tokens are appended. A transition is done before its token is appended to `cur`.

    A transition returns True when its tag was followed, and False when it was taken for ordinary text.

    Attributes:
        graph: the segments, perhaps shared with other cursors.
        cur: segment that the next token goes to.
        frames: open blocks, the innermost last.
        warnings: what was malformed, unless strict.
        fed: number of tokens so far.
    """

    graph: SegmentGraph
    cur: int
    frames: list[Frame]
    plan_read: Plan
    warnings: list[str]
    fed: int
    mode: str
    strict: bool
    row: int | None
    decode: Decode | None
    # Blocks that are open in the cursors above.
    base_depth: int = 0
    # Ids since an outline opened.
    outline_ids: list[int] | None = None

    @property
    def depth(self) -> int:
        """Number of open blocks, those of the cursors above included."""
        return self.base_depth + len(self.frames)

    @property
    def frame(self) -> Frame | None:
        """The innermost open block."""
        return self.frames[-1] if self.frames else None

    @property
    def in_path(self) -> bool:
        """True inside a path or step of the innermost open block."""
        return bool(self.frames) and self.frames[-1].in_path

    def complain(self, problem: str, tag: str, remedy: str) -> bool:
        """Raise when strict, else warn; False."""
        if self.strict:
            raise TopologyError(problem, remedy, index=self.fed, tag=tag, row=self.row)
        self.warnings.append(f"token {self.fed}, {tag}: {problem}")
        return False

    def open_frame(self, tag: str) -> Frame | None:
        """A new block on the stack, or None where it would be one too deep."""
        if self.depth >= MAX_DEPTH:
            self.complain(f"blocks are nested deeper than {MAX_DEPTH}", tag, "close the blocks before")
            return None
        prefix = ""
        if self.frames:
            prefix = f"{self.graph.labels[self.cur]}." if self.in_path else self.frames[-1].prefix
        frame = Frame(tag, self.fed, self.cur, prefix)
        self.frames.append(frame)
        return frame

    def may_branch(self, tag: str) -> bool:
        """False where segments have become so many that only joins may still make one."""
        if len(self.graph) + 2 * MAX_DEPTH < MAX_SEGMENTS:
            return True
        return self.complain(f"there are nearly {MAX_SEGMENTS} segments", tag, "shorten or split the text")

    def close_path(self, frame: Frame) -> None:
        """End the open path where the cursor is; a separator may still follow."""
        frame.in_path = False
        frame.tails.append(self.cur)

    def join_segments(self, frame: Frame) -> None:
        """Go on in a segment that follows every path of the block."""
        self.cur = self.graph.new(frame.tails, f"{frame.prefix}join")
        frame.joined = True

    def open_outline(self) -> bool:
        """Remember the ids that follow."""
        self.outline_ids = []
        return True

    def take_outline(self) -> str:
        """Text of the ids since `open_outline`."""
        ids, self.outline_ids = self.outline_ids, None
        return self.decode(ids) if self.decode is not None and ids else ""
