"""The graph of a text's segments: parents, positions, and the ancestors of each segment as a bitmap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hf_efficient.modeling.topology.errors import TopologyError

MAX_SEGMENTS = 4096


class SegmentGraph:
    """A directed acyclic graph of segments, numbered so that parents come before children; segment 0 is the root.

    Positions in segment s are consecutive and start at ``start(s) = 1 + max(end(p) for p in parents(s))``, or at 0
    without parents.

    Attributes:
        parents: segments that each segment follows.
        start: position of each segment's first token.
        end: position of each segment's last token; ``start - 1`` while it has none.
        closure: bitmap of each segment's ancestors and itself, as a Python integer.
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
        """Add a segment that follows `parents`; its number.

        Raises:
            TopologyError: a parent does not exist, or there are `MAX_SEGMENTS` segments.
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
        """Append `count` tokens to a segment; the position of the first."""
        first = self.end[segment] + 1
        self.end[segment] += count
        return first


def with_ancestors(parents: Iterable[int], closure: Sequence[int]) -> int:
    """Bitmap of the next segment's ancestors and itself.

    Args:
        parents: its parents.
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
    """Bitmaps as bytes: `words` little-endian 64-bit integers for each of `closures`."""
    return b"".join([bits.to_bytes(8 * words, "little") for bits in closures])


class Placement(NamedTuple):
    """Segment and position of a token."""

    segment: int
    position: int


class Placements(NamedTuple):
    """Segments and positions of n tokens.

    Attributes:
        segment_ids: int32 [n].
        position_ids: int64 [n].
        forced: bool [n], true for forced tokens: headers and separators, which generation writes in place of the model.
    """

    segment_ids: np.ndarray
    position_ids: np.ndarray
    forced: np.ndarray
