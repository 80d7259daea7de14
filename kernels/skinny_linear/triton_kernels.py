"""Triton kernels of skinny_linear and the function that launches them.

No checks of arguments: `api.py` sees to those. The weights stay where they are: a program finds out from its number
which of up to three matrices its rows of weights are in. A weight is read once, by one program. Where the depth is cut
into parts, the programs leave sums in float32, and `sum_kernel` adds them, always in the order of the parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_efficient.kernels.overlap import overlap_options
from hf_efficient.kernels.skinny_linear.configs import (
    SUM_COLUMNS,
    SUM_WARPS,
    LaunchConfig,
    launch_config,
    part_depth,
    row_class,
)

try:
    import triton
    import triton.language as tl

    from hf_efficient.kernels.overlap import SECTOR, prefetch

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False


if HAVE_TRITON:

    @triton.jit
    def _locate(program, n0, n1, BLOCK_N: tl.constexpr):
        """Matrix that a program works on, its first row there, and the column of the output where the matrix begins."""
        blocks0, blocks1 = tl.cdiv(n0, BLOCK_N), tl.cdiv(n1, BLOCK_N)
        in_second = (program >= blocks0).to(tl.int32)
        in_third = (program >= blocks0 + blocks1).to(tl.int32)
        first = (program - in_second * blocks0 - in_third * blocks1) * BLOCK_N
        return in_second + in_third, first, in_second * n0 + in_third * n1

    @triton.jit
    def _pick(matrix, of0, of1, of2):
        """The value that belongs to the matrix; those of absent matrices are None."""
        picked = of0
        if of1 is not None:
            picked = tl.where(matrix == 1, of1, picked)
        if of2 is not None:
            picked = tl.where(matrix == 2, of2, picked)
        return picked

    @triton.jit
    def _bias(b, n, size, BLOCK_N: tl.constexpr):
        """Biases of rows n of a matrix with `size` rows, in float32; zero where there is none."""
        bias = tl.zeros([BLOCK_N], dtype=tl.float32)
        if b is not None:
            bias = tl.load(b + n, mask=n < size, other=0.0).to(tl.float32)
        return bias

    @triton.jit
    def _picked_bias(matrix, b0, b1, b2, n, size, BLOCK_N: tl.constexpr):
        """Biases of rows n of the matrix that the program works on; any of the three may be None."""
        bias = _bias(b0, n, tl.where(matrix == 0, size, 0), BLOCK_N)
        bias += _bias(b1, n, tl.where(matrix == 1, size, 0), BLOCK_N)
        return bias + _bias(b2, n, tl.where(matrix == 2, size, 0), BLOCK_N)

    @triton.jit
    def _silu(x):
        return x / (1.0 + tl.exp(-x))

    @triton.jit
    def _weight_tile(row_start, k, inside, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
        """[BLOCK_N, BLOCK_K] of a weight, whose rows start at the pointers `row_start`. Read once, so first to go."""
        mask = inside[:, None] if DEPTH % BLOCK_K == 0 else inside[:, None] & (k < DEPTH)[None, :]
        return tl.load(row_start[:, None] + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")

    @triton.jit
    def _prefetch_tile(w, n, size, stride, DEPTH: tl.constexpr, BLOCK_K: tl.constexpr):
        """Rows n of a weight, their first BLOCK_K columns; the first row or column in place of what is not there."""
        STEP: tl.constexpr = SECTOR // (w.dtype.element_ty.primitive_bitwidth // 8)
        row = tl.where(n < size, n, 0).to(tl.int64)
        k = tl.arange(0, BLOCK_K // STEP) * STEP
        prefetch(w + row[:, None] * stride + tl.where(k < DEPTH, k, 0)[None, :])

    @triton.jit
    def vector_kernel(
        out,
        x,
        w0,
        w1,
        w2,
        b0,
        b1,
        b2,
        residual,
        n0,
        n1,
        n2,
        stride0,
        stride1,
        stride2,
        GATED: tl.constexpr,
        DEPTH: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """One row of x. The products are added up in place; lanes are summed once, at the end."""
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
        if GATED:
            matrix, first, base = 0, tl.program_id(0) * BLOCK_N, 0
            w, size, stride = w0, n0, stride0
        else:
            matrix, first, base = _locate(tl.program_id(0), n0, n1, BLOCK_N)
            w, size = _pick(matrix, w0, w1, w2), _pick(matrix, n0, n1, n2)
            stride = _pick(matrix, stride0, stride1, stride2)
        n = first + tl.arange(0, BLOCK_N)
        inside = n < size
        row_start = w + n.to(tl.int64) * stride
        if GATED:
            up_start = w1 + n.to(tl.int64) * stride1
            up_total = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        if OVERLAP:
            # The first weights are on their way before the kernel that makes x has finished.
            _prefetch_tile(w, n, size, stride, DEPTH, BLOCK_K)
            if GATED:
                _prefetch_tile(w1, n, size, stride1, DEPTH, BLOCK_K)
            tl.extra.cuda.gdc_wait()
        k = tl.arange(0, BLOCK_K)
        tile = _weight_tile(row_start, k, inside, DEPTH, BLOCK_K)
        if GATED:
            up_tile = _weight_tile(up_start, k, inside, DEPTH, BLOCK_K)
        total = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for start in range(0, DEPTH, BLOCK_K):
            xs = tl.load(x + start + k, mask=start + k < DEPTH, other=0.0).to(tl.float32)[None, :]
            # The next tile is fetched while this one is worked on; past the end nothing is.
            ahead = start + BLOCK_K + k
            more = inside & (start + BLOCK_K + tl.arange(0, 1) < DEPTH)  # the interpreter has no masks from scalars
            next_tile = _weight_tile(row_start, ahead, more, DEPTH, BLOCK_K)
            if GATED:
                next_up_tile = _weight_tile(up_start, ahead, more, DEPTH, BLOCK_K)
                up_total += up_tile.to(tl.float32) * xs
                up_tile = next_up_tile
            total += tile.to(tl.float32) * xs
            tile = next_tile
        result = tl.sum(total, axis=1)
        if GATED:
            gate = result + _bias(b0, n, n0, BLOCK_N)
            result = _silu(gate) * (tl.sum(up_total, axis=1) + _bias(b1, n, n0, BLOCK_N))
        else:
            result += _picked_bias(matrix, b0, b1, b2, n, size, BLOCK_N)
        if residual is not None:
            result += tl.load(residual + base + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + base + n, result.to(out.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["rows"])
    def matrix_kernel(
        out,
        x,
        w0,
        w1,
        w2,
        b0,
        b1,
        b2,
        residual,
        rows,
        n0,
        n1,
        n2,
        x_stride,
        stride0,
        stride1,
        stride2,
        GATED: tl.constexpr,
        DEPTH: tl.constexpr,
        PART: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """Up to ROWS rows of x. The weight is the left factor, so that the few rows are the short side.

        With PART below DEPTH, programs (., i) take the i-th part of the depth, and `out` is [parts, rows, N].
        """
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
        if GATED:
            matrix, first, base, width = 0, tl.program_id(0) * BLOCK_N, 0, n0
            w, size, stride = w0, n0, stride0
        else:
            matrix, first, base = _locate(tl.program_id(0), n0, n1, BLOCK_N)
            w, size = _pick(matrix, w0, w1, w2), _pick(matrix, n0, n1, n2)
            stride = _pick(matrix, stride0, stride1, stride2)
            width = n0 + n1 + n2
        n = first + tl.arange(0, BLOCK_N)
        inside = n < size
        row_start = w + n.to(tl.int64) * stride
        total = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
        if GATED:
            up_start = w1 + n.to(tl.int64) * stride1
            up_total = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
        row = tl.arange(0, ROWS)
        x_start = x + row.to(tl.int64) * x_stride
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        begin, end = 0, DEPTH
        if PART < DEPTH:
            begin = tl.program_id(1) * PART
            end = tl.minimum(begin + PART, DEPTH)
        for start in range(begin, end, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x_mask = (row < rows)[None, :] if DEPTH % BLOCK_K == 0 else (row < rows)[None, :] & (k < DEPTH)[:, None]
            xs = tl.load(x_start[None, :] + k[:, None], mask=x_mask, other=0.0)
            tile = _weight_tile(row_start, k, inside, DEPTH, BLOCK_K)
            total = tl.dot(tile, xs, total, input_precision="ieee")
            if GATED:
                up_tile = _weight_tile(up_start, k, inside, DEPTH, BLOCK_K)
                up_total = tl.dot(up_tile, xs, up_total, input_precision="ieee")
        if GATED:
            gate = total + _bias(b0, n, n0, BLOCK_N)[:, None]
            total = _silu(gate) * (up_total + _bias(b1, n, n0, BLOCK_N)[:, None])
        else:
            total += _picked_bias(matrix, b0, b1, b2, n, size, BLOCK_N)[:, None]
        result = tl.trans(total)
        out_row = row.to(tl.int64)
        if PART < DEPTH:
            out_row += tl.program_id(1).to(tl.int64) * rows
        place = out_row[:, None] * width + base + n[None, :]
        mask = (row < rows)[:, None] & inside[None, :]
        if residual is not None:
            result += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + place, result.to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def sum_kernel(
        out,
        parts,
        b0,
        b1,
        b2,
        residual,
        n0,
        n1,
        n2,
        SPLITS: tl.constexpr,
        BLOCK_N: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """Programs are (columns of one matrix, row): parts [SPLITS, rows, N] added up, then biases and residual."""
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        matrix, first, base = _locate(tl.program_id(0), n0, n1, BLOCK_N)
        size, width = _pick(matrix, n0, n1, n2), n0 + n1 + n2
        n = first + tl.arange(0, BLOCK_N)
        inside = n < size
        place = tl.program_id(1).to(tl.int64) * width + base + n
        distance = tl.num_programs(1).to(tl.int64) * width
        total = tl.zeros([BLOCK_N], dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(parts + split * distance + place, mask=inside, other=0.0)
        total += _picked_bias(matrix, b0, b1, b2, n, size, BLOCK_N)
        if residual is not None:
            total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def _capability(device: torch.device) -> tuple[int, int]:
    # In the interpreter, which has no limits, as on the newest.
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    gated: bool,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Linear maps of x [rows, K], see `api.py`; the configuration is the one from the table unless another is given.

    One with `splits` above one does not go with `gated`, nor with a single row.
    """
    rows, depth = x.shape
    sizes = [weight.shape[0] for weight in weights]
    width = sizes[0] if gated else sum(sizes)
    out = x.new_empty((rows, width))
    if rows == 0:
        return out
    padded = row_class(rows)
    if config is None:
        config = launch_config(padded, width, depth, x.element_size(), gated, _capability(x.device))
    x = x if x.stride(1) == 1 else x.contiguous()
    absent = (None,) * (3 - len(weights))
    zeros = (0,) * len(absent)
    biases = (*(None if bias is None else bias.contiguous() for bias in biases), *absent)
    residual = None if residual is None else residual.contiguous()
    strides = (*(weight.stride(0) for weight in weights), *zeros)
    matrices, numbers = (*weights, *absent), (*sizes, *zeros)
    blocks = _blocks(sizes[:1] if gated else sizes, config.block_n)
    overlap = overlap_options(x.device, rows)
    options = {
        "GATED": gated,
        "DEPTH": depth,  # a model has two or three, and what they divide by saves masks
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **overlap,
    }
    if padded == 1:
        vector_kernel[(blocks,)](out, x, *matrices, *biases, residual, *numbers, *strides, **options)
        return out
    extent = (rows, *numbers, x.stride(0), *strides)
    if config.splits == 1:
        matrix_kernel[(blocks,)](out, x, *matrices, *biases, residual, *extent, ROWS=padded, PART=depth, **options)
        return out
    part = part_depth(config, depth)
    splits = triton.cdiv(depth, part)
    parts = torch.empty((splits, rows, width), dtype=torch.float32, device=x.device)
    nothing = (None,) * 4  # biases and residual are not for the parts
    matrix_kernel[(blocks, splits)](parts, x, *matrices, *nothing, *extent, ROWS=padded, PART=part, **options)
    sum_kernel[(_blocks(sizes, SUM_COLUMNS), rows)](
        out, parts, *biases, residual, *numbers, SPLITS=splits, BLOCK_N=SUM_COLUMNS, num_warps=SUM_WARPS, **overlap
    )
    return out


def _blocks(sizes: Sequence[int], height: int) -> int:
    """Programs that matrices of so many rows need when none takes rows of two."""
    return sum(triton.cdiv(size, height) for size in sizes)
