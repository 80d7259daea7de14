"""Launch configurations of topology_blocks: a table, not a search, so that the first call is quick."""

from __future__ import annotations

SUMMARISE_WARPS = 1
CLASSIFY_WARPS = 2
# Blocks that a program classifies in one step of its loop.
CLASSIFY_WIDTH = 128
