"""Launch configurations of the bhyt_norm kernels, by the width of a row."""

from __future__ import annotations

from dataclasses import dataclass

# A row stays in registers between its sum of squares and its normalisation.
MAX_WIDTH = 16384
# Elements of a tile of several narrow rows.
_TILE = 1024
# Tile of a program that needs no sum over the row; smaller with few rows, to occupy the device.
_COLUMNS = 4096
_COLUMNS_OF_FEW = 512
_FEW_ROWS = 64
# Bytes of rows that a program of the backward pass loads ahead, which fit any device's shared memory, and those of all
# programs of a multiprocessor, which are enough to hide the memory latency.
_AHEAD_BYTES = 96 * 1024
_MULTIPROCESSOR_BYTES = 72 * 1024
# Columns of the partial gradients that a program of `reduce_partials_kernel` sums.
REDUCE_COLUMNS = 32


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of one program, BLOCK_ROWS by BLOCK_WIDTH, and its warps."""

    block_rows: int
    block_width: int
    num_warps: int


@dataclass(frozen=True)
class BackwardConfig(LaunchConfig):
    """As `LaunchConfig`, with the programs per multiprocessor that share the rows, and the pipeline stages."""

    programs: int
    num_stages: int


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _warps(elements: int, each: int) -> int:
    return min(16, max(1, _next_power_of_2(elements // each)))


def _block_rows(rows: int, block_width: int) -> int:
    """Rows of a tile; with few rows one per program, to occupy the device."""
    return 1 if rows <= 1024 else max(1, _TILE // block_width)


def forward_config(rows: int, width: int, whole_row: bool) -> LaunchConfig:
    """For the forward kernel, which needs whole rows where it computes their mean square."""
    block_width = max(32, _next_power_of_2(width))
    if not whole_row:
        block_width = min(block_width, _COLUMNS_OF_FEW if rows <= _FEW_ROWS else _COLUMNS)
    block_rows = _block_rows(rows, block_width)
    # With few rows a program's latency is exposed, so more threads share its work.
    each = 256 if rows <= _FEW_ROWS else 512
    return LaunchConfig(block_rows, block_width, _warps(block_rows * block_width, each))


def backward_config(rows: int, width: int, row_bytes: int) -> BackwardConfig:
    """For the backward kernel, whose programs loop over rows with the sums of the weight's gradient in registers.

    Args:
        row_bytes: bytes of a row in all the tensors read.
    """
    block_width = max(32, _next_power_of_2(width))
    block_rows = _block_rows(rows, block_width)
    step_bytes = block_rows * row_bytes * block_width // width
    ahead = min(3, _AHEAD_BYTES // step_bytes)
    programs = 4 if ahead == 0 else max(1, min(8, _MULTIPROCESSOR_BYTES // (ahead * step_bytes)))
    return BackwardConfig(block_rows, block_width, _warps(block_rows * block_width, 512), programs, ahead + 1)
