"""Segments of a text that is read in parallel: what each follows, what it sees, and where its positions begin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hf_efficient.errors import TopologyError

MAX_SEGMENTS = 4096


class SegmentGraph:
    """Segments, each following some that came before it; segment 0 is the root.

    ``start(s) = 1 + max(end(p) for p in parents(s))``, 0 without parents, and positions count up from there.

    Attributes:
        parents: segments that each segment follows.
        start: position of each segment's first token.
        end: position of each segment's last token; ``start - 1`` while it has none.
        closure: each segment's ancestors and itself, as the bits of a Python integer.
        labels: each segment's name for people: `root`, `1`, `2.1`, `join`.
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
        """A new segment that follows `parents`; returns its number."""
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
        """Add `count` tokens to a segment; returns the position of the first."""
        first = self.end[segment] + 1
        self.end[segment] += count
        return first


def with_ancestors(parents: Iterable[int], closure: Sequence[int]) -> int:
    """The bits of the next segment: its own and those of its parents, where `closure` has those of all before it."""
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
    """`words` little-endian integers of 64 bits for each of `closures`."""
    return b"".join([bits.to_bytes(8 * words, "little") for bits in closures])


class Placement(NamedTuple):
    """Where a token went."""

    segment: int
    position: int


class Placements(NamedTuple):
    """Where each of several tokens went.

    Attributes:
        segment_ids: int32 [n].
        position_ids: int64 [n].
        forced: bool [n], true for tokens that generation writes without asking the model: headers and separators.
    """

    segment_ids: np.ndarray
    position_ids: np.ndarray
    forced: np.ndarray
