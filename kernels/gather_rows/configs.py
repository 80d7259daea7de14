"""Launch configurations of the gather_rows kernel."""

from __future__ import annotations

from dataclasses import dataclass

# Up to this many rows a call is decoding: what counts is the time until the last byte is there, not the bandwidth.
DECODE_ROWS = 64


@dataclass(frozen=True)
class LaunchConfig:
    """Bytes of a row that a program moves at a time, its warps, and how many programs there are at most (0: any)."""

    block_bytes: int
    num_warps: int
    programs: int


# One program for each tile, all of them at once.
_DECODE = LaunchConfig(block_bytes=2048, num_warps=4, programs=0)
_DEVICE = LaunchConfig(block_bytes=4096, num_warps=4, programs=0)
# Reads of host memory take microseconds each, so many must be under way: 16 programs of 16 KiB carry as much of a bus
# of 50 GB/s as more of them do (measured), and leave the other multiprocessors to the model.
_HOST = LaunchConfig(block_bytes=16384, num_warps=8, programs=16)


def launch_config(rows: int, row_bytes: int, on_host: bool) -> LaunchConfig:
    """For so many rows of so many bytes; no tile is wider than the next power of two of a row.

    Args:
        rows: rows to gather.
        row_bytes: bytes of one.
        on_host: the table lies in host memory.
    """
    config = _DECODE if rows <= DECODE_ROWS else _HOST if on_host else _DEVICE
    fitting = max(128, 1 << (row_bytes - 1).bit_length())
    return LaunchConfig(min(config.block_bytes, fitting), config.num_warps, config.programs)
