"""Launchers of the Triton kernels of monarch_attention; `api.py` checks the arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_efficient.kernels.decode_attention.configs import padded_head_dim
from hf_efficient.kernels.monarch_attention.configs import (
    LeftConfig,
    RightConfig,
    average_config,
    capability_of,
    group_size,
    items_per_program,
    left_config,
    right_config,
)
from hf_efficient.kernels.monarch_attention.geometry import Geometry
from hf_efficient.kernels.monarch_attention.triton_forward import average_kernel, left_kernel, right_kernel
from hf_efficient.kernels.triton_language import TensorDescriptor


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    geometry: list[int],
    num_iters: int,
    scale: float,
    is_sequence: bool,
    pad_mean: bool,
    with_lse: bool,
    right: RightConfig | None = None,
    left: LeftConfig | None = None,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, Nq, H, D], and the log-sum-exp (base 2) of the L-step [B, H, lines, rows], empty without `with_lse`.

    The log-sum-exp of a query that is masked or padding, or that attends to nothing, is +inf.

    Args:
        geometry: fields of `Geometry`.
        right, left, workspace_bytes: instead of those of the table, for measurements.
    """
    at = Geometry(*geometry)
    batch, heads, query_tokens, head_dim = q.shape
    out = torch.empty((batch, query_tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    lines, key_rows = at.query_tiles * at.columns, at.key_tiles * at.rows
    lse = torch.empty((batch, heads, lines if with_lse else 0, at.rows), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    groups = batch * heads
    per_group = lines * key_rows * (2 * head_dim * q.element_size() + 4)
    size = group_size(groups, per_group, q.device, workspace_bytes)
    workspace = Workspace(q, k, v, key_mask, at, scale, is_sequence, pad_mean, size, right)
    for first in range(0, groups, size):
        workspace.right_step(first, min(size, groups - first), averaged=False, with_y=num_iters == 1)
        for step in range(1, num_iters):
            workspace.average(first, min(size, groups - first))
            workspace.right_step(first, min(size, groups - first), averaged=True, with_y=step == num_iters - 1)
        workspace.left_step(
            first, min(size, groups - first), out, lse.view(groups, lines, -1)[first:] if with_lse else None, left
        )
    return out, lse


class Workspace:
    """The results between the kernels for `size` pairs of (batch row, head), and the launches that use them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        at: Geometry,
        scale: float,
        is_sequence: bool,
        pad_mean: bool,
        size: int,
        right: RightConfig | None = None,
    ) -> None:
        self.q, self.k, self.v, self.at = q, k, v, at
        self.key_mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.head_dim, self.lines, self.key_rows = q.shape[3], at.query_tiles * at.columns, at.key_tiles * at.rows
        self.qk_scale = scale * math.log2(math.e)
        self.is_sequence = is_sequence
        self.capability = capability_of(q.device)
        self.right = right or right_config(at.columns, self.lines, self.head_dim, q.element_size(), self.capability)
        self.pad_query = _column_means(q, self.key_mask, at) if pad_mean else None
        shape = (size, self.lines, self.key_rows)
        self.a_l = torch.empty((*shape, self.head_dim), dtype=q.dtype, device=q.device)
        self.y = torch.empty_like(self.a_l)
        self.c_l = torch.empty(shape, dtype=torch.float32, device=q.device)
        self.averaged_lse: Tensor | None = None

    def right_step(self, first: int, count: int, *, averaged: bool, with_y: bool, lse_r: Tensor | None = None) -> None:
        """`a_l`, `c_l` and, if asked, `y` of `count` groups from `first`.

        Args:
            averaged: with the queries in `a_l` instead of `q`.
            lse_r: if given, gets the log-sum-exp (base 2) of each line and key row; +inf without a valid key.
        """
        config, at = self.right, self.at
        block_d = padded_head_dim(self.head_dim)
        use_tma = (
            config.use_tma
            and self.head_dim == block_d
            and at.contiguous_columns
            and self.key_mask is None
            and all(_tma_readable(x) for x in (self.q, self.k, self.v))
        )
        # A sequence is a single tile.
        loop_rows = use_tma and self.is_sequence and not averaged and self.pad_query is None

        def tiles(x: Tensor, rows: int, by_tma: bool = use_tma) -> Any:
            if not by_tma or rows == 0:
                return x
            return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, block_d])

        blocks = -(-self.lines // config.block_m)
        if loop_rows:
            items = items_per_program(at.rows, blocks * count)
            grid = (-(-at.rows // items) * blocks, count, 1)
        else:
            items = items_per_program(at.key_tiles, blocks * at.rows * count)
            grid = (at.rows * blocks, count, -(-at.key_tiles // items))
        right_kernel[grid](
            tiles(self.q, config.block_m, loop_rows),
            tiles(self.k, config.block_l),
            tiles(self.v, config.block_l),
            tiles(self.k, config.tail_l),
            tiles(self.v, config.tail_l),
            self.a_l,
            self.y,
            self.c_l,
            self.key_mask,
            self.pad_query[first:] if self.pad_query is not None else None,
            self.a_l,
            lse_r,
            first,
            self.q.shape[1],
            self.q.shape[2],
            self.k.shape[2],
            self.qk_scale,
            *self.q.stride()[:3],
            *self.k.stride()[:3],
            *self.v.stride()[:3],
            self.key_mask.stride(0) if self.key_mask is not None else 0,
            *at,
            items,
            LOOP_ROWS=loop_rows,
            HEAD_DIM=self.head_dim,
            BLOCK_D=block_d,
            BLOCK_M=config.block_m,
            BLOCK_L=config.block_l,
            TAIL_L=config.tail_l,
            STREAM=config.stream,
            IS_SEQUENCE=self.is_sequence,
            HAS_MASK=self.key_mask is not None,
            PAD_MEAN=self.pad_query is not None and not averaged,
            AVERAGED=averaged,
            WITH_Y=with_y,
            WITH_LSE=lse_r is not None,
            USE_TMA=use_tma,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
            **({"maxnreg": config.max_registers} if config.max_registers else {}),
        )

    def left_step(
        self, first: int, count: int, out: Tensor | None, lse: Tensor | None, config: LeftConfig | None = None
    ) -> None:
        """Write the output of all groups, and the log-sum-exp [count, lines, rows] of these, each if given."""
        at = self.at
        config = config or left_config(at.rows, self.head_dim, self.q.element_size(), self.capability)
        blocks = -(-at.rows // config.block_m)
        left_kernel[(self.lines * blocks, count)](
            out if out is not None else self.q,
            lse if lse is not None else self.c_l,
            self.q,
            self.a_l,
            self.y,
            self.c_l,
            self.key_mask,
            first,
            self.q.shape[1],
            self.q.shape[2],
            self.qk_scale,
            *self.q.stride()[:3],
            self.key_mask.stride(0) if self.key_mask is not None else 0,
            *at,
            HEAD_DIM=self.head_dim,
            BLOCK_D=padded_head_dim(self.head_dim),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            IS_SEQUENCE=self.is_sequence,
            HAS_MASK=self.key_mask is not None,
            WITH_OUT=out is not None,
            WITH_LSE=lse is not None,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
        )

    def average(self, first: int, count: int) -> None:
        """Replace `a_l` by the averaged queries of the next iteration."""
        at = self.at
        if self.averaged_lse is None:
            self.averaged_lse = torch.empty(
                (self.a_l.shape[0], self.lines, at.rows), dtype=torch.float32, device=self.q.device
            )
        self.left_step(first, count, None, self.averaged_lse)
        config = average_config(self.head_dim, self.q.element_size(), self.capability)
        blocks = -(-self.key_rows // config.block_m)
        average_kernel[(self.lines * blocks, count)](
            self.a_l,
            self.averaged_lse,
            self.q,
            first,
            self.q.shape[1],
            self.q.shape[2],
            self.qk_scale,
            *self.q.stride()[:3],
            *at[:-1],
            HEAD_DIM=self.head_dim,
            BLOCK_D=padded_head_dim(self.head_dim),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            IS_SEQUENCE=self.is_sequence,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
        )


def valid_places(q: Tensor, key_mask: Tensor | None, at: Geometry) -> tuple[int, int, Tensor]:
    """Padding in front of and behind the tokens of `q`, and which places hold a query that is neither it nor masked.

    The last is bool [B, 1, rows, columns, 1].
    """
    batch, _, tokens, _ = q.shape
    before, after = -at.shift, at.rows * at.columns - tokens + at.shift
    valid = q.new_ones((batch, tokens), dtype=torch.bool) if key_mask is None else key_mask.bool()
    return before, after, torch.nn.functional.pad(valid, (before, after)).view(batch, 1, at.rows, at.columns, 1)


def _column_means(q: Tensor, key_mask: Tensor | None, at: Geometry) -> Tensor:
    """Mean over the valid queries of each column [B * H, columns, D]; zero where a column has none."""
    batch, heads, _, head_dim = q.shape
    before, after, valid = valid_places(q, key_mask, at)
    padded = torch.nn.functional.pad(q.float(), (0, 0, before, after))
    padded = padded.view(batch, heads, at.rows, at.columns, head_dim)
    total = torch.where(valid, padded, 0.0).sum(2)
    return (total / valid.sum(2).clamp(min=1)).to(q.dtype).view(batch * heads, at.columns, head_dim)


def _tma_readable(x: Tensor) -> bool:
    """True where the tensor memory accelerator can read `x`: strides of whole 16 bytes, none of them zero."""
    return x.data_ptr() % 16 == 0 and all(
        stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3]
    )
