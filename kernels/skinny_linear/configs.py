"""Launch configurations of the skinny_linear kernels: a table, not a search, so that the first call is quick.

Two regimes. For one row, a program multiplies a tile of the weight with the row, element by element, and adds up: what
counts is how many bytes are under way at once. For more rows, the tile goes through the tensor cores, against all rows
at once; there every program reads the rows of x again, from the cache, so that few and tall tiles are better where the
weight is large, while a small weight needs many programs to occupy the device: parts of its depth where that is long,
low tiles where it is not.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

# More rows than this are work for the tensor cores' own libraries.
MAX_ROWS = 64
# Rows of x are padded to one of these; the first is the element-by-element kernel.
ROW_CLASSES = (1, 16, 32, 64)


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of the weight that a program takes at a time, its warps, and the depth of the pipelined loop.

    With `splits` above one, as many programs share the inner dimension, and a second kernel adds up what they make.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


def row_class(rows: int) -> int:
    """The smallest class that holds so many rows."""
    return next(padded for padded in ROW_CLASSES if rows <= padded)


# One row: outputs in all up to which a weight is small, and the depth from which it is deep.
_VECTOR_SMALL_OUTPUTS = 2048
_VECTOR_DEEP = 4096
_VECTOR_SMALL = LaunchConfig(2, 1024, 2, 1)
_VECTOR_LARGE = LaunchConfig(4, 2048, 4, 1)
_VECTOR_OF_DEEP = LaunchConfig(2, 2048, 4, 1)
_VECTOR_GATED = LaunchConfig(2, 2048, 4, 1)
# More rows, in half precision: tall tiles where that makes enough programs, the depth being cut if need be, but not
# into parts so short that adding them up costs more than it saves.
_PROGRAMS = 128
_SHORTEST_PART = 2048
_MOST_SPLITS = 8
_MATRIX_TALL = LaunchConfig(64, 128, 4, 4)
_MATRIX_TALL_64_ROWS = LaunchConfig(64, 128, 4, 3)  # one stage less, and two programs share a multiprocessor
# Low tiles for the others, the lowest for the smallest.
_MATRIX_LOW_OUTPUTS = 3072
_MATRIX_LOW = LaunchConfig(32, 256, 4, 4)
_MATRIX_LOWEST = LaunchConfig(16, 128, 4, 5)
_MATRIX_LOWEST_64_ROWS = LaunchConfig(16, 256, 4, 3)
_GATED_TALL_OUTPUTS = 8192
_GATED_TALL = LaunchConfig(64, 128, 4, 3)
_GATED_LOWEST = LaunchConfig(16, 128, 4, 5)
# In float32 without tensor cores: the inner loop is unrolled, so tiles are small.
_MATRIX_FLOAT32 = LaunchConfig(32, 32, 4, 3)
# Columns that a program of the adding kernel takes, and its warps.
SUM_COLUMNS = 256
SUM_WARPS = 2
# Shared memory that a program may use where the device has no more than 99 KiB for it.
_SHARED_MEMORY_BEFORE_90 = 96 * 1024


def _padded_depth(depth: int) -> int:
    """The next power of two: a tile need be no deeper."""
    return max(32, 1 << (depth - 1).bit_length())


def shared_memory(config: LaunchConfig, rows: int, matrices: int, element_size: int) -> int:
    """Bytes of the tiles of the weights and of x that the pipelined loop holds at once."""
    return (matrices * config.block_n + rows) * config.block_k * element_size * config.num_stages


def part_depth(config: LaunchConfig, depth: int) -> int:
    """Columns of the weights that one of `splits` programs takes: whole tiles. The last part may be shorter."""
    tiles = -(-depth // config.block_k)
    return -(-tiles // config.splits) * config.block_k


def _vector_config(outputs: int, depth: int, element_size: int, gated: bool) -> LaunchConfig:
    if gated:
        config = _VECTOR_GATED
    elif depth >= _VECTOR_DEEP:
        config = _VECTOR_OF_DEEP
    else:
        config = _VECTOR_SMALL if outputs <= _VECTOR_SMALL_OUTPUTS else _VECTOR_LARGE
    # As many bytes under way in float32: half the rows.
    block_n = config.block_n * 2 // element_size
    return dataclasses.replace(config, block_n=block_n, block_k=min(config.block_k, _padded_depth(depth)))


def _matrix_config(rows: int, outputs: int, depth: int) -> LaunchConfig:
    tall = _MATRIX_TALL_64_ROWS if rows == 64 else _MATRIX_TALL
    programs, splits = -(-outputs // tall.block_n), 1
    while programs * splits < _PROGRAMS and splits < _MOST_SPLITS:
        splits *= 2
    if splits == 1 or depth >= splits * _SHORTEST_PART:
        return dataclasses.replace(tall, splits=splits)
    if rows == 64:
        return _MATRIX_LOWEST_64_ROWS
    return _MATRIX_LOW if outputs >= _MATRIX_LOW_OUTPUTS else _MATRIX_LOWEST


def launch_config(
    rows: int, outputs: int, depth: int, element_size: int, gated: bool, capability: tuple[int, int]
) -> LaunchConfig:
    """For `rows` (a row class) of length `depth` and so many outputs in all, on a device of this compute capability."""
    if rows == 1:
        return _vector_config(outputs, depth, element_size, gated)
    if element_size == 4:
        return _MATRIX_FLOAT32
    if gated:
        config = _GATED_TALL if outputs >= _GATED_TALL_OUTPUTS else _GATED_LOWEST
    else:
        config = _matrix_config(rows, outputs, depth)
    # A tile that divides the depth needs no mask, nor does it fetch what is not there.
    block_k = min(config.block_k, _padded_depth(depth))
    while block_k > 64 and depth % block_k:
        block_k //= 2
    config = dataclasses.replace(config, block_k=block_k)
    if capability < (9, 0):
        while shared_memory(config, rows, 2 if gated else 1, element_size) > _SHARED_MEMORY_BEFORE_90:
            config = dataclasses.replace(config, block_k=config.block_k // 2)
    return config
