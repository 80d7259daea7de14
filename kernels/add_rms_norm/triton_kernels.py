"""Triton kernel of add_rms_norm and its launchers. Arguments are checked by `api.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.kernels.add_rms_norm.configs import launch_config
from hf_efficient.kernels.overlap import overlap_options
from hf_efficient.kernels.triton_language import HAVE_TRITON, tl, triton
from hf_efficient.kernels.validate import rows_contiguous

if HAVE_TRITON:
    from hf_efficient.kernels.overlap import prefetch

    @triton.jit
    def _sum_tile(x, residual, offsets, residual_offsets, mask):
        """Tile of x + residual, rounded to the dtype of x as it is stored, in float32."""
        tile = tl.load(x + offsets, mask=mask, other=0.0)
        if residual is not None:
            residual_tile = tl.load(residual + residual_offsets, mask=mask, other=0.0)
            tile = (tile.to(tl.float32) + residual_tile.to(tl.float32)).to(x.dtype.element_ty)
        return tile.to(tl.float32)

    @triton.jit
    def _normalise(tile, rstd, weight):
        """tile * rstd * weight, rounded between the two products, as the stock families do."""
        normalised = (tile * rstd[:, None]).to(weight.dtype)
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
        offs_d = tl.arange(0, BLOCK_WIDTH)
        if WHOLE_ROW:
            inside = offs_d < width
            mask = in_rows & inside[None, :]
            if OVERLAP:
                # Prefetch the weight while the kernel that writes x is still running.
                prefetch(weight + tl.where(inside, offs_d, 0))
                tl.extra.cuda.gdc_wait()
            w = tl.load(weight + offs_d, mask=inside, other=0.0)
            tile = _sum_tile(x, residual, x_row + offs_d[None, :], residual_row + offs_d[None, :], mask)
            if summed is not None:
                tl.store(summed + out_row + offs_d[None, :], tile.to(summed.dtype.element_ty), mask=mask)
            rstd = tl.rsqrt(tl.sum(tile * tile, axis=1) / width + eps)
            tl.store(normed + out_row + offs_d[None, :], _normalise(tile, rstd, w), mask=mask)
        else:
            if OVERLAP:
                tl.extra.cuda.gdc_wait()
            squares = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], dtype=tl.float32)
            for start in range(0, width, BLOCK_WIDTH):
                offsets = start + offs_d[None, :]
                mask = in_rows & (offsets < width)
                tile = _sum_tile(x, residual, x_row + offsets, residual_row + offsets, mask)
                if summed is not None:
                    tl.store(summed + out_row + offsets, tile.to(summed.dtype.element_ty), mask=mask)
                squares += tile * tile
            rstd = tl.rsqrt(tl.sum(squares, axis=1) / width + eps)
            for start in range(0, width, BLOCK_WIDTH):
                offsets = start + offs_d[None, :]
                mask = in_rows & (offsets < width)
                # Read and added again, from the cache: so wide a row does not fit in registers.
                tile = _sum_tile(x, residual, x_row + offsets, residual_row + offsets, mask)
                w = tl.load(weight + start + offs_d, mask=start + offs_d < width, other=0.0)
                tl.store(normed + out_row + offsets, _normalise(tile, rstd, w), mask=mask)


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
