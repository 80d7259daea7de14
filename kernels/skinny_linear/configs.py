"""Launch configurations of the skinny_linear kernels: a table, not a search, so that the first call is quick.

Two regimes. For one row (GEMV), a program multiplies a tile of the weight with the row element by element: what counts
is how many bytes are in flight. For more rows (GEMM), the tile is multiplied with all rows by the tensor cores. There
every program reads the rows of x again, from the cache, so that few and tall tiles are better where the weight is
large, while a small weight needs many programs to occupy the device: split-K where K is large, low tiles where it is
not.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

# For more rows than this, cuBLAS is the better choice.
MAX_ROWS = 64
# Rows of x are padded to one of these; the first is the GEMV kernel.
ROW_CLASSES = (1, 16, 32, 64)


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of the weight that a program takes at a time, BLOCK_N by BLOCK_K, its warps and its pipeline stages.

    With `splits` above one (split-K), that many programs share K, and a second kernel adds their partial sums.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


def row_class(rows: int) -> int:
    """The smallest entry of `ROW_CLASSES` that is at least `rows`."""
    return next(padded for padded in ROW_CLASSES if rows <= padded)


# GEMV: total outputs up to which a weight counts as small, and the K from which it counts as deep.
_VECTOR_SMALL_OUTPUTS = 2048
_VECTOR_DEEP = 4096
_VECTOR_SMALL = LaunchConfig(2, 1024, 2, 1)
_VECTOR_LARGE = LaunchConfig(4, 2048, 4, 1)
_VECTOR_OF_DEEP = LaunchConfig(2, 2048, 4, 1)
_VECTOR_GATED = LaunchConfig(2, 2048, 4, 1)
# GEMM in half precision: tall tiles where they make enough programs, with split-K if needed, but not with splits so
# short that adding them costs more than it saves.
_PROGRAMS = 128
_MIN_K_PER_SPLIT = 2048
_MAX_SPLITS = 8
_MATRIX_TALL = LaunchConfig(64, 128, 4, 4)
_MATRIX_TALL_64_ROWS = LaunchConfig(64, 128, 4, 3)  # one stage less, so that two programs fit a multiprocessor
# Low tiles for the others, the lowest for the smallest.
_MATRIX_LOW_OUTPUTS = 3072
_MATRIX_LOW = LaunchConfig(32, 256, 4, 4)
_MATRIX_LOWEST = LaunchConfig(16, 128, 4, 5)
_MATRIX_LOWEST_64_ROWS = LaunchConfig(16, 256, 4, 3)
_GATED_TALL_OUTPUTS = 8192
_GATED_TALL = LaunchConfig(64, 128, 4, 3)
_GATED_LOWEST = LaunchConfig(16, 128, 4, 5)
# float32 has no tensor cores: the inner loop is unrolled, so tiles are small.
_MATRIX_FLOAT32 = LaunchConfig(32, 32, 4, 3)
# Columns that a program of `reduce_splits_kernel` takes, and its warps.
REDUCE_COLUMNS = 256
REDUCE_WARPS = 2
# Shared memory that a program may use where the device has no more than 99 KiB for it.
_SHARED_MEMORY_BEFORE_90 = 96 * 1024


def _padded_depth(depth: int) -> int:
    """The next power of two, the largest BLOCK_K that makes sense."""
    return max(32, 1 << (depth - 1).bit_length())


def shared_memory(config: LaunchConfig, rows: int, matrices: int, element_size: int) -> int:
    """Bytes of the tiles of the weights and of x in all pipeline stages."""
    return (matrices * config.block_n + rows) * config.block_k * element_size * config.num_stages


def k_per_split(config: LaunchConfig, depth: int) -> int:
    """Length of K that one of `splits` programs takes: whole tiles. The last split may be shorter."""
    tiles = -(-depth // config.block_k)
    return -(-tiles // config.splits) * config.block_k


def _vector_config(outputs: int, depth: int, element_size: int, gated: bool) -> LaunchConfig:
    if gated:
        config = _VECTOR_GATED
    elif depth >= _VECTOR_DEEP:
        config = _VECTOR_OF_DEEP
    else:
        config = _VECTOR_SMALL if outputs <= _VECTOR_SMALL_OUTPUTS else _VECTOR_LARGE
    # The same number of bytes in flight in float32: half the rows.
    block_n = config.block_n * 2 // element_size
    return dataclasses.replace(config, block_n=block_n, block_k=min(config.block_k, _padded_depth(depth)))


def _matrix_config(rows: int, outputs: int, depth: int) -> LaunchConfig:
    tall = _MATRIX_TALL_64_ROWS if rows == 64 else _MATRIX_TALL
    programs, splits = -(-outputs // tall.block_n), 1
    while programs * splits < _PROGRAMS and splits < _MAX_SPLITS:
        splits *= 2
    if splits == 1 or depth >= splits * _MIN_K_PER_SPLIT:
        return dataclasses.replace(tall, splits=splits)
    if rows == 64:
        return _MATRIX_LOWEST_64_ROWS
    return _MATRIX_LOW if outputs >= _MATRIX_LOW_OUTPUTS else _MATRIX_LOWEST


def launch_config(
    rows: int, outputs: int, depth: int, element_size: int, gated: bool, capability: tuple[int, int]
) -> LaunchConfig:
    """For `rows` (a row class) of length `depth` (K) and `outputs` in total, on a device of this compute capability."""
    if rows == 1:
        return _vector_config(outputs, depth, element_size, gated)
    if element_size == 4:
        return _MATRIX_FLOAT32
    if gated:
        config = _GATED_TALL if outputs >= _GATED_TALL_OUTPUTS else _GATED_LOWEST
    else:
        config = _matrix_config(rows, outputs, depth)
    # A BLOCK_K that divides K needs no mask.
    block_k = min(config.block_k, _padded_depth(depth))
    while block_k > 64 and depth % block_k:
        block_k //= 2
    config = dataclasses.replace(config, block_k=block_k)
    if capability < (9, 0):
        while shared_memory(config, rows, 2 if gated else 1, element_size) > _SHARED_MEMORY_BEFORE_90:
            config = dataclasses.replace(config, block_k=config.block_k // 2)
    return config
