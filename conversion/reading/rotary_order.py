"""The two orders in which checkpoints store the rotary channels of queries and keys."""

from __future__ import annotations

from torch import Tensor


def split_halves(tensor: Tensor, heads: int) -> Tensor:
    """Of each head's rows, neighbouring pairs (0, 1, 2, 3, …) become the two halves (0, 2, …, 1, 3, …).

    Meta's code, and llama.cpp after it, turns neighbouring channels of the first dimension together; transformers turns
    channel i with i + head_dim / 2.
    """
    pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
