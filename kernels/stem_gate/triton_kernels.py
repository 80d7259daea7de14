"""Triton kernels of stem_gate and their launchers.

Arguments are checked by `api.py`, autograd is in `op.py`. Loads and stores are masked for ids outside the table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.kernels.stem_gate.configs import CHUNK, elementwise_config, run_config
from hf_efficient.kernels.stem_gate.reference import compute_dtype
from hf_efficient.kernels.triton_language import HAVE_TRITON, tl, triton
from hf_efficient.kernels.validate import rows_contiguous

if HAVE_TRITON:
    _TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

    @triton.jit
    def _sigmoid(x):
        return 1.0 / (1.0 + tl.exp(-x))

    @triton.jit
    def _silu_derivative(x):
        """Derivative of x * sigmoid(x)."""
        s = _sigmoid(x)
        return s * (1.0 + x * (1.0 - s))

    @triton.jit
    def _in_table(row, column, rows, width):
        """Mask of the elements inside the table. `row` must be a block: the interpreter has no masks from scalars."""
        return (column < width) & (row >= 0) & (row < rows)

    @triton.jit(do_not_specialize=["tokens", "rows"])
    def forward_kernel(
        out,
        gate,
        table,
        ids,
        tokens,
        rows,
        width,
        gate_stride,
        table_stride,
        COMPUTE_DTYPE: tl.constexpr,
        BLOCK_TOKENS: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
    ):
        # Token blocks are the fastest program axis: the table columns in use at one time then fit the L2 cache, and a
        # repeated id finds its row there.
        token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
        row = tl.load(ids + token, mask=token < tokens, other=-1).to(tl.int64)
        inside = (token < tokens)[:, None] & (column < width)[None, :]
        in_table = _in_table(row[:, None], column[None, :], rows, width)
        # Gate and output are accessed once; evicting them first keeps table rows in the cache.
        g = tl.load(
            gate + token[:, None] * gate_stride + column[None, :], mask=inside, other=0.0, eviction_policy="evict_first"
        ).to(COMPUTE_DTYPE)
        u = tl.load(table + row[:, None] * table_stride + column[None, :], mask=in_table, other=0.0).to(COMPUTE_DTYPE)
        h = g * _sigmoid(g) * u
        tl.store(
            out + token[:, None] * width + column[None, :],
            h.to(out.dtype.element_ty),
            mask=inside,
            eviction_policy="evict_first",
        )

    @triton.jit(do_not_specialize=["tokens", "rows"])
    def backward_gate_kernel(
        dgate,
        dout,
        gate,
        table,
        ids,
        tokens,
        rows,
        width,
        dout_stride,
        gate_stride,
        table_stride,
        COMPUTE_DTYPE: tl.constexpr,
        BLOCK_TOKENS: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
        row = tl.load(ids + token, mask=token < tokens, other=-1).to(tl.int64)
        inside = (token < tokens)[:, None] & (column < width)[None, :]
        in_table = _in_table(row[:, None], column[None, :], rows, width)
        g = tl.load(
            gate + token[:, None] * gate_stride + column[None, :], mask=inside, other=0.0, eviction_policy="evict_first"
        ).to(COMPUTE_DTYPE)
        d = tl.load(
            dout + token[:, None] * dout_stride + column[None, :], mask=inside, other=0.0, eviction_policy="evict_first"
        ).to(COMPUTE_DTYPE)
        u = tl.load(table + row[:, None] * table_stride + column[None, :], mask=in_table, other=0.0).to(COMPUTE_DTYPE)
        tl.store(
            dgate + token[:, None] * width + column[None, :],
            (d * u * _silu_derivative(g)).to(dgate.dtype.element_ty),
            mask=inside,
            eviction_policy="evict_first",
        )

    @triton.jit(do_not_specialize=["tokens", "rows"])
    def backward_kernel(
        dgate,
        dtable,
        partial,
        dout,
        gate,
        table,
        sorted_ids,
        order,
        first,
        last,
        tokens,
        rows,
        width,
        dout_stride,
        gate_stride,
        table_stride,
        COMPUTE_DTYPE: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
    ):
        # Positions are in the order of sorted ids. A run [begin, end) is all positions of one id. Every CHUNK-th
        # position of a run starts a chunk, and its program processes the whole chunk; the others return.
        position = tl.program_id(0)
        # These loads do not depend on each other: most runs are short and can hide only one memory latency.
        begin = tl.load(first + position)
        end = tl.load(last + position)
        row = tl.load(sorted_ids + position + tl.arange(0, 1)).to(tl.int64)
        token = tl.load(order + position)
        if (position - begin) % CHUNK == 0:
            column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
            inside = column < width
            in_table = _in_table(row, column, rows, width)
            u = tl.load(table + row * table_stride + column, mask=in_table, other=0.0).to(COMPUTE_DTYPE)
            acc = tl.zeros([BLOCK_WIDTH], dtype=COMPUTE_DTYPE)
            stop = tl.minimum(end, position + CHUNK)
            for at in range(position, stop):
                # Prefetch the index of the next token.
                next_token = tl.load(order + at + 1, mask=at + 1 < stop, other=0)
                g = tl.load(gate + token * gate_stride + column, mask=inside, other=0.0).to(COMPUTE_DTYPE)
                d = tl.load(dout + token * dout_stride + column, mask=inside, other=0.0).to(COMPUTE_DTYPE)
                dg = (d * u * _silu_derivative(g)).to(dgate.dtype.element_ty)
                tl.store(dgate + token * width + column, dg, mask=inside)
                acc += d * g * _sigmoid(g)
                token = next_token
            if end - begin <= CHUNK:
                tl.store(dtable + row * width + column, acc.to(dtable.dtype.element_ty), mask=in_table)
            else:
                tl.store(partial + _partial_row(position, begin, CHUNK) * width + column, acc, mask=inside)

    @triton.jit
    def _partial_row(position, begin, CHUNK: tl.constexpr):
        """Row in `partial` of the chunk that begins at `position`.

        Among CHUNK neighbouring positions there is at most one first chunk of a run longer than CHUNK, and at most one
        later chunk of such a run: two rows for every CHUNK positions are enough, and no two chunks share a row.
        """
        return (position // CHUNK).to(tl.int64) * 2 + (position != begin).to(tl.int64)

    @triton.jit(do_not_specialize=["tokens", "rows"])
    def sum_partials_kernel(
        dtable,
        partial,
        sorted_ids,
        first,
        last,
        tokens,
        rows,
        width,
        COMPUTE_DTYPE: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
    ):
        # One program for CHUNK neighbouring positions: at most one run longer than CHUNK begins among them.
        at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
        begins = tl.load(first + at, mask=at < tokens, other=-1)
        ends = tl.load(last + at, mask=at < tokens, other=0)
        begin = tl.max(tl.where((begins == at) & (ends - begins > CHUNK), begins, -1), axis=0)
        if begin >= 0:
            end = tl.load(last + begin)
            row = tl.load(sorted_ids + begin + tl.arange(0, 1)).to(tl.int64)
            column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
            acc = tl.zeros([BLOCK_WIDTH], dtype=COMPUTE_DTYPE)
            for chunk in range(0, tl.cdiv(end - begin, CHUNK)):
                row_of_chunk = _partial_row(begin + chunk * CHUNK, begin, CHUNK)
                acc += tl.load(partial + row_of_chunk * width + column, mask=column < width, other=0.0)
            in_table = _in_table(row, column, rows, width)
            tl.store(dtable + row * width + column, acc.to(dtable.dtype.element_ty), mask=in_table)


def launch_forward(gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """``silu(gate) * table[ids]`` for gate [T, F], table [R, F], ids [T]."""
    gate, ids = rows_contiguous(gate), ids.contiguous()
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    tokens, width = gate.shape
    if out.numel() == 0:
        return out
    config = elementwise_config(tokens, width)
    grid = (triton.cdiv(tokens, config.block_tokens), triton.cdiv(width, config.block_width))
    forward_kernel[grid](
        out,
        gate,
        table,
        ids,
        tokens,
        table.shape[0],
        width,
        gate.stride(0),
        table.stride(0),
        COMPUTE_DTYPE=_TRITON_DTYPE[compute_dtype(gate.dtype, table.dtype)],
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_WIDTH=config.block_width,
        num_warps=config.num_warps,
    )
    return out


def launch_backward_gate(dout: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """Gradient of gate [T, F]."""
    dout, gate, ids = rows_contiguous(dout), rows_contiguous(gate), ids.contiguous()
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    tokens, width = gate.shape
    if dgate.numel() == 0:
        return dgate
    config = elementwise_config(tokens, width)
    grid = (triton.cdiv(tokens, config.block_tokens), triton.cdiv(width, config.block_width))
    backward_gate_kernel[grid](
        dgate,
        dout,
        gate,
        table,
        ids,
        tokens,
        table.shape[0],
        width,
        dout.stride(0),
        gate.stride(0),
        table.stride(0),
        COMPUTE_DTYPE=_TRITON_DTYPE[compute_dtype(gate.dtype, table.dtype)],
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_WIDTH=config.block_width,
        num_warps=config.num_warps,
    )
    return dgate


def launch_backward(dout: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate [T, F] and table [R, F]; that of the table is dense and deterministic."""
    dout, gate = rows_contiguous(dout), rows_contiguous(gate)
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dtable = torch.zeros_like(table, memory_format=torch.contiguous_format)
    tokens, width = gate.shape
    if dgate.numel() == 0:
        return dgate, dtable
    wide = compute_dtype(gate.dtype, table.dtype)
    # Sorting time is proportional to the bytes of the keys. Ids outside the table may be merged: none of them counts.
    keys = ids.clamp(-1, table.shape[0])
    if table.shape[0] <= torch.iinfo(torch.int32).max:
        keys = keys.to(torch.int32)
    # Stable, so that the positions of an id keep their order and the sum is deterministic.
    sorted_ids, order = torch.sort(keys, stable=True)
    first = torch.searchsorted(sorted_ids, sorted_ids, out_int32=True)
    last = torch.searchsorted(sorted_ids, sorted_ids, right=True, out_int32=True)
    partial = gate.new_empty((2 * triton.cdiv(tokens, CHUNK), width), dtype=wide)
    config = run_config(width)
    tiles = triton.cdiv(width, config.block_width)
    backward_kernel[(tokens, tiles)](
        dgate,
        dtable,
        partial,
        dout,
        gate,
        table,
        sorted_ids,
        order,
        first,
        last,
        tokens,
        table.shape[0],
        width,
        dout.stride(0),
        gate.stride(0),
        table.stride(0),
        COMPUTE_DTYPE=_TRITON_DTYPE[wide],
        CHUNK=CHUNK,
        BLOCK_WIDTH=config.block_width,
        num_warps=config.num_warps,
    )
    if tokens > CHUNK:  # otherwise no run can be longer than a chunk
        sum_partials_kernel[(triton.cdiv(tokens, CHUNK), tiles)](
            dtable,
            partial,
            sorted_ids,
            first,
            last,
            tokens,
            table.shape[0],
            width,
            COMPUTE_DTYPE=_TRITON_DTYPE[wide],
            CHUNK=CHUNK,
            BLOCK_WIDTH=config.block_width,
            num_warps=config.num_warps,
        )
    return dgate, dtable
