"""Triton kernels of bhyt_norm and their launchers. Arguments are checked by `api.py`, autograd is in `op.py`.

The symbols of the formulas are those of `README.md`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hf_efficient.environment import triton_interpreted
from hf_efficient.kernels.bhyt_norm.configs import REDUCE_COLUMNS, backward_config, forward_config
from hf_efficient.kernels.bhyt_norm.reference import LEAST_SHARE, compute_dtype
from hf_efficient.kernels.overlap import overlap_options
from hf_efficient.kernels.triton_language import HAVE_TRITON, tl, triton
from hf_efficient.kernels.validate import rows_contiguous

if HAVE_TRITON:
    from hf_efficient.kernels.overlap import prefetch

    _TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

    @triton.jit
    def _tanh_approx(u):
        """The tanh instruction; its relative error is at most 2^-11."""
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)

    @triton.jit
    def _reciprocal_approx(x):
        """The reciprocal instruction."""
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def _tanh(u, APPROXIMATE: tl.constexpr):
        """Accurate to the last digits unless APPROXIMATE; a series for small u, where (1 - e) / (1 + e) cancels."""
        if APPROXIMATE:
            return _tanh_approx(u)
        else:
            e = tl.exp(-2.0 * tl.abs(u))
            large = (1.0 - e) / (1.0 + e)
            q = u * u
            series = q * (-1382.0 / 155925.0 + q * (21844.0 / 6081075.0 - q * (929569.0 / 638512875.0)))
            series = q * (-1.0 / 3.0 + q * (2.0 / 15.0 + q * (-17.0 / 315.0 + q * (62.0 / 2835.0 + series))))
            return tl.where(tl.abs(u) < 0.25, u + u * series, tl.where(u < 0.0, -large, large))

    @triton.jit
    def _tanh_derivative(u, APPROXIMATE: tl.constexpr):
        """Derivative of tanh as 4 e / (1 + e)^2; 1 - tanh^2 would cancel for a large u."""
        e = tl.exp(-2.0 * tl.abs(u))
        if APPROXIMATE:
            r = _reciprocal_approx(1.0 + e)
            return 4.0 * e * r * r
        else:
            return 4.0 * e / ((1.0 + e) * (1.0 + e))

    @triton.jit
    def _affine_estimate(affine, branch, first_bound, KAPPA: tl.constexpr, COMPUTE_DTYPE: tl.constexpr):
        """Slope, intercept and term of the estimate ``slope * v + intercept * term``."""
        slope, intercept, term = (
            tl.full([], 1.0, COMPUTE_DTYPE),
            tl.full([], 1.0, COMPUTE_DTYPE),
            tl.full([], 1.0, COMPUTE_DTYPE),
        )
        if affine is not None:
            slope, intercept = tl.load(affine).to(COMPUTE_DTYPE), tl.load(affine + 1).to(COMPUTE_DTYPE)
        if branch is not None:
            ratio = tl.load(first_bound).to(COMPUTE_DTYPE) / KAPPA
            term = tl.load(branch).to(COMPUTE_DTYPE) * ratio * ratio + tl.load(branch + 1).to(COMPUTE_DTYPE)
        return slope, intercept, term

    @triton.jit
    def _mean_square(v, slope, intercept, term, ESTIMATED: tl.constexpr, LEAST: tl.constexpr):
        """Mean square estimated from v, its derivative by v, and 1 where it is not clamped (0 where it is)."""
        if ESTIMATED:
            estimate = slope * v + intercept * term
            # NaN is not clamped, so that it propagates.
            clamped = estimate < LEAST * v
            return tl.where(clamped, LEAST * v, estimate), tl.where(clamped, LEAST, slope), tl.where(clamped, 0.0, 1.0)
        else:
            return v, v * 0.0 + 1.0, v * 0.0 + 1.0

    @triton.jit(do_not_specialize=["rows"])
    def forward_kernel(
        normed,
        summed,
        variance,
        x,
        residual,
        weight,
        bound,
        affine,
        branch,
        first_bound,
        out_scale,
        rows,
        width,
        x_stride,
        residual_stride,
        scale_stride,
        EPS: tl.constexpr,
        KAPPA: tl.constexpr,
        EXACT: tl.constexpr,
        ESTIMATED: tl.constexpr,
        LEAST: tl.constexpr,
        COMPUTE_DTYPE: tl.constexpr,
        APPROXIMATE: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
        row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offs_d = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
        inside = offs_d < width
        mask = (row < rows)[:, None] & inside[None, :]
        if OVERLAP:
            # Prefetch the weight while the kernel that writes x is still running.
            prefetch(weight + tl.where(inside, offs_d, 0))
            tl.extra.cuda.gdc_wait()
        # Load everything that does not depend on the row's sum first: with few rows, each later load adds its latency.
        w = tl.load(weight + offs_d, mask=inside, other=0.0).to(COMPUTE_DTYPE)
        if out_scale is not None:
            w = w * tl.load(out_scale + offs_d * scale_stride, mask=inside, other=0.0).to(COMPUTE_DTYPE)
        lam = tl.load(bound).to(COMPUTE_DTYPE)
        if not EXACT:
            v = tl.load(variance + row, mask=row < rows, other=1.0).to(COMPUTE_DTYPE)
            slope, intercept, term = _affine_estimate(affine, branch, first_bound, KAPPA, COMPUTE_DTYPE)
        s = tl.load(x + row[:, None] * x_stride + offs_d[None, :], mask=mask, other=0.0)
        if residual is not None:
            residual_tile = tl.load(residual + row[:, None] * residual_stride + offs_d[None, :], mask=mask, other=0.0)
            # Rounded to the stored dtype, so that the mean square is that of the stored values.
            s = (s.to(COMPUTE_DTYPE) + residual_tile.to(COMPUTE_DTYPE)).to(summed.dtype.element_ty)
            tl.store(summed + row[:, None] * width + offs_d[None, :], s, mask=mask)
        s = s.to(COMPUTE_DTYPE)
        if EXACT:
            mean_square = tl.sum(s * s, axis=1) / width
            tl.store(variance + row, mean_square, mask=row < rows)
        else:
            mean_square, _, _ = _mean_square(v, slope, intercept, term, ESTIMATED, LEAST)
        scale = lam / KAPPA / tl.sqrt(mean_square + EPS)
        out = w[None, :] * _tanh(scale[:, None] * s, APPROXIMATE)
        tl.store(normed + row[:, None] * width + offs_d[None, :], out.to(normed.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["rows", "row_steps"])
    def backward_kernel(
        dx,
        dvariance,
        partial,
        dnormed,
        dsummed,
        dv,
        summed,
        variance,
        weight,
        bound,
        affine,
        branch,
        first_bound,
        out_scale,
        rows,
        row_steps,
        width,
        partial_stride,
        dnormed_stride,
        dsummed_stride,
        summed_stride,
        scale_stride,
        EPS: tl.constexpr,
        KAPPA: tl.constexpr,
        EXACT: tl.constexpr,
        ESTIMATED: tl.constexpr,
        LEAST: tl.constexpr,
        COMPUTE_DTYPE: tl.constexpr,
        APPROXIMATE: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
        NUM_STAGES: tl.constexpr,
    ):
        # Programs take interleaved rows, so that neighbouring programs read neighbouring memory.
        program, programs = tl.program_id(0), tl.num_programs(0)
        offs_d = tl.arange(0, BLOCK_WIDTH)
        inside = offs_d < width
        w = tl.load(weight + offs_d, mask=inside, other=0.0).to(COMPUTE_DTYPE)
        if out_scale is not None:
            w = w * tl.load(out_scale + offs_d * scale_stride, mask=inside, other=0.0).to(COMPUTE_DTYPE)
        lam = tl.load(bound).to(COMPUTE_DTYPE)
        slope, intercept, term = _affine_estimate(affine, branch, first_bound, KAPPA, COMPUTE_DTYPE)
        weight_sum = tl.zeros([BLOCK_WIDTH], dtype=COMPUTE_DTYPE)
        bound_sum = tl.zeros([BLOCK_ROWS], dtype=COMPUTE_DTYPE)
        slope_sum = tl.zeros([BLOCK_ROWS], dtype=COMPUTE_DTYPE)
        intercept_sum = tl.zeros([BLOCK_ROWS], dtype=COMPUTE_DTYPE)
        # Pipelined: the rows of the next steps are loaded while this one is computed.
        for step in tl.range(0, row_steps, num_stages=NUM_STAGES):
            row = (step * programs + program).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            in_rows = row < rows
            mask = in_rows[:, None] & inside[None, :]
            s = tl.load(summed + row[:, None] * summed_stride + offs_d[None, :], mask=mask, other=0.0).to(COMPUTE_DTYPE)
            g = tl.load(dnormed + row[:, None] * dnormed_stride + offs_d[None, :], mask=mask, other=0.0).to(
                COMPUTE_DTYPE
            )
            v = tl.load(variance + row, mask=in_rows, other=1.0).to(COMPUTE_DTYPE)
            mean_square, dmean_square_dv, unclamped = _mean_square(v, slope, intercept, term, ESTIMATED, LEAST)
            r = 1.0 / (KAPPA * tl.sqrt(mean_square + EPS))
            u = (lam * r)[:, None] * s
            weight_sum += tl.sum(g * _tanh(u, APPROXIMATE), axis=0)
            q = g * w[None, :] * _tanh_derivative(u, APPROXIMATE)
            a = tl.sum(q * s, axis=1)
            bound_sum += r * a
            dmean_square = -0.5 * lam * r * a / (mean_square + EPS)
            d = (lam * r)[:, None] * q
            if EXACT:
                if dv is not None:
                    dmean_square += tl.load(dv + row, mask=in_rows, other=0.0).to(COMPUTE_DTYPE)
                d += (2.0 * dmean_square / width)[:, None] * s
            else:
                tl.store(dvariance + row, dmean_square_dv * dmean_square, mask=in_rows)
                slope_sum += tl.where(in_rows, unclamped * dmean_square * v, 0.0)
                intercept_sum += tl.where(in_rows, unclamped * dmean_square * term, 0.0)
            if dsummed is not None:
                offsets = row[:, None] * dsummed_stride + offs_d[None, :]
                d += tl.load(dsummed + offsets, mask=mask, other=0.0).to(COMPUTE_DTYPE)
            tl.store(dx + row[:, None] * width + offs_d[None, :], d.to(dx.dtype.element_ty), mask=mask)
        partial += program.to(tl.int64) * partial_stride
        tl.store(partial + offs_d, weight_sum, mask=inside)
        tl.store(partial + width, tl.sum(bound_sum, axis=0))
        tl.store(partial + width + 1, tl.sum(slope_sum, axis=0))
        tl.store(partial + width + 2, tl.sum(intercept_sum, axis=0))

    @triton.jit(do_not_specialize=["programs"])
    def reduce_partials_kernel(
        dweight,
        dbound,
        daffine,
        partial,
        out_scale,
        programs,
        width,
        partial_stride,
        scale_stride,
        COMPUTE_DTYPE: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
    ):
        """Sums of the programs' partial gradients, in a fixed order."""
        offs_d = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
        inside = offs_d < width + 3
        total = tl.zeros([BLOCK_WIDTH], dtype=COMPUTE_DTYPE)
        for start in range(0, programs, BLOCK_ROWS):
            program = start + tl.arange(0, BLOCK_ROWS)
            offsets = program[:, None].to(tl.int64) * partial_stride + offs_d[None, :]
            total += tl.sum(
                tl.load(partial + offsets, mask=(program < programs)[:, None] & inside[None, :], other=0.0), axis=0
            )
        bound_part = tl.sum(tl.where(offs_d == width, total, 0.0), axis=0)
        if daffine is not None:
            is_affine = (offs_d > width) & (offs_d < width + 3)
            tl.store(daffine + (offs_d - width - 1), total.to(daffine.dtype.element_ty), mask=is_affine)
        if width // BLOCK_WIDTH == tl.program_id(0):
            tl.store(dbound, bound_part.to(dbound.dtype.element_ty))
        if out_scale is not None:
            scale = tl.load(out_scale + offs_d * scale_stride, mask=offs_d < width, other=0.0)
            total = total * scale.to(COMPUTE_DTYPE)
        tl.store(dweight + offs_d, total.to(dweight.dtype.element_ty), mask=offs_d < width)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _may_approximate(x: Tensor, wide: torch.dtype) -> bool:
    """True where the device has a tanh instruction and the result is rounded more coarsely than its error."""
    on_nvidia = x.device.type == "cuda" and torch.version.hip is None and not triton_interpreted()
    return on_nvidia and wide == torch.float32 and x.dtype.itemsize == 2


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # Two for the interpreter, so that programs take several steps there too.
    return 2 if triton_interpreted() else torch.cuda.get_device_properties(device).multi_processor_count


def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bound: Tensor,
    variance: Tensor | None,
    affine: Tensor | None,
    branch: Tensor | None,
    first_bound: Tensor | None,
    out_scale: Tensor | None,
    eps: float,
    kappa: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised rows, sum (empty without a residual) and mean squares (empty where given) for x [rows, D]."""
    rows, width = x.shape
    wide = compute_dtype(x, weight, bound, residual, variance)
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = x.new_empty(0) if residual is None else residual.new_empty(rows, width)
    found = x.new_empty(rows if variance is None else 0, dtype=wide)
    if rows == 0:
        return normed, summed, found
    x = rows_contiguous(x)
    residual = None if residual is None else rows_contiguous(residual)
    config = forward_config(rows, width, whole_row=variance is None)
    grid = (triton.cdiv(rows, config.block_rows), triton.cdiv(width, config.block_width))
    forward_kernel[grid](
        normed,
        None if residual is None else summed,
        found if variance is None else variance.contiguous(),
        x,
        residual,
        weight.contiguous(),
        bound,
        _contiguous(affine),
        _contiguous(branch),
        first_bound,
        _contiguous(out_scale),
        rows,
        width,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        0 if out_scale is None else int(out_scale.numel() > 1),
        EPS=eps,
        KAPPA=kappa,
        EXACT=variance is None,
        ESTIMATED=affine is not None or branch is not None,
        LEAST=LEAST_SHARE,
        COMPUTE_DTYPE=_TRITON_DTYPE[wide],
        APPROXIMATE=_may_approximate(x, wide),
        BLOCK_ROWS=config.block_rows,
        BLOCK_WIDTH=config.block_width,
        num_warps=config.num_warps,
        **overlap_options(x.device, rows),
    )
    return normed, summed, found


def launch_backward(
    dnormed: Tensor,
    dsummed: Tensor | None,
    dv: Tensor | None,
    summed: Tensor,
    variance: Tensor,
    weight: Tensor,
    bound: Tensor,
    affine: Tensor | None,
    branch: Tensor | None,
    first_bound: Tensor | None,
    out_scale: Tensor | None,
    eps: float,
    kappa: float,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum [rows, D], of weight [D] and bound [1], of a given variance [rows] and affine [2].

    The last two are empty where they do not apply. Deterministic on one device.
    """
    rows, width = summed.shape
    wide = compute_dtype(summed, weight, bound, variance, dnormed)
    dx = torch.empty_like(summed, memory_format=torch.contiguous_format)
    dvariance = variance.new_empty(0 if exact else rows)
    if rows == 0:
        daffine = variance.new_empty(0) if affine is None else torch.zeros_like(affine)
        return dx, torch.zeros_like(weight), torch.zeros_like(bound), dvariance, daffine
    dweight, dbound = torch.empty_like(weight, memory_format=torch.contiguous_format), torch.empty_like(bound)
    daffine = variance.new_empty(0) if affine is None else affine.new_empty(2)
    dnormed, summed = rows_contiguous(dnormed), rows_contiguous(summed)
    dsummed = None if dsummed is None else rows_contiguous(dsummed)
    out_scale = _contiguous(out_scale)
    scale_stride = 0 if out_scale is None else int(out_scale.numel() > 1)
    read = (dnormed, summed, *(() if dsummed is None else (dsummed,)))
    config = backward_config(rows, width, sum(width * tensor.element_size() for tensor in read))
    blocks = triton.cdiv(rows, config.block_rows)
    programs = min(blocks, config.programs * _multiprocessors(summed.device))
    # For each program: partial gradients of the weight, the bound, the slope and the intercept.
    partial_stride = 4 * triton.cdiv(width + 3, 4)
    partial = summed.new_empty((programs, partial_stride), dtype=wide)
    backward_kernel[(programs,)](
        dx,
        dvariance,
        partial,
        dnormed,
        dsummed,
        _contiguous(dv),
        summed,
        variance.contiguous(),
        weight.contiguous(),
        bound,
        _contiguous(affine),
        _contiguous(branch),
        first_bound,
        out_scale,
        rows,
        triton.cdiv(blocks, programs),
        width,
        partial_stride,
        dnormed.stride(0),
        0 if dsummed is None else dsummed.stride(0),
        summed.stride(0),
        scale_stride,
        EPS=eps,
        KAPPA=kappa,
        EXACT=exact,
        ESTIMATED=affine is not None or branch is not None,
        LEAST=LEAST_SHARE,
        COMPUTE_DTYPE=_TRITON_DTYPE[wide],
        APPROXIMATE=_may_approximate(dnormed, wide),
        BLOCK_ROWS=config.block_rows,
        BLOCK_WIDTH=config.block_width,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    reduce_partials_kernel[(triton.cdiv(width + 3, REDUCE_COLUMNS),)](
        dweight,
        dbound,
        None if affine is None else daffine,
        partial,
        out_scale,
        programs,
        width,
        partial_stride,
        scale_stride,
        COMPUTE_DTYPE=_TRITON_DTYPE[wide],
        BLOCK_ROWS=64,
        BLOCK_WIDTH=REDUCE_COLUMNS,
        num_warps=4,
    )
    return dx, dweight, dbound, dvariance, daffine
