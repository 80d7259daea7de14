"""Lists of the pairs of query and key blocks that attention must compute."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Tokens of a block.
BLOCK = 128
# Kinds of lists, in the order of `BlockLists.counts` and `BlockLists.lists`.
FULL_KEYS, PARTIAL_KEYS, FULL_QUERIES, PARTIAL_QUERIES = range(4)


class BlockLists(NamedTuple):
    """Blocks of 128 tokens that see each other, listed for attention kernels; NB is the number of blocks of a row.

    A pair of blocks is full when every query of the one sees every key of the other, and is listed as partial when
    some may. The four lists are: full key blocks of each query block, partial key blocks of each query block, full
    query blocks of each key block, partial query blocks of each key block; each in ascending order.

    Attributes:
        counts: int32 [B, 4, NB], entries of each list.
        lists: int32 [B, 4, NB, NB], the lists, 0 from their end on.
        present: int64 [B, NB, W], bitmap of the segments in each block.
    """

    counts: Tensor
    lists: Tensor
    present: Tensor
