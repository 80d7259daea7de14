"""monarch_attention in plain PyTorch: the definition of the operation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_efficient.kernels.monarch_attention.layout import GridLayout, SequenceLayout
from hf_efficient.kernels.precision import without_autocast


class Factors(NamedTuple):
    """The two factors of one query tile's attention weights, for f key tiles.

    The weight of the key in row k and column l of key tile f, for the query in row i and column j, is
    ``exp(log_left[j, i, f * rows + k]) * right[f, k, j, l]``.

    Attributes:
        right: R, [B, H, f, rows, columns, columns]: softmax over the keys of a row, one for each column of queries.
        log_left: log L, [B, H, columns, rows, f * rows]: log-softmax over the rows of all key tiles; -inf for rows
            without a valid key.
    """

    right: Tensor
    log_left: Tensor


def monarch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout | GridLayout,
    *,
    num_iters: int = 1,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    causal_frames: int | None = None,
) -> Tensor:
    """Monarch attention of q [B, H, Nq, D] to k, v [B, H, Nk, D]; see `api.py`."""
    num_queries, head_dim = q.shape[2:]
    dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = head_dim**-0.5 if scale is None else scale
    q, k, v, q_valid, k_valid = arrange(q.to(wide), k.to(wide), v.to(wide), layout, key_mask)
    tiles_of_chunk = tiles_per_chunk(layout, causal_frames)
    attended = []
    with without_autocast(q.device.type):
        for tile, seen in visible_tiles(q.shape[2], k.shape[2], tiles_of_chunk):
            k_seen, v_seen, valid = k[:, :, :seen], v[:, :, :seen], k_valid[:, :, :seen]
            factors = monarch_factors(q[:, :, tile], k_seen, q_valid[:, :, tile], valid, layout, num_iters, scale)
            # [B, H, columns, f * rows, D]: what a query reads if it picks a row.
            summaries = (factors.right @ v_seen).permute(0, 1, 4, 2, 3, 5).flatten(3, 4)
            attended.append((factors.log_left.exp() @ summaries).transpose(2, 3))
    out = torch.stack(attended, dim=2) if attended else q
    out = out.masked_fill(~q_valid[..., None], 0.0)
    # The place of each token: padding, which has index -1, is sorted to the front.
    index = layout.token_index(num_queries, q.device).flatten()
    out = out.flatten(2, 4)[:, :, index.argsort()[index.numel() - num_queries :]]
    return out.transpose(1, 2).to(dtype).contiguous().transpose(1, 2)


def arrange(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout | GridLayout, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as [B, H, tiles, rows, columns, D], and which queries and keys are neither padding nor masked.

    The last two are bool [B or 1, 1, tiles, rows, columns]. Padded and masked tokens are zero, whatever they held:
    0 * NaN is NaN.
    """
    arranged, valid = [], []
    for x in (q, k, v):
        index = layout.token_index(x.shape[2], x.device)
        present = (index >= 0)[None, None]
        token = index.clamp(min=0).flatten()
        if key_mask is not None:
            present = present & key_mask[:, token].view(-1, 1, *index.shape)
        tiled = x[:, :, token].unflatten(2, tuple(index.shape))
        arranged.append(tiled.masked_fill(~present[..., None], 0.0))
        valid.append(present)
    q, k, v = arranged
    return q, k, v, valid[0], valid[1]


def tiles_per_chunk(layout: SequenceLayout | GridLayout, causal_frames: int | None) -> int | None:
    """Tiles of one causal chunk; None where there are no chunks."""
    if causal_frames is None or not isinstance(layout, GridLayout):
        return None
    return causal_frames // layout.f_tied * layout.h_reduce * layout.w_reduce


def visible_tiles(query_tiles: int, key_tiles: int, tiles_of_chunk: int | None) -> Iterator[tuple[int, int]]:
    """Each query tile with the number of key tiles that it attends to: those of its own chunk and of earlier chunks."""
    for tile in range(query_tiles):
        yield tile, key_tiles if tiles_of_chunk is None else (tile // tiles_of_chunk + 1) * tiles_of_chunk


def monarch_factors(
    q: Tensor,
    k: Tensor,
    q_valid: Tensor,
    k_valid: Tensor,
    layout: SequenceLayout | GridLayout,
    num_iters: int,
    scale: float,
) -> Factors:
    """The factors of one query tile's attention weights after `num_iters` iterations.

    Args:
        q: [B, H, rows, columns, D], the queries of the tile.
        k: [B, H, f, rows, columns, D], the keys that they attend to.
        q_valid: bool [B or 1, 1, rows, columns]: False for padded and masked queries.
        k_valid: bool [B or 1, 1, f, rows, columns]: False for padded and masked keys.
        layout: says what stands for padded and masked queries.
        num_iters: alternations of the two steps.
        scale: factor of the scores.
    """
    tiles, rows, columns = k.shape[2:5]
    alive = k_valid.any(-1)  # rows with a valid key, [B or 1, 1, f, rows]
    alive_flat = alive.flatten(2)[:, :, None, None]  # [B or 1, 1, 1, 1, f * rows]
    attends = alive_flat.any(-1, keepdim=True)
    q_columns = q.transpose(2, 3)  # [B, H, columns, rows, D]
    # The query that chooses among the keys of row k for all queries of column j: first that of row k, later a mean.
    averaged_q = fill_invalid_queries(q, q_valid, layout)[:, :, None].expand(-1, -1, tiles, -1, -1, -1)
    for step in range(num_iters):
        # R-step: which keys a column of queries reads in each row.
        scores = scale * (averaged_q @ k.transpose(-1, -2))
        # Rows without a valid key keep their scores here, so that no softmax is over nothing, and become zero below.
        scores = scores.masked_fill(~(k_valid | ~alive[..., None])[..., None, :], float("-inf"))
        log_right = scores.log_softmax(-1)
        right = log_right.exp().masked_fill(~alive[..., None, None], 0.0)
        # 0 log 0 = 0: -inf only where right is zero.
        negative_entropy = (right * log_right.masked_fill(~k_valid[..., None, :], 0.0)).sum(-1)
        expected_keys = scale * (right @ k)
        # L-step: which rows each query reads. The entropy favours rows in which the choice is wide.
        expected_keys = expected_keys.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)  # [B, H, columns, f * rows, D]
        negative_entropy = negative_entropy.permute(0, 1, 4, 2, 3).flatten(3)[..., None, :]
        row_scores = q_columns @ expected_keys.transpose(-1, -2) - negative_entropy
        log_left = row_scores.masked_fill(~(alive_flat | ~attends), float("-inf")).log_softmax(-1)
        # A sequence without any valid key attends to nothing.
        log_left = log_left.masked_fill(~alive_flat, float("-inf"))
        if step + 1 < num_iters:
            # The mean of a column's queries by their share of the row. It equals sum_i L q / sum_i L, and does not
            # divide by a sum that may vanish.
            counted = q_valid.transpose(2, 3)[..., None] & alive_flat  # [B or 1, 1, columns, rows, f * rows]
            some = counted.any(3, keepdim=True)
            shares = log_left.masked_fill(~(counted | ~some), float("-inf")).masked_fill(~some, 0.0).softmax(3)
            mean = (shares.transpose(-1, -2) @ q_columns).unflatten(3, (tiles, rows)).permute(0, 1, 3, 4, 2, 5)
            some = some.squeeze(3).unflatten(3, (tiles, rows)).permute(0, 1, 3, 4, 2)[..., None]
            averaged_q = torch.where(some, mean, averaged_q)
    return Factors(right, log_left)


def fill_invalid_queries(q: Tensor, q_valid: Tensor, layout: SequenceLayout | GridLayout) -> Tensor:
    """q [B, H, rows, columns, D], which is zero where it is not valid, with what `layout` puts in these places."""
    if isinstance(layout, GridLayout) or layout.pad_queries == "zero":
        return q
    mean = q.sum(2, keepdim=True) / q_valid.sum(2, keepdim=True).clamp(min=1)[..., None]
    return torch.where(q_valid[..., None], q, mean)
