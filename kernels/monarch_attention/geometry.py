"""Where the tokens of a layout are, as the strides and counts that the kernels take."""

from __future__ import annotations

from typing import NamedTuple

from hf_efficient.kernels.monarch_attention.layout import GridLayout, SequenceLayout


class Geometry(NamedTuple):
    """Strides and counts of a layout, in tokens.

    The token of (tile, row, column) is at ``shift + tile offset + row offset + column offset``. The offset of tile
    (f, h, w) of [F, tiles_h, tiles_w] is ``f * tile_stride_f + h * tile_stride_h + w * tile_stride_w``, that of row k
    ``(k // row_inner) * row_stride_outer + (k % row_inner) * row_stride_inner``, and that of a column likewise. A place
    whose token is not in [0, number of tokens) is padding.

    Attributes:
        query_tiles, key_tiles, rows, columns: Ta, Tf, b1 and b2 of the formulas.
        causal_tiles: tiles of a causal chunk; 0 if every tile attends to every tile.
    """

    query_tiles: int
    key_tiles: int
    rows: int
    columns: int
    tiles_h: int
    tiles_w: int
    tile_stride_f: int
    tile_stride_h: int
    tile_stride_w: int
    row_inner: int
    row_stride_outer: int
    row_stride_inner: int
    column_inner: int
    column_stride_outer: int
    column_stride_inner: int
    shift: int
    causal_tiles: int

    @property
    def contiguous_columns(self) -> bool:
        """Whether the tokens of a row are neighbours, all of them tokens."""
        return self.column_stride_inner == 1 and self.column_inner == self.columns


def grid_geometry(layout: GridLayout, query_tokens: int, key_tokens: int, causal_frames: int | None) -> Geometry:
    """The geometry of a video grid, whose query and key tokens are whole frames."""
    frame = layout.height * layout.width
    inner = {"f": layout.f_tied, "h": layout.height // layout.h_reduce, "w": layout.width // layout.w_reduce}
    stride = {"f": frame, "h": layout.width, "w": 1}
    row_axes = [axis for axis in "fhw" if axis in layout.row_axes]
    column_axes = [axis for axis in "fhw" if axis not in layout.row_axes]
    tiles_per_frame = layout.h_reduce * layout.w_reduce
    counts, strides = [], []
    for axes in (row_axes, column_axes):
        count = 1
        for axis in axes:
            count *= inner[axis]
        last = axes[-1]
        # Axes of extent 1 do not split the index.
        split = len(axes) == 2 and inner[axes[0]] > 1
        counts.append(count)
        strides.append((inner[last] if split else count, stride[axes[0]] if split else 0, stride[last]))
    (rows, columns), (row_strides, column_strides) = counts, strides
    return Geometry(
        query_tokens // frame // layout.f_tied * tiles_per_frame,
        key_tokens // frame // layout.f_tied * tiles_per_frame,
        rows,
        columns,
        layout.h_reduce,
        layout.w_reduce,
        layout.f_tied * frame,
        inner["h"] * layout.width,
        inner["w"],
        *row_strides,
        *column_strides,
        0,
        (causal_frames or 0) // layout.f_tied * tiles_per_frame,
    )


def sequence_geometry(layout: SequenceLayout, tokens: int) -> Geometry:
    """The geometry of a sequence: one tile, whose rows are the blocks."""
    size = layout.block_size
    rows = -(-tokens // size)
    shift = tokens - rows * size if layout.pad == "pre" else 0
    return Geometry(1, 1, rows, size, 1, 1, 0, 0, 0, rows, 0, size, size, 0, 1, shift, 0)


def geometry(
    layout: GridLayout | SequenceLayout, query_tokens: int, key_tokens: int, causal_frames: int | None
) -> Geometry:
    """The geometry of a call, whose arguments `api.py` has checked."""
    if isinstance(layout, GridLayout):
        return grid_geometry(layout, query_tokens, key_tokens, causal_frames)
    return sequence_geometry(layout, query_tokens)
