"""How often a text holds each token, and the buckets by which reports split what they measure."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Bucket = Literal["0", "1-3", "4-31", "32+"]
BUCKETS: tuple[Bucket, ...] = get_args(Bucket)
# Lowest count of each bucket.
_LOWEST = (0, 1, 4, 32)


def occurrences(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """How often each token of 0..size - 1 counts [size], fp32, and which occur at first positions only [size], bool.

    The first position of a sequence is where a decoder parks its attention: whatever the token, its activations are
    there hundreds of times larger, and one such occurrence would drown all others of its token. So it counts only for
    tokens that occur nowhere else, such as a BOS.

    Args:
        ids: tokens [B, S].
    """
    first, later = (torch.bincount(part.flatten(), minlength=size) for part in (ids[:, :1], ids[:, 1:]))
    return torch.where(later > 0, later, first).float(), later == 0


def bucket_of(count: Tensor) -> Tensor:
    """Position in `BUCKETS` of counts of any shape."""
    return torch.bucketize(count, torch.tensor(_LOWEST, device=count.device), right=True) - 1
