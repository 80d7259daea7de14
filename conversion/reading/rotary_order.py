"""The order of rotary channels in the query and key projections of a checkpoint."""

from __future__ import annotations

from torch import Tensor


def to_rotate_half_order(tensor: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows of `tensor` [heads * head_dim, ...] from (0, 1, 2, 3, ...) to (0, 2, ..., 1, 3, ...).

    `tensor` is contiguous and is not changed; head_dim is even.

    Meta's code and llama.cpp rotate channels 2i and 2i + 1 as a pair; transformers' `rotate_half` pairs channel i with
    i + head_dim / 2.
    """
    pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
