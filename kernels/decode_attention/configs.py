"""Launch configurations of decode_attention: a table, not a search, so that the first call is quick.

Keys are classes of shapes, never the length of the cache: a growing sequence does not recompile.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Programs per multiprocessor that a launch aims at: all are resident together, so that no small wave comes last.
PROGRAMS_PER_MULTIPROCESSOR = 2
# More splits than this cost more to combine than they save.
MAX_SPLITS = 128
# Multiprocessors assumed on the CPU, in Triton's interpreter.
NOMINAL_MULTIPROCESSORS = 132
# float32 values of a combining program's tile, [splits, head_dim].
COMBINE_TILE = 4096


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of one program: BLOCK_M query rows by BLOCK_N cache slots, its pipeline stages and its warps."""

    block_m: int
    block_n: int
    num_stages: int
    num_warps: int


# (padded head_dim, bytes of an element) -> block_n, stages, warps. The K and V tiles of all stages lie in shared
# memory, of which devices of capability 8.6 allow a program 99 KB: a test checks every configuration.
_TILES = {
    (64, 2): (64, 4, 4),
    (128, 2): (64, 3, 4),
    (256, 2): (32, 3, 4),
    (64, 4): (32, 3, 4),
    (128, 4): (32, 2, 4),
    (256, 4): (16, 2, 4),
}


def padded_head_dim(head_dim: int) -> int:
    """The power of two that `head_dim` is padded to; tensor cores take 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def launch_config(rows: int, head_dim: int, element_size: int) -> LaunchConfig:
    """For `rows` query rows (queries times heads of a group) that share a key-value head of `head_dim`."""
    padded = padded_head_dim(head_dim)
    # float32 has no tensor cores, and a large head_dim leaves no registers for more rows.
    most = 16 if element_size == 4 else 32 if padded > 128 else 64
    block_m = min(most, max(16, 1 << (rows - 1).bit_length()))
    return LaunchConfig(block_m, *_TILES[max(64, padded), element_size])


def split_count(programs: int, span: int, block_n: int, multiprocessors: int) -> int:
    """Splits of the cache for each of `programs`, so that all together fill the device.

    From shapes alone, so that a captured launch stays right: `span` is the largest number of slots that a query can
    see. The kernel divides the slots that are filled.
    """
    wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // programs
    return max(1, min(wanted, -(-span // block_n), MAX_SPLITS))


@functools.cache
def multiprocessor_count(device: torch.device) -> int:
    """Multiprocessors of `device`."""
    if device.type != "cuda":
        return NOMINAL_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
