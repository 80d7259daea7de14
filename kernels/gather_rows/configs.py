"""Launch configurations of the gather_rows kernel."""

from __future__ import annotations

from dataclasses import dataclass

# Up to this many rows a call counts as decoding, where latency matters and not bandwidth.
DECODE_ROWS = 64


@dataclass(frozen=True)
class LaunchConfig:
    """Bytes of a row that a program copies at a time, its warps, and the largest number of programs (0: no limit)."""

    block_bytes: int
    num_warps: int
    programs: int


# One program for each tile.
_DECODE = LaunchConfig(block_bytes=2048, num_warps=4, programs=0)
_DEVICE = LaunchConfig(block_bytes=4096, num_warps=4, programs=0)
# A read of host memory takes microseconds, so many must be in flight: 16 programs of 16 KiB reach the same share of a
# 50 GB/s bus as more programs (measured), and leave the other multiprocessors to the model.
_HOST = LaunchConfig(block_bytes=16384, num_warps=8, programs=16)


def launch_config(rows: int, row_bytes: int, on_host: bool) -> LaunchConfig:
    """For `rows` rows of `row_bytes` bytes; no tile is wider than the next power of two of a row.

    Args:
        rows: rows to gather.
        row_bytes: bytes of a row.
        on_host: whether the table is in host memory.
    """
    config = _DECODE if rows <= DECODE_ROWS else _HOST if on_host else _DEVICE
    fitting = max(128, 1 << (row_bytes - 1).bit_length())
    return LaunchConfig(min(config.block_bytes, fitting), config.num_warps, config.programs)
