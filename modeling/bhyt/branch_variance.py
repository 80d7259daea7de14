"""The mean square that attention is expected to add to the residual stream, from the weights of v_proj and o_proj."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def branch_variance(
    value_weight: Tensor,
    output_weight: Tensor,
    value_bias: Tensor | None,
    *,
    head_dim: int,
    seq_len: int,
) -> Tensor:
    """Return ``c = ||W_O repeat(W_V)||_F^2 / (T d)`` and ``||W_O repeat(b_V)||^2 / d`` as a float32 tensor [2].

    d is the hidden size; repeat is `repeat_kv` of grouped-query attention. If attention is uniform over T independent
    positions, the expected mean square of ``W_O attention(W_V x)`` is c times the variance of x. A bias of v_proj is
    the same at all positions, so averaging over positions does not reduce it. The bias of o_proj is left out.

    Args:
        value_weight: W_V [num_key_value_heads * head_dim, d].
        output_weight: W_O [d, num_attention_heads * head_dim]; consecutive heads share a key-value head.
        value_bias: b_V [num_key_value_heads * head_dim], or None for 0. All three are on one device and of any
            floating-point dtype.
        head_dim: channels of a head.
        seq_len: T, the length of the training sequences.

    Computed in float32, also under autocast, without gradients.

    Source: arXiv:2601.09719, Assumption 3.3; the term of the bias is not in the paper.
    """
    with torch.autocast(value_weight.device.type, enabled=False):
        values, outputs = value_weight.float(), output_weight.float()
        inner, width = values.shape
        heads = inner // head_dim
        # Heads of one group use the same values, so adding their slices of W_O first saves repeating W_V.
        folded = outputs.view(outputs.shape[0], heads, -1, head_dim).sum(2).reshape(-1, inner)
        if 2 * inner < width:  # ||A B||^2 = <A'A, BB'>: two small products instead of a large one
            square = (folded.T @ folded * (values @ values.T)).sum().clamp(min=0)
        else:
            square = (folded @ values).square().sum()
        constant = square.new_zeros(()) if value_bias is None else (folded @ value_bias.float()).square().sum()
        return torch.stack((square / (seq_len * width), constant / width))
