"""The weights of Monarch attention as a dense matrix, and the objective that they maximise: for tests and analysis."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.kernels.monarch_attention.layout import GridLayout, SequenceLayout
from hf_efficient.kernels.monarch_attention.reference import arrange, monarch_factors, tiles_per_chunk, visible_tiles


def monarch_matrix(
    q: Tensor,
    k: Tensor,
    layout: SequenceLayout | GridLayout,
    *,
    num_iters: int = 1,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    causal_frames: int | None = None,
) -> Tensor:
    """The attention weights P [B, H, Nq, Nk] for which `monarch_attention` returns ``P @ v``.

    In float32, or float64 where `q` has it; the arguments are those of `monarch_attention`, which does not form P.
    Rows of masked queries and columns of keys that are not seen are zero.
    """
    (batch, heads, num_queries, head_dim), num_keys = q.shape, k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = head_dim**-0.5 if scale is None else scale
    q, k, _, q_valid, k_valid = arrange(q.to(wide), k.to(wide), k.to(wide), layout, key_mask)
    query_index, key_index = layout.token_index(num_queries, q.device), layout.token_index(num_keys, q.device)
    # One more row and column, which padding is written to.
    weights = q.new_zeros(batch, heads, num_queries + 1, num_keys + 1)
    for tile, seen in visible_tiles(q.shape[2], k.shape[2], tiles_per_chunk(layout, causal_frames)):
        k_seen, valid = k[:, :, :seen], k_valid[:, :, :seen]
        right, log_left = monarch_factors(q[:, :, tile], k_seen, q_valid[:, :, tile], valid, layout, num_iters, scale)
        left = log_left.exp().unflatten(4, (seen, -1))
        # [B, H, rows, columns] of the query, then [f, rows, columns] of the key.
        product = torch.einsum("bhjifk,bhfkjl->bhijfkl", left, right) * q_valid[:, :, tile, ..., None, None, None]
        rows, columns = query_index[tile].flatten(), key_index[:seen].flatten()
        weights[:, :, rows[:, None], columns] = product.flatten(2, 3).flatten(3)
    return weights[:, :, :num_queries, :num_keys]


def monarch_objective(weights: Tensor, q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
    """The objective ``sum P * S - sum P log P`` of weights P [B, H, Nq, Nk], for scores S = scale * q kᵀ: [B, H].

    Softmax attention is its maximum over all weights whose rows sum to 1, the sum of the rows' log-sum-exp of S. The
    distance from there is the sum over rows of the Kullback-Leibler divergence of P from softmax attention.
    """
    scores = (q.shape[3] ** -0.5 if scale is None else scale) * (q @ k.transpose(-1, -2))
    return (weights * scores.to(weights.dtype) - torch.xlogy(weights, weights)).sum((2, 3))
