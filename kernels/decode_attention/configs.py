"""Launch configurations of decode_attention: a table, not a search, so that the first call is quick.

Keys are classes of shapes, never the length of the cache: a growing sequence compiles nothing anew.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Programs that a launch aims at for each multiprocessor: all run at once, so that no small wave comes last.
PROGRAMS_PER_MULTIPROCESSOR = 2
# More parts than this cost more to merge than they save.
MAX_SPLITS = 128
# Multiprocessors assumed where there are none to count: in Triton's interpreter.
NOMINAL_MULTIPROCESSORS = 132
# float32 values of a merging program's tile, split by head width.
MERGE_TILE = 4096


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of one program, in query rows and cache columns, the depth of its pipeline and its warps."""

    block_rows: int
    block_columns: int
    num_stages: int
    num_warps: int


# (padded head width, bytes of an element) -> columns, stages, warps. The K and V tiles of all stages lie in shared
# memory, of which devices of capability 8.6 allow a program 99 KB: a test holds every configuration to that.
_TILES = {
    (64, 2): (64, 4, 4),
    (128, 2): (64, 3, 4),
    (256, 2): (32, 3, 4),
    (64, 4): (32, 3, 4),
    (128, 4): (32, 2, 4),
    (256, 4): (16, 2, 4),
}


def padded_width(width: int) -> int:
    """The power of two that a head of `width` is padded to; tensor cores take 16 at least."""
    return max(16, 1 << (width - 1).bit_length())


def launch_config(rows: int, width: int, element_size: int) -> LaunchConfig:
    """For `rows` query rows (queries times heads of a group) that share a key-value head of `width`."""
    padded = padded_width(width)
    # float32 has no tensor cores, and a wide head leaves no registers for more rows.
    most = 16 if element_size == 4 else 32 if padded > 128 else 64
    block_rows = min(most, max(16, 1 << (rows - 1).bit_length()))
    return LaunchConfig(block_rows, *_TILES[max(64, padded), element_size])


def split_count(programs: int, span: int, block_columns: int, multiprocessors: int) -> int:
    """Parts that each of `programs` is cut into, so that all together fill the device.

    From shapes alone, so that a captured launch stays right: `span` is the most columns that a query can see. The
    kernel cuts the columns that there are.
    """
    wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // programs
    return max(1, min(wanted, -(-span // block_columns), MAX_SPLITS))


@functools.cache
def multiprocessor_count(device: torch.device) -> int:
    """Multiprocessors of `device`."""
    if device.type != "cuda":
        return NOMINAL_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
