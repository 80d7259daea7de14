"""How the tokens of a sequence or a video are arranged for Monarch attention: in tiles of rows and columns.

`index` makes torch.compile take the sizes of a layout as constants. As symbols they would make the shapes of tiles
expressions that it needs minutes to simplify; the number of tokens may be a symbol.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from hf_efficient.errors import HFEError

ROW_AXES = ("fh", "f", "h", "w", "fw", "hw")
PADS = ("post", "pre")
PAD_QUERIES = ("zero", "mean")


class Tiling(NamedTuple):
    """Number of tiles, of rows in a tile (b1) and of columns in a tile (b2)."""

    tiles: int
    rows: int
    columns: int


@dataclass(frozen=True)
class SequenceLayout:
    """Tokens of a sequence in blocks: one tile, whose row is a block and whose column is the position in the block.

    Attributes:
        block_size: tokens in a block, at least 2.
        pad: side on which the sequence is padded to a multiple of `block_size`, "post" (behind) or "pre" (in front).
            "pre" suits vision models: with as many patches in a block as an image row has, the padding and the class
            token fill the first block, and each further block is one row of the image.
        pad_queries: what stands for a padded or masked query where it would choose keys for the other queries of its
            column (the first R-step): "zero", which chooses all keys of the block alike, or "mean", the mean of the
            valid queries of its column.

    Raises:
        HFEError: a value that is not allowed.
    """

    block_size: int
    pad: str = "post"
    pad_queries: str = "zero"

    def __post_init__(self) -> None:
        _check_count("block_size", self.block_size, 2)
        _check_choice("pad", self.pad, PADS)
        _check_choice("pad_queries", self.pad_queries, PAD_QUERIES)

    def tiling(self, num_tokens: int) -> Tiling:
        """One tile of `num_tokens` / `block_size` rows, rounded up, and `block_size` columns."""
        block_size = index(self.block_size)
        return Tiling(1, -(-num_tokens // block_size), block_size)

    def token_index(self, num_tokens: int, device: torch.device | str | None = None) -> Tensor:
        """The token in each place: int64 [1, rows, block_size], -1 where there is padding."""
        tiling = self.tiling(num_tokens)
        places = tiling.rows * tiling.columns
        token = torch.arange(places, device=device)
        if self.pad == "pre":
            token = token - (places - num_tokens)
        return token.masked_fill(token >= num_tokens, -1).clamp(min=-1).view(tiling)


@dataclass(frozen=True)
class GridLayout:
    """Tokens of a video, in the order (frame, height, width) with width fastest, in tiles.

    The F frames are cut into groups of `f_tied`, the height into `h_reduce` parts and the width into `w_reduce` parts:
    (F / f_tied, f_tied, h_reduce, height / h_reduce, w_reduce, width / w_reduce). A tile is one group, one part of
    the height and one part of the width; tiles are counted in this order, the group slowest. Of the three axes inside a
    tile, those named in `row_axes` form its rows and the others its columns, each in the order (f, h, w).

    Attributes:
        height, width: tokens of a frame.
        f_tied: frames that share a tile; divides the number of frames, and in causal calls the frames of a chunk.
        h_reduce, w_reduce: tiles into which a frame is cut along its height and its width; divide `height`, `width`.
        row_axes: axes of a tile's rows: "fh", "f", "h", "w", "fw" or "hw". With one iteration, attention is more exact
            where the rows are few.

    Raises:
        HFEError: a value that is not allowed, or `h_reduce` or `w_reduce` that does not divide.
    """

    height: int
    width: int
    f_tied: int = 1
    h_reduce: int = 1
    w_reduce: int = 1
    row_axes: str = "fh"

    def __post_init__(self) -> None:
        for name in ("height", "width", "f_tied", "h_reduce", "w_reduce"):
            _check_count(name, getattr(self, name), 1)
        _check_choice("row_axes", self.row_axes, ROW_AXES)
        for name, size, divisor in (("h_reduce", "height", self.h_reduce), ("w_reduce", "width", self.w_reduce)):
            if getattr(self, size) % divisor:
                raise HFEError(f"`{name}` is {divisor} and `{size}` is {getattr(self, size)}", "it must divide it")

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame."""
        return index(self.height) * index(self.width)

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of a tile."""
        height, width = index(self.height) // index(self.h_reduce), index(self.width) // index(self.w_reduce)
        return index(self.f_tied), height, width

    def num_frames(self, num_tokens: int) -> int:
        """Frames that `num_tokens` tokens make.

        Raises:
            HFEError: they are no whole number of frames, or `f_tied` does not divide that number.
        """
        if num_tokens % self.frame_tokens:
            raise HFEError(
                f"{num_tokens} tokens are no whole number of frames of {self.height} x {self.width} tokens",
                "pass the height and the width of the token grid, and the tokens of whole frames",
            )
        frames = num_tokens // self.frame_tokens
        if frames % index(self.f_tied):
            raise HFEError(f"`f_tied` is {self.f_tied}, and there are {frames} frames", "it must divide their number")
        return frames

    def tiling(self, num_tokens: int) -> Tiling:
        """Tiles, rows and columns of `num_tokens` tokens. Raises as `num_frames` does."""
        tiles = self.num_frames(num_tokens) // self.f_tied * self.h_reduce * self.w_reduce
        rows = columns = 1
        for axis, size in zip("fhw", self.tile_shape, strict=True):
            rows, columns = (rows * size, columns) if axis in self.row_axes else (rows, columns * size)
        return Tiling(tiles, rows, columns)

    def token_index(self, num_tokens: int, device: torch.device | str | None = None) -> Tensor:
        """The token in each place: int64 [tiles, rows, columns]. Raises as `num_frames` does."""
        groups = self.num_frames(num_tokens) // self.f_tied
        frames, height, width = self.tile_shape
        token = torch.arange(num_tokens, device=device)
        token = token.view(groups, frames, self.h_reduce, height, self.w_reduce, width)
        inside = {"f": 1, "h": 3, "w": 5}
        rows = [inside[axis] for axis in "fhw" if axis in self.row_axes]
        columns = [inside[axis] for axis in "fhw" if axis not in self.row_axes]
        return token.permute(0, 2, 4, *rows, *columns).reshape(self.tiling(num_tokens))


def _check_count(name: str, value: object, least: int) -> None:
    """Raise HFEError unless `value` is an integer of at least `least`."""
    # A model that torch.compile traces with dynamic shapes passes symbolic integers.
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < least:
        raise HFEError(f"`{name}` is {value!r}", f"pass an integer of at least {least}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise HFEError unless `value` is one of `choices`."""
    if value not in choices:
        raise HFEError(f"`{name}` is {value!r}", f"choose from {', '.join(choices)}")
