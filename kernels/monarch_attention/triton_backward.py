"""Launcher of the Triton kernels of the backward pass of monarch_attention, for one iteration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_efficient.kernels.decode_attention.configs import padded_head_dim
from hf_efficient.kernels.monarch_attention.configs import capability_of, group_size
from hf_efficient.kernels.monarch_attention.geometry import Geometry
from hf_efficient.kernels.monarch_attention.gradient_configs import (
    left_gradient_config,
    query_gradient_config,
    right_gradient_config,
)
from hf_efficient.kernels.monarch_attention.triton_gradients import (
    left_gradient_kernel,
    query_gradient_kernel,
    right_gradient_kernel,
    summary_gradient_kernel,
)
from hf_efficient.kernels.monarch_attention.triton_kernels import Workspace, valid_places


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    geometry: list[int],
    scale: float,
    is_sequence: bool,
    pad_mean: bool,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Args:
        dout: gradient of the output, [B, Nq, H, D] and contiguous, as is `out`.
        out, lse: results of `launch_forward`.
        geometry: fields of `Geometry`.
        workspace_bytes: memory for the results between the kernels, which (batch row, head) pairs share in turn.
    """
    at = Geometry(*geometry)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    batch, heads, query_tokens, head_dim = q.shape
    groups, lines, key_rows = batch * heads, at.query_tiles * at.columns, at.key_tiles * at.rows
    dz_lines = -(-lines // 16) * 16  # rows of dz start at multiples of 16 elements
    per_group = lines * key_rows * ((2 * head_dim + at.columns) * q.element_size() + 12)
    size = group_size(groups, per_group, q.device, workspace_bytes)
    # Binds the device to this thread, which autograd made: the driver encodes descriptors of tensors for it.
    lse.new_zeros(1)
    forward = Workspace(q, k, v, key_mask, at, scale, is_sequence, pad_mean, size)
    dc = torch.empty((size, lines, key_rows), dtype=torch.float32, device=q.device)
    lse_r = torch.empty_like(dc)
    delta = dc.new_empty((size, lines, at.rows))
    dz = torch.empty((size, at.rows, at.key_tiles, at.columns, dz_lines), dtype=q.dtype, device=q.device)
    # The mean of a column's queries has its share of every query's gradient, which is known when all are computed.
    dq_part = dc.new_empty((groups if pad_mean else size, lines, at.rows, head_dim))
    capability = capability_of(q.device)
    left, all_rows = left_gradient_config(at.rows, head_dim, q.element_size(), capability)
    right = right_gradient_config(at.columns, head_dim, q.element_size(), capability)
    query = query_gradient_config(at.columns, head_dim, q.element_size(), capability)
    mask = forward.key_mask
    mask_stride = 0 if mask is None else mask.stride(0)
    common: dict[str, Any] = {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim)}
    common |= {"IS_SEQUENCE": is_sequence, "HAS_MASK": mask is not None}
    of_left = {**common, "BLOCK_M": left.block_m, "BLOCK_N": left.block_n}
    of_left |= {"NUM_STAGES": left.num_stages, "num_warps": left.num_warps}
    of_right = {**common, "BLOCK_M": right.block_m, "BLOCK_L": right.block_n, "PAD_MEAN": pad_mean}
    of_right |= {"NUM_STAGES": right.num_stages, "num_warps": right.num_warps}
    of_query = {**common, "BLOCK_M": query.block_m, "BLOCK_L": query.block_n, "PAD_MEAN": pad_mean}
    of_query |= {"NUM_STAGES": query.num_stages, "num_warps": query.num_warps}
    for first in range(0, groups, size):
        count = min(size, groups - first)
        part = dq_part[first:] if pad_mean else dq_part
        own_lse = lse.view(groups, lines, at.rows)[first:]
        forward.right_step(first, count, averaged=False, with_y=True, lse_r=lse_r)
        summaries = forward.a_l, forward.y, forward.c_l
        numbers = first, heads, query_tokens, scale, forward.qk_scale, *q.stride()[:3], mask_stride, *at
        left_gradient_kernel[(lines * -(-at.rows // left.block_m), count)](
            part, dc, delta, dout, q, out, *summaries, own_lse, mask, *numbers, SUMMARIES=all_rows, **of_left
        )
        if not all_rows:
            summary_gradient_kernel[(lines * -(-key_rows // left.block_n), count)](
                dc, delta, dout, q, *summaries, own_lse, mask, *numbers, **of_left
            )
        da, dy, e = summaries  # which the kernels have replaced
        blocks_l = -(-at.columns // right.block_n)
        right_gradient_kernel[(key_rows * blocks_l, count)](
            *(dk, dv, dz, q, k, v, da, dy, dc, e, lse_r, mask),
            None if forward.pad_query is None else forward.pad_query[first:],
            *(first, heads, query_tokens, k.shape[2], scale, forward.qk_scale),
            *(stride for x in (q, k, v, dk, dv) for stride in x.stride()[:3]),
            *(mask_stride, *at, dz_lines),
            **of_right,
        )
        query_gradient_kernel[(-(-lines // query.block_m) * at.rows, count)](
            *(dq, part, dz, k, mask, first, heads, query_tokens, k.shape[2]),
            *(*k.stride()[:3], *dq.stride()[:3], mask_stride, *at, dz_lines),
            **of_query,
        )
    if pad_mean:
        _share_means(dq, dq_part, mask, at)
    return dq, dk, dv


def _share_means(dq: Tensor, dq_part: Tensor, key_mask: Tensor | None, at: Geometry) -> None:
    """Write dq, where padded and masked queries are the mean of the valid ones of their column.

    `dq_part` [B * H, columns, rows, D] are the gradients of all queries, those of a mean among them.
    """
    batch, heads, tokens, head_dim = dq.shape
    before, _, valid = valid_places(dq, key_mask, at)
    part = dq_part.view(batch, heads, at.columns, at.rows, head_dim).transpose(2, 3)
    shared = torch.where(valid, 0.0, part).sum(2, keepdim=True) / valid.sum(2, keepdim=True).clamp(min=1)
    total = torch.where(valid, part + shared, 0.0).flatten(2, 3)
    dq.copy_(total[:, :, before : before + tokens])
