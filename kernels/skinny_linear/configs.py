"""Launch configurations of the skinny_linear kernels: a table, not a search, so that the first call is quick.

Two regimes. For one row, a program multiplies a tile of the weight with the row, element by element, and adds up: what
counts is how many bytes are under way at once. For more rows, the tile goes through the tensor cores, against all rows
at once; there every program reads the whole of x again, from the cache, so that few and tall tiles are better where the
weight is large, while a small weight needs many low ones to occupy the device.
"""

from __future__ import annotations

from dataclasses import dataclass

# More rows than this are work for the tensor cores' own libraries.
MAX_ROWS = 64
# Rows of x are padded to one of these; the first is the element-by-element kernel.
ROW_CLASSES = (1, 16, 32, 64)


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of the weight that a program takes at a time, its warps, and the depth of the pipelined loop."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def row_class(rows: int) -> int:
    """The smallest class that holds so many rows."""
    return next(padded for padded in ROW_CLASSES if rows <= padded)


# One row, by bytes of an element. Tiles of 16 KiB, 128 bytes a thread.
_VECTOR = {2: LaunchConfig(4, 2048, 4, 1), 4: LaunchConfig(2, 2048, 4, 1)}
_VECTOR_GATED = {2: LaunchConfig(2, 2048, 4, 1), 4: LaunchConfig(1, 2048, 4, 1)}
# More rows, in half precision: outputs in all up to which a weight is small, then its tile.
_SMALL_OUTPUTS = 8192
_MATRIX_SMALL = LaunchConfig(16, 256, 4, 4)
_MATRIX_LARGE = LaunchConfig(64, 128, 4, 4)
_MATRIX_GATED_SMALL = LaunchConfig(16, 128, 4, 4)
_MATRIX_GATED_LARGE = LaunchConfig(64, 128, 4, 3)
# In float32 without tensor cores: the inner loop is unrolled, so tiles are small.
_MATRIX_FLOAT32 = LaunchConfig(32, 32, 4, 3)
# Shared memory that a program may use where the device has no more than 99 KiB for it.
_SHARED_MEMORY_BEFORE_90 = 96 * 1024


def _fit_depth(config: LaunchConfig, depth: int) -> LaunchConfig:
    """`config` with a tile no deeper than the next power of two of the inner dimension."""
    fitting = max(32, 1 << (depth - 1).bit_length())
    return LaunchConfig(config.block_n, min(config.block_k, fitting), config.num_warps, config.num_stages)


def shared_memory(config: LaunchConfig, rows: int, matrices: int, element_size: int) -> int:
    """Bytes of the tiles of the weights and of x that the pipelined loop holds at once."""
    return (matrices * config.block_n + rows) * config.block_k * element_size * config.num_stages


def launch_config(
    rows: int, outputs: int, depth: int, element_size: int, gated: bool, capability: tuple[int, int]
) -> LaunchConfig:
    """For `rows` (a row class) of length `depth` and so many outputs in all, on a device of this compute capability."""
    if rows == 1:
        return _fit_depth((_VECTOR_GATED if gated else _VECTOR)[element_size], depth)
    if element_size == 4:
        return _MATRIX_FLOAT32
    if gated:
        config = _MATRIX_GATED_SMALL if outputs < _SMALL_OUTPUTS else _MATRIX_GATED_LARGE
    else:
        config = _MATRIX_SMALL if outputs <= _SMALL_OUTPUTS else _MATRIX_LARGE
    config = _fit_depth(config, depth)
    if capability < (9, 0):
        while shared_memory(config, rows, 2 if gated else 1, element_size) > _SHARED_MEMORY_BEFORE_90:
            config = LaunchConfig(config.block_n, config.block_k // 2, config.num_warps, config.num_stages)
    return config
