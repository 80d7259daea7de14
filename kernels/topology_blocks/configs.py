"""Launch configurations of topology_blocks: a table, not a search, so that the first call is quick."""

from __future__ import annotations

SUMMARISE_WARPS = 1
CLASSIFY_WARPS = 2
# Blocks that a program looks at at once; more are taken in turn.
_WIDEST = 256


def classify_width(blocks: int) -> int:
    """The power of two that holds all blocks of a row, within bounds; few widths, so that little is compiled."""
    return min(_WIDEST, max(128, 1 << (blocks - 1).bit_length()))
