"""topology_blocks over the Triton kernels: the operator for tracing."""

from __future__ import annotations

from torch import Tensor

from hf_efficient.kernels.operators import define_operator
from hf_efficient.kernels.topology_blocks.block_lists import BLOCK


def _launch(segment_ids: Tensor, segment_visibility: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from hf_efficient.kernels.topology_blocks.triton_kernels import launch

    counts, lists, present = launch(segment_ids, segment_visibility)
    return counts, lists, present


def _fake(segment_ids: Tensor, segment_visibility: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, blocks = segment_ids.shape[0], -(-segment_ids.shape[1] // BLOCK)
    counts = segment_ids.new_empty((rows, 4, blocks))
    return (
        counts,
        segment_ids.new_empty((rows, 4, blocks, blocks)),
        segment_visibility.new_empty((rows, blocks, segment_visibility.shape[2])),
    )


# The fields of `BlockLists`.
topology_blocks_forward = define_operator("topology_blocks", _launch, _fake)
