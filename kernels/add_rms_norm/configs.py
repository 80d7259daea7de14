"""Launch configurations of the add_rms_norm kernel, by the width of a row."""

from __future__ import annotations

from dataclasses import dataclass

MAX_WIDTH = 65536
# Rows up to this width stay in registers between the sum of their squares and their normalisation.
_WHOLE_WIDTH = 16384
# Elements of a tile of several narrow rows, and those that one warp takes.
_TILE = 1024
_ELEMENTS_A_WARP = 512


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of one program, BLOCK_ROWS by BLOCK_WIDTH, and its warps; a wider row is read twice, tile by tile."""

    block_rows: int
    block_width: int
    num_warps: int


def launch_config(rows: int, width: int) -> LaunchConfig:
    """For `rows` rows of `width` elements."""
    block_width = max(32, min(_WHOLE_WIDTH, 1 << (width - 1).bit_length()))
    # Few rows: one per program, to occupy the device.
    block_rows = 1 if rows <= 1024 else max(1, _TILE // block_width)
    warps = block_rows * block_width // _ELEMENTS_A_WARP
    return LaunchConfig(block_rows, block_width, min(16, max(1, warps)))
