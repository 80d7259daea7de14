"""Counts the occurrences of each token in a text, and sorts counts into the buckets by which reports split metrics."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Bucket = Literal["0", "1-3", "4-31", "32+"]
BUCKETS: tuple[Bucket, ...] = get_args(Bucket)
# Lowest count of each bucket.
_LOWEST = (0, 1, 4, 32)


def occurrences(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(counts [size], fp32, first_only [size], bool) of the token ids 0..`size` - 1.

    `first_only` is True for ids that occur at no position other than the first of a sequence.

    The first position of a sequence is an attention sink: its activations are hundreds of times larger whatever the
    token, so one such occurrence would dominate the sums of its token. First positions are therefore counted only for
    tokens that occur nowhere else, such as BOS.

    Args:
        ids: token ids [B, S], all below `size`.
    """
    first, later = (torch.bincount(part.flatten(), minlength=size) for part in (ids[:, :1], ids[:, 1:]))
    return torch.where(later > 0, later, first).float(), later == 0


def bucket_of(count: Tensor) -> Tensor:
    """The index into `BUCKETS` of each count, int64, in the shape of `count`."""
    return torch.bucketize(count, torch.tensor(_LOWEST, device=count.device), right=True) - 1
