"""Launch configurations of the bhyt_norm kernels, by the width of a row."""

from __future__ import annotations

from dataclasses import dataclass

# A row stays in registers between the sum of its squares and its normalisation.
MAX_WIDTH = 16384
# Elements of a tile of several narrow rows.
_TILE = 1024
# Columns of a program that needs no sum over the row; with few rows more programs, to occupy the device.
_COLUMNS = 4096
_COLUMNS_OF_FEW = 512
_FEW_ROWS = 64
# Bytes of rows that a program of the backward pass has on their way while it computes: what any device's shared memory
# holds. And those of all programs of a multiprocessor: enough to hide the memory's latency.
_AHEAD_BYTES = 96 * 1024
_MULTIPROCESSOR_BYTES = 72 * 1024
# Columns that a program of the last kernel sums up over all partial sums.
FINISH_COLUMNS = 32


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of one program, in rows and columns, and its warps."""

    block_rows: int
    block_width: int
    num_warps: int


@dataclass(frozen=True)
class BackwardConfig(LaunchConfig):
    """As `LaunchConfig`; how many programs share the rows, for each multiprocessor; and the rows they read ahead."""

    programs: int
    num_stages: int


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _warps(elements: int, each: int) -> int:
    return min(16, max(1, _next_power_of_2(elements // each)))


def _block_rows(rows: int, block_width: int) -> int:
    """Few rows: one a program, to occupy the device."""
    return 1 if rows <= 1024 else max(1, _TILE // block_width)


def forward_config(rows: int, width: int, whole_row: bool) -> LaunchConfig:
    """For the forward kernel, which sees whole rows where it takes their mean square itself."""
    block_width = max(32, _next_power_of_2(width))
    if not whole_row:
        block_width = min(block_width, _COLUMNS_OF_FEW if rows <= _FEW_ROWS else _COLUMNS)
    block_rows = _block_rows(rows, block_width)
    # With few rows nothing hides a program's own time, so that more threads share its work.
    each = 256 if rows <= _FEW_ROWS else 512
    return LaunchConfig(block_rows, block_width, _warps(block_rows * block_width, each))


def backward_config(rows: int, width: int, row_bytes: int) -> BackwardConfig:
    """For the backward kernel: a program walks over rows and keeps the sums of the weight's gradient in registers.

    Args:
        row_bytes: bytes that a row has in all the tensors read.
    """
    block_width = max(32, _next_power_of_2(width))
    block_rows = _block_rows(rows, block_width)
    turn_bytes = block_rows * row_bytes * block_width // width
    ahead = min(3, _AHEAD_BYTES // turn_bytes)
    programs = 4 if ahead == 0 else max(1, min(8, _MULTIPROCESSOR_BYTES // (ahead * turn_bytes)))
    return BackwardConfig(block_rows, block_width, _warps(block_rows * block_width, 512), programs, ahead + 1)
