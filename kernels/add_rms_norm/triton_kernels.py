"""Triton kernel of add_rms_norm and the functions that launch it. No checks of arguments: `api.py` sees to those."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.kernels.add_rms_norm.configs import launch_config
from hf_efficient.kernels.overlap import overlap_options
from hf_efficient.kernels.validate import rows_contiguous

try:
    import triton
    import triton.language as tl

    from hf_efficient.kernels.overlap import prefetch

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False


if HAVE_TRITON:

    @triton.jit
    def _sum_tile(x, residual, at, residual_at, mask):
        """Tile of x + residual, rounded as it is kept, in float32."""
        tile = tl.load(x + at, mask=mask, other=0.0)
        if residual is not None:
            addend = tl.load(residual + residual_at, mask=mask, other=0.0)
            tile = (tile.to(tl.float32) + addend.to(tl.float32)).to(x.dtype.element_ty)
        return tile.to(tl.float32)

    @triton.jit
    def _scaled(tile, scale, weight):
        """Rounded between the two products, as the stock families do."""
        normalised = (tile * scale[:, None]).to(weight.dtype)
        return (normalised.to(tl.float32) * weight.to(tl.float32)[None, :]).to(weight.dtype)

    @triton.jit(do_not_specialize=["rows"])
    def add_rms_norm_kernel(
        normed,
        summed,
        x,
        residual,
        weight,
        eps,
        rows,
        width,
        x_stride,
        residual_stride,
        WHOLE_ROW: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
        row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        in_rows = (row < rows)[:, None]
        x_row, residual_row, out_row = row[:, None] * x_stride, row[:, None] * residual_stride, row[:, None] * width
        column = tl.arange(0, BLOCK_WIDTH)
        if WHOLE_ROW:
            inside = column < width
            mask = in_rows & inside[None, :]
            if OVERLAP:
                # The weight is on its way before the kernel that makes x has finished.
                prefetch(weight + tl.where(inside, column, 0))
                tl.extra.cuda.gdc_wait()
            w = tl.load(weight + column, mask=inside, other=0.0)
            tile = _sum_tile(x, residual, x_row + column[None, :], residual_row + column[None, :], mask)
            if summed is not None:
                tl.store(summed + out_row + column[None, :], tile.to(summed.dtype.element_ty), mask=mask)
            scale = tl.rsqrt(tl.sum(tile * tile, axis=1) / width + eps)
            tl.store(normed + out_row + column[None, :], _scaled(tile, scale, w), mask=mask)
        else:
            if OVERLAP:
                tl.extra.cuda.gdc_wait()
            squares = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], dtype=tl.float32)
            for start in range(0, width, BLOCK_WIDTH):
                at = start + column[None, :]
                mask = in_rows & (at < width)
                tile = _sum_tile(x, residual, x_row + at, residual_row + at, mask)
                if summed is not None:
                    tl.store(summed + out_row + at, tile.to(summed.dtype.element_ty), mask=mask)
                squares += tile * tile
            scale = tl.rsqrt(tl.sum(squares, axis=1) / width + eps)
            for start in range(0, width, BLOCK_WIDTH):
                at = start + column[None, :]
                mask = in_rows & (at < width)
                # Read and added again instead of kept: the cache has it, the registers would not.
                tile = _sum_tile(x, residual, x_row + at, residual_row + at, mask)
                w = tl.load(weight + start + column, mask=start + column < width, other=0.0)
                tl.store(normed + out_row + at, _scaled(tile, scale, w), mask=mask)


def _launch(
    normed: Tensor, summed: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> None:
    rows, width = x.shape
    if rows == 0:
        return
    config = launch_config(rows, width)
    add_rms_norm_kernel[(triton.cdiv(rows, config.block_rows),)](
        normed,
        summed,
        x,
        residual,
        weight.contiguous(),
        eps,
        rows,
        width,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        WHOLE_ROW=width <= config.block_width,
        BLOCK_ROWS=config.block_rows,
        BLOCK_WIDTH=config.block_width,
        num_warps=config.num_warps,
        **overlap_options(x.device, rows),
    )


def launch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS normalisation of x [rows, D]."""
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(normed, None, rows_contiguous(x), None, weight, eps)
    return normed


def launch_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS normalisation of x + residual, [rows, D] both, and that sum."""
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(normed, summed, rows_contiguous(x), rows_contiguous(residual), weight, eps)
    return normed, summed
