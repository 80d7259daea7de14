"""Triton kernels of skinny_linear and their launcher. Arguments are checked by `api.py`.

A GEMV for one row of x; a GEMM for more, split along K where that makes too few programs otherwise (split-K). The
weights are not packed: the program id selects one of up to three matrices. Each weight is read once, by one program.
With split-K the programs store partial sums in float32, and `reduce_splits_kernel` adds them in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_efficient.kernels.overlap import overlap_options
from hf_efficient.kernels.skinny_linear.configs import (
    REDUCE_COLUMNS,
    REDUCE_WARPS,
    LaunchConfig,
    k_per_split,
    launch_config,
    row_class,
)
from hf_efficient.kernels.triton_language import HAVE_TRITON, tl, triton

if HAVE_TRITON:
    from hf_efficient.kernels.overlap import SECTOR, prefetch

    @triton.jit
    def _locate(program, n0, n1, BLOCK_N: tl.constexpr):
        """Matrix of a program, the program's first row in it, and the output column where the matrix begins."""
        blocks0, blocks1 = tl.cdiv(n0, BLOCK_N), tl.cdiv(n1, BLOCK_N)
        in_second = (program >= blocks0).to(tl.int32)
        in_third = (program >= blocks0 + blocks1).to(tl.int32)
        first = (program - in_second * blocks0 - in_third * blocks1) * BLOCK_N
        return in_second + in_third, first, in_second * n0 + in_third * n1

    @triton.jit
    def _pick(matrix, of0, of1, of2):
        """The value for `matrix` of those for the three matrices; None for absent ones."""
        picked = of0
        if of1 is not None:
            picked = tl.where(matrix == 1, of1, picked)
        if of2 is not None:
            picked = tl.where(matrix == 2, of2, picked)
        return picked

    @triton.jit
    def _bias(b, offs_n, size, BLOCK_N: tl.constexpr):
        """Biases of rows `offs_n` of a matrix with `size` rows, in float32; zero where there is none."""
        bias = tl.zeros([BLOCK_N], dtype=tl.float32)
        if b is not None:
            bias = tl.load(b + offs_n, mask=offs_n < size, other=0.0).to(tl.float32)
        return bias

    @triton.jit
    def _picked_bias(matrix, b0, b1, b2, offs_n, size, BLOCK_N: tl.constexpr):
        """Biases of rows `offs_n` of `matrix`; any of the three biases may be None."""
        bias = _bias(b0, offs_n, tl.where(matrix == 0, size, 0), BLOCK_N)
        bias += _bias(b1, offs_n, tl.where(matrix == 1, size, 0), BLOCK_N)
        return bias + _bias(b2, offs_n, tl.where(matrix == 2, size, 0), BLOCK_N)

    @triton.jit
    def _silu(x):
        return x / (1.0 + tl.exp(-x))

    @triton.jit
    def _weight_tile(w_rows, offs_k, mask_n, K: tl.constexpr, BLOCK_K: tl.constexpr):
        """[BLOCK_N, BLOCK_K] of a weight, whose rows start at the pointers `w_rows`. Read once, so evicted first."""
        mask = mask_n[:, None] if K % BLOCK_K == 0 else mask_n[:, None] & (offs_k < K)[None, :]
        return tl.load(w_rows[:, None] + offs_k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")

    @triton.jit
    def _prefetch_tile(w, offs_n, size, stride, K: tl.constexpr, BLOCK_K: tl.constexpr):
        """Prefetch the first BLOCK_K elements of rows `offs_n` of a weight; out-of-range indices are replaced by 0."""
        STEP: tl.constexpr = SECTOR // (w.dtype.element_ty.primitive_bitwidth // 8)
        row = tl.where(offs_n < size, offs_n, 0).to(tl.int64)
        offs_k = tl.arange(0, BLOCK_K // STEP) * STEP
        prefetch(w + row[:, None] * stride + tl.where(offs_k < K, offs_k, 0)[None, :])

    @triton.jit
    def gemv_kernel(
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
        K: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """GEMV: one row of x. Products accumulate element by element; threads are reduced once, after the loop."""
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
        if GATED:
            matrix, first, base = 0, tl.program_id(0) * BLOCK_N, 0
            w, size, stride = w0, n0, stride0
        else:
            matrix, first, base = _locate(tl.program_id(0), n0, n1, BLOCK_N)
            w, size = _pick(matrix, w0, w1, w2), _pick(matrix, n0, n1, n2)
            stride = _pick(matrix, stride0, stride1, stride2)
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < size
        w_rows = w + offs_n.to(tl.int64) * stride
        if GATED:
            up_rows = w1 + offs_n.to(tl.int64) * stride1
            up_acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        if OVERLAP:
            # Prefetch the first weights while the kernel that writes x is still running.
            _prefetch_tile(w, offs_n, size, stride, K, BLOCK_K)
            if GATED:
                _prefetch_tile(w1, offs_n, size, stride1, K, BLOCK_K)
            tl.extra.cuda.gdc_wait()
        offs_k = tl.arange(0, BLOCK_K)
        tile = _weight_tile(w_rows, offs_k, mask_n, K, BLOCK_K)
        if GATED:
            up_tile = _weight_tile(up_rows, offs_k, mask_n, K, BLOCK_K)
        acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for start_k in range(0, K, BLOCK_K):
            x_tile = tl.load(x + start_k + offs_k, mask=start_k + offs_k < K, other=0.0).to(tl.float32)[None, :]
            # Software pipelining: the next tile is loaded before this one is used; past K everything is masked.
            next_k = start_k + BLOCK_K + offs_k
            # Masks come from blocks of one element: the interpreter has none from scalars.
            next_mask = mask_n & (start_k + BLOCK_K + tl.arange(0, 1) < K)
            next_tile = _weight_tile(w_rows, next_k, next_mask, K, BLOCK_K)
            if GATED:
                next_up_tile = _weight_tile(up_rows, next_k, next_mask, K, BLOCK_K)
                up_acc += up_tile.to(tl.float32) * x_tile
                up_tile = next_up_tile
            acc += tile.to(tl.float32) * x_tile
            tile = next_tile
        result = tl.sum(acc, axis=1)
        if GATED:
            gate = result + _bias(b0, offs_n, n0, BLOCK_N)
            result = _silu(gate) * (tl.sum(up_acc, axis=1) + _bias(b1, offs_n, n0, BLOCK_N))
        else:
            result += _picked_bias(matrix, b0, b1, b2, offs_n, size, BLOCK_N)
        if residual is not None:
            result += tl.load(residual + base + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        tl.store(out + base + offs_n, result.to(out.dtype.element_ty), mask=mask_n)

    @triton.jit(do_not_specialize=["rows"])
    def gemm_kernel(
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
        K: tl.constexpr,
        K_PER_SPLIT: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """GEMM: up to BLOCK_M rows of x. The weight is the left operand, so that x is the short side of the product.

        With K_PER_SPLIT below K (split-K), programs (., i) take the i-th split of K, and `out` is [splits, rows, N].
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
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < size
        w_rows = w + offs_n.to(tl.int64) * stride
        acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        if GATED:
            up_rows = w1 + offs_n.to(tl.int64) * stride1
            up_acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        offs_m = tl.arange(0, BLOCK_M)
        x_rows = x + offs_m.to(tl.int64) * x_stride
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        begin, end = 0, K
        if K_PER_SPLIT < K:
            begin = tl.program_id(1) * K_PER_SPLIT
            end = tl.minimum(begin + K_PER_SPLIT, K)
        for start_k in range(begin, end, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            mask_m = (offs_m < rows)[None, :]
            x_mask = mask_m if K % BLOCK_K == 0 else mask_m & (offs_k < K)[:, None]
            x_tile = tl.load(x_rows[None, :] + offs_k[:, None], mask=x_mask, other=0.0)
            tile = _weight_tile(w_rows, offs_k, mask_n, K, BLOCK_K)
            acc = tl.dot(tile, x_tile, acc, input_precision="ieee")
            if GATED:
                up_tile = _weight_tile(up_rows, offs_k, mask_n, K, BLOCK_K)
                up_acc = tl.dot(up_tile, x_tile, up_acc, input_precision="ieee")
        if GATED:
            gate = acc + _bias(b0, offs_n, n0, BLOCK_N)[:, None]
            acc = _silu(gate) * (up_acc + _bias(b1, offs_n, n0, BLOCK_N)[:, None])
        else:
            acc += _picked_bias(matrix, b0, b1, b2, offs_n, size, BLOCK_N)[:, None]
        result = tl.trans(acc)
        out_row = offs_m.to(tl.int64)
        if K_PER_SPLIT < K:
            out_row += tl.program_id(1).to(tl.int64) * rows
        offsets = out_row[:, None] * width + base + offs_n[None, :]
        mask = (offs_m < rows)[:, None] & mask_n[None, :]
        if residual is not None:
            result += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def reduce_splits_kernel(
        out,
        partial,
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
        """Sum of `partial` [SPLITS, rows, N] over the splits, plus biases and residual.

        Programs are (BLOCK_N columns of one matrix, row).
        """
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        matrix, first, base = _locate(tl.program_id(0), n0, n1, BLOCK_N)
        size, width = _pick(matrix, n0, n1, n2), n0 + n1 + n2
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < size
        offsets = tl.program_id(1).to(tl.int64) * width + base + offs_n
        split_stride = tl.num_programs(1).to(tl.int64) * width
        acc = tl.zeros([BLOCK_N], dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            acc += tl.load(partial + split * split_stride + offsets, mask=mask_n, other=0.0)
        acc += _picked_bias(matrix, b0, b1, b2, offs_n, size, BLOCK_N)
        if residual is not None:
            acc += tl.load(residual + offsets, mask=mask_n, other=0.0).to(tl.float32)
        tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask_n)


def _capability(device: torch.device) -> tuple[int, int]:
    # The interpreter has no limits and uses the configurations of the newest devices.
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    gated: bool,
    config: LaunchConfig | None = None,
) -> Tensor:
    """The operation on x [rows, K]; see `api.py`.

    `config` replaces that of the table, for measurements. One with `splits` above one supports neither `gated` nor a
    single row.
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
        "K": depth,  # a model has two or three values of K, and knowing their divisors saves masks
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **overlap,
    }
    if padded == 1:
        gemv_kernel[(blocks,)](out, x, *matrices, *biases, residual, *numbers, *strides, **options)
        return out
    extent = (rows, *numbers, x.stride(0), *strides)
    if config.splits == 1:
        gemm_kernel[(blocks,)](
            out, x, *matrices, *biases, residual, *extent, BLOCK_M=padded, K_PER_SPLIT=depth, **options
        )
        return out
    split_len = k_per_split(config, depth)
    splits = triton.cdiv(depth, split_len)
    partial = torch.empty((splits, rows, width), dtype=torch.float32, device=x.device)
    no_epilogue = (None,) * 4  # `reduce_splits_kernel` adds biases and residual
    gemm_kernel[(blocks, splits)](
        partial, x, *matrices, *no_epilogue, *extent, BLOCK_M=padded, K_PER_SPLIT=split_len, **options
    )
    reduce_splits_kernel[(_blocks(sizes, REDUCE_COLUMNS), rows)](
        out,
        partial,
        *biases,
        residual,
        *numbers,
        SPLITS=splits,
        BLOCK_N=REDUCE_COLUMNS,
        num_warps=REDUCE_WARPS,
        **overlap,
    )
    return out


def _blocks(sizes: Sequence[int], height: int) -> int:
    """Programs of `height` rows that cover matrices of `sizes` rows, none of them spanning two matrices."""
    return sum(triton.cdiv(size, height) for size in sizes)
