"""Launch configurations of the row_adamw kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """Columns that a program takes at a time, and its warps."""

    block_width: int
    num_warps: int


def launch_config(width: int) -> LaunchConfig:
    """For rows of so many columns: 4 to a thread, one 16-byte access of a float32 tensor.

    With more, the compiler lays out half-precision and float32 tensors differently, and exchanges in shared memory.
    """
    block_width = min(1024, max(128, 1 << (width - 1).bit_length()))
    return LaunchConfig(block_width, block_width // 128)
