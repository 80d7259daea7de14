"""Launch configurations of the row_adamw kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """Elements of a row that a program takes at a time, and its warps."""

    block_width: int
    num_warps: int


def launch_config(width: int) -> LaunchConfig:
    """For rows of `width` elements: 4 per thread, one 16-byte access of a float32 tensor.

    With more, the compiler lays out half-precision and float32 tensors differently, and converts in shared memory.
    """
    block_width = min(1024, max(128, 1 << (width - 1).bit_length()))
    return LaunchConfig(block_width, block_width // 128)
