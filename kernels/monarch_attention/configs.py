"""Launch configurations of monarch_attention: a table, not a search, so that the first call is quick.

Keys are the rows and columns of a tile, the head_dim, the element size and the device, never the number of tiles: one
configuration serves every key-value length of a video.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from hf_efficient.kernels.decode_attention.configs import padded_head_dim

HOPPER = (9, 0)
# Memory for the results between the kernels: this part of the device's, and this on the CPU.
WORKSPACE_SHARE, CPU_WORKSPACE = 16, 2**30
# Programs of `right_kernel` that load a large device evenly.
_PROGRAMS = 3072


@dataclass(frozen=True)
class RightConfig:
    """Of `right_kernel`: BLOCK_M lines by BLOCK_L columns, and TAIL_L more (0: none) in the same step.

    `stream`: more columns than both, so that the softmax is online. `use_tma`: the tensor memory accelerator of Hopper
    and newer loads keys and values, where their layout allows it. `max_registers`: of a thread; None for no limit.
    """

    block_m: int
    block_l: int
    tail_l: int
    stream: bool
    num_stages: int
    num_warps: int
    use_tma: bool = False
    max_registers: int | None = None


@dataclass(frozen=True)
class LeftConfig:
    """Of `left_kernel` and `average_kernel`: BLOCK_M rows of the result by BLOCK_N rows that it passes over."""

    block_m: int
    block_n: int
    num_stages: int
    num_warps: int


def column_blocks(columns: int) -> tuple[int, int, bool]:
    """BLOCK_L, TAIL_L and `stream` for a number of columns: at most a third of the lanes are past the end."""
    for block, tail in ((16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 32), (128, 0)):
        if columns <= block + tail:
            return block, tail, False
    return 64, 0, True


def right_config(
    columns: int, lines: int, head_dim: int, element_size: int, capability: tuple[int, int]
) -> RightConfig:
    """Of `right_kernel`, for the columns of a tile and the lines of a call."""
    blocks = column_blocks(columns)
    block_d = padded_head_dim(head_dim)
    if element_size == 4 or block_d > 128:
        return RightConfig(16, min(blocks[0], 32), 0, columns > 32, 1, 4)
    if capability != HOPPER:
        return RightConfig(64, *(blocks if blocks[0] < 128 and not blocks[1] else (64, 0, columns > 64)), 1, 4)
    padded = {block_m: -(-lines // block_m) * block_m for block_m in (64, 128)}
    if blocks == (64, 0, False) and padded[128] < 1.1 * padded[64]:
        return RightConfig(128, *blocks, 3, 8, True, 200)
    return RightConfig(64, *blocks, 3 if blocks[0] <= 32 else 2, 4, True)


def items_per_program(items: int, other_programs: int) -> int:
    """Key tiles, or rows of a single tile, that a program of `right_kernel` passes over.

    As many as leave enough programs for an even load of the device, whose last wave is then a small part of the whole.
    """
    parts = max(1, _PROGRAMS // max(1, other_programs))
    return max(min(items, 2), -(-items // parts))


def left_config(rows: int, head_dim: int, element_size: int, capability: tuple[int, int]) -> LeftConfig:
    """Of `left_kernel`, for the query rows of a tile."""
    block_d = padded_head_dim(head_dim)
    if element_size == 4 or block_d > 128:
        return LeftConfig(16, 16 if block_d > 128 else 32, 1, 4)
    if capability != HOPPER:
        return LeftConfig(16 if rows <= 16 else 32 if rows <= 32 else 64, 32, 2, 4)
    if rows <= 16:
        return LeftConfig(16, 64, 3, 2)
    if rows <= 32:
        return LeftConfig(32, 64, 3, 4)
    return LeftConfig(128 if rows > 64 and block_d <= 64 else 64, 64, 3, 4)


def average_config(head_dim: int, element_size: int, capability: tuple[int, int]) -> LeftConfig:
    """Of `average_kernel`, for the key rows of a line."""
    block_d = padded_head_dim(head_dim)
    if element_size == 4 or block_d > 128:
        return LeftConfig(16, 16 if block_d > 128 else 32, 1, 4)
    return LeftConfig(64, 32, 2, 4)


def group_size(groups: int, bytes_per_group: int, device: torch.device, workspace_bytes: int | None = None) -> int:
    """How many of the (batch row, head) pairs are computed together: as many as fit in the workspace, at least one.

    `workspace_bytes`: instead of the device's own, for measurements.
    """
    fitting = max(1, min(groups, (workspace_bytes or workspace_of(device)) // bytes_per_group))
    # Of the same size, as far as possible: a small last launch would leave most of the device idle.
    return -(-groups // -(-groups // fitting))


@functools.cache
def workspace_of(device: torch.device) -> int:
    """Bytes for the results between the kernels on `device`."""
    if device.type != "cuda":
        return CPU_WORKSPACE
    return torch.cuda.get_device_properties(device).total_memory // WORKSPACE_SHARE


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of `device`; that of the oldest supported device on the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
