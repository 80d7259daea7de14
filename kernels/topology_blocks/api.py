"""Public function of the operation topology_blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.kernels.topology_blocks.block_lists import BlockLists
from hf_efficient.kernels.topology_blocks.reference import topology_blocks as reference_topology_blocks
from hf_efficient.kernels.validate import check_dtype, check_rank, check_tensors

OP = "topology_blocks"


def topology_blocks(segment_ids: Tensor, segment_visibility: Tensor, *, backend: str | None = None) -> BlockLists:
    """Lists of the pairs of 128-token blocks that `topology_attention` must compute; it skips the others.

    With ``present`` the segments of a key block and ``some``, ``every`` those that some, and that all, queries of a
    query block see: a pair is skipped where the query block comes first or ``present & some`` is empty; it is full
    where the query block comes after, ``present`` lies in ``every`` and no key is a hole; else it is partial. One call
    serves all layers and heads, without a device synchronisation.

    Args:
        segment_ids: [B, S], int32: segment of each token, negative for padding and other holes.
        segment_visibility: [B, N, W] or [1, N, W], int64: bitmap of the segments that each segment sees, itself
            among them; bit s is bit s % 64 of word s // 64. Segments from N on see nothing, and
            those that the words do not reach are not seen.
        backend: ``"reference"``, ``"triton"``, or None: what `HFE_BACKEND` names, else Triton on CUDA and the reference
            elsewhere.

    Returns:
        `BlockLists`: counts int32 [B, 4, NB], lists int32 [B, 4, NB, NB], present int64 [B, NB, W], NB = ⌈S / 128⌉.

    Raises:
        HFEError: wrong shape, dtype or device.
        BackendError: the named backend cannot run here.

    Source: block masks are those of FlexAttention (arXiv:2412.05496); classification by segments is our own.

    Example:
        >>> import torch
        >>> segments = torch.tensor([[0] * 128 + [1] * 128 + [2] * 128], dtype=torch.int32)
        >>> topology_blocks(segments, torch.tensor([[[0b001], [0b011], [0b101]]])).counts[0, :2].tolist()
        [[0, 1, 1], [1, 1, 1]]
    """
    check_segments(OP, segment_ids, segment_visibility)
    if select_backend(OP, backend, segment_ids.device) == "reference":
        return reference_topology_blocks(segment_ids, segment_visibility)
    from hf_efficient.kernels.topology_blocks.op import topology_blocks_forward

    return BlockLists(*topology_blocks_forward(segment_ids, segment_visibility))


def check_segments(op: str, segment_ids: Tensor, segment_visibility: Tensor) -> None:
    """Raise HFEError for segments and bitmaps of a wrong shape, dtype or device."""
    check_tensors(op, {"segment_ids": segment_ids, "segment_visibility": segment_visibility})
    check_dtype(op, "segment_ids", segment_ids, (torch.int32,))
    check_dtype(op, "segment_visibility", segment_visibility, (torch.int64,))
    check_rank(op, "segment_ids", segment_ids, 2, 2, "[B, S]")
    check_rank(op, "segment_visibility", segment_visibility, 3, 3, "[B, N, W] or [1, N, W]")
    if segment_visibility.shape[0] not in (1, segment_ids.shape[0]):
        raise HFEError(
            f"{op}: `segment_visibility` has shape {tuple(segment_visibility.shape)} for {segment_ids.shape[0]} rows "
            "of `segment_ids`",
            "its shape must be [B, N, W] or [1, N, W]",
        )
