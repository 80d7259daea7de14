"""Triton kernel of gather_rows and its launcher. Arguments are checked by `api.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.kernels.gather_rows.configs import LaunchConfig, launch_config
from hf_efficient.kernels.triton_language import HAVE_TRITON, tl, triton

# Rows are copied as integers of the same size, so that no conversion can change a bit.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


if HAVE_TRITON:

    @triton.jit(do_not_specialize=["tiles", "rows", "slots"])
    def gather_rows_kernel(
        out,
        table,
        ids,
        cache,
        cache_slots,
        tiles,
        rows,
        slots,
        width,
        tiles_per_row,
        out_stride,
        table_stride,
        cache_stride,
        BLOCK_WIDTH: tl.constexpr,
    ):
        """Program p copies the tiles p, p + programs, …; the tiles of one row are neighbours."""
        one = tl.arange(0, 1)  # the interpreter has no masks from scalars, so masks come from blocks of one element
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            position = (tile // tiles_per_row).to(tl.int64)
            column = (tile % tiles_per_row) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
            row = tl.load(ids + position + one).to(tl.int64)
            in_table = (row >= 0) & (row < rows)
            inside = column < width
            from_table = inside & in_table
            if cache is not None:
                slot = tl.load(cache_slots + row, mask=in_table, other=-1).to(tl.int64)
                cached = (slot >= 0) & (slot < slots)
                from_cache = inside & cached
                from_slot = tl.load(cache + slot * cache_stride + column, mask=from_cache, other=0)
                # A cached row is not read from the table, which may be in host memory.
                from_row = tl.load(table + row * table_stride + column, mask=from_table & (cached == 0), other=0)
                values = tl.where(cached, from_slot, from_row)
            else:
                values = tl.load(table + row * table_stride + column, mask=from_table, other=0)
            tl.store(out + position * out_stride + column, values, mask=inside)


def launch(
    out: Tensor,
    table: Tensor,
    ids: Tensor,
    cache: Tensor | None,
    cache_slots: Tensor | None,
    config: LaunchConfig | None = None,
) -> None:
    """Fills `out` [u, F]. `table` may be in pinned host memory, which the device can address."""
    rows, width = out.shape
    if rows == 0:
        return
    size = out.element_size()
    if config is None:
        config = launch_config(rows, width * size, table.device != ids.device)
    block_width = config.block_bytes // size
    tiles_per_row = triton.cdiv(width, block_width)
    tiles = rows * tiles_per_row
    bits = _INTEGERS[size]
    gather_rows_kernel[(min(tiles, config.programs) if config.programs else tiles,)](
        out.view(bits),
        table.view(bits),
        ids.contiguous(),
        None if cache is None else cache.view(bits),
        None if cache_slots is None else cache_slots.contiguous(),
        tiles,
        table.shape[0],
        0 if cache is None else cache.shape[0],
        width,
        tiles_per_row,
        out.stride(0),
        table.stride(0),
        0 if cache is None else cache.stride(0),
        BLOCK_WIDTH=block_width,
        num_warps=config.num_warps,
    )
