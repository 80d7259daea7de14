"""The custom operator of topology_blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hf_efficient.kernels.operators import define_operator
from hf_efficient.kernels.topology_blocks.block_lists import BLOCK, BlockLists


def _load_launcher() -> Callable[..., BlockLists]:
    from hf_efficient.kernels.topology_blocks.triton_kernels import launch

    return launch


def _fake(segment_ids: Tensor, segment_visibility: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, blocks = segment_ids.shape[0], -(-segment_ids.shape[1] // BLOCK)
    return (
        segment_ids.new_empty((rows, 4, blocks)),
        segment_ids.new_empty((rows, 4, blocks, blocks)),
        segment_visibility.new_empty((rows, blocks, segment_visibility.shape[2])),
    )


# The fields of `BlockLists`.
topology_blocks_forward = define_operator("topology_blocks", _load_launcher, _fake)
