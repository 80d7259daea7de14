"""The graph of a text's segments: parents, positions, and the ancestors of each segment as a bitmap.

A segment is a run of consecutive tokens between two points where the text forks into parallel branches or joins them. A
token may attend to the tokens before it in its own segment and to all tokens of the segment's ancestors. Forced tokens
are those that parallel generation appends without sampling: headers, separators and joins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hf_efficient.modeling.topology.errors import TopologyError

# Largest number of segments in a graph.
MAX_SEGMENTS = 4096


class SegmentGraph:
    """A directed acyclic graph of segments, numbered so that parents come before children; segment 0 is the root.

    Positions in segment s are consecutive and start at ``start(s) = 1 + max(end(p) for p in parents(s))``, or at 0
    without parents.

    Attributes:
        parents: segments that each segment follows.
        start: position of each segment's first token.
        end: position of each segment's last token; ``start - 1`` while it has none.
        closure: bitmap of each segment's ancestors and itself, as a Python integer: bit t stands for segment t.
        labels: readable name of each segment: `root`, `1`, `2.1`, `join`.
    """

    def __init__(self) -> None:
        self.parents: list[list[int]] = []
        self.start: list[int] = []
        self.end: list[int] = []
        self.closure: list[int] = []
        self.labels: list[str] = []

    def __len__(self) -> int:
        return len(self.parents)

    def new(self, parents: Iterable[int], label: str = "") -> int:
        """Add an empty segment that follows `parents`; return its number, which is the number of segments before.

        Args:
            parents: numbers of existing segments, in any order; repeated ones count once. Empty for a root.
            label: readable name.

        Raises:
            TopologyError: a parent does not exist, or there are `MAX_SEGMENTS` segments already.
        """
        parents, segment = list(dict.fromkeys(parents)), len(self.parents)
        closure = with_ancestors(parents, self.closure)
        if segment >= MAX_SEGMENTS:
            raise TopologyError(f"there are more than {MAX_SEGMENTS} segments", "shorten or split the text")
        start = max((self.end[parent] + 1 for parent in parents), default=0)
        self.parents.append(parents)
        self.start.append(start)
        self.end.append(start - 1)
        self.closure.append(closure)
        self.labels.append(label)
        return segment

    def append(self, segment: int, count: int = 1) -> int:
        """Append `count` tokens to a segment; return the position of the first.

        The positions of its descendants do not change, so append tokens before descendants are added.
        """
        first = self.end[segment] + 1
        self.end[segment] += count
        return first


def with_ancestors(parents: Iterable[int], closure: Sequence[int]) -> int:
    """Return the bitmap of the ancestors and itself of the segment with number ``len(closure)``.

    Args:
        parents: numbers of its parents.
        closure: the bitmaps of all segments before it.

    Raises:
        TopologyError: a parent is not one of the segments before it.
    """
    segment = len(closure)
    bits = 1 << segment
    for parent in parents:
        if not 0 <= parent < segment:
            raise TopologyError(
                f"segment {segment} follows segment {parent}, which does not come before it",
                "number the segments so that each comes after all that it follows",
            )
        bits |= closure[parent]
    return bits


def bitmap_bytes(closures: Iterable[int], words: int) -> bytes:
    """Return bitmaps as bytes: for each of `closures` in order, `words` little-endian 64-bit integers.

    Raises:
        OverflowError: a bitmap has bits beyond ``64 * words``.
    """
    return b"".join([bits.to_bytes(8 * words, "little") for bits in closures])


class Placement(NamedTuple):
    """Segment number and rotary position of one token."""

    segment: int
    position: int


class Placements(NamedTuple):
    """Segments and positions of n tokens.

    Attributes:
        segment_ids: int32 [n].
        position_ids: int64 [n].
        forced: bool [n], true for tokens that parallel generation appends without sampling: headers, separators and
            joins.
    """

    segment_ids: np.ndarray
    position_ids: np.ndarray
    forced: np.ndarray
