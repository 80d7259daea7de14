"""Launch configurations of monarch_attention's backward pass: a table, as `configs.py` is for the forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from hf_efficient.kernels.decode_attention.configs import padded_head_dim
from hf_efficient.kernels.monarch_attention.configs import HOPPER


@dataclass(frozen=True)
class GradientConfig:
    """Tile of one program: BLOCK_M queries (or lines) by BLOCK_N key rows (or keys of a row), stages and warps."""

    block_m: int
    block_n: int
    num_stages: int
    num_warps: int


def left_gradient_config(
    rows: int, head_dim: int, element_size: int, capability: tuple[int, int]
) -> tuple[GradientConfig, bool]:
    """Of `left_gradient_kernel` and `summary_gradient_kernel`, for the query rows of a tile.

    Also whether one program holds all of them, so that the first kernel does the work of both.
    """
    block_d = padded_head_dim(head_dim)
    if element_size == 4 or block_d > 128:
        tile = 32 if block_d <= 64 else 16
        return GradientConfig(tile, 16, 1, 4), rows <= tile
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if capability == HOPPER:
        return GradientConfig(block_m, 64, 2, 4), rows <= block_m
    return GradientConfig(block_m, 32, 1, 4 if block_m < 64 else 8), rows <= block_m


def right_gradient_config(
    columns: int, head_dim: int, element_size: int, capability: tuple[int, int]
) -> GradientConfig:
    """Of `right_gradient_kernel`, lines by columns, for the columns of a tile."""
    on_hopper = (32, 3, 4)
    return _by_columns(columns, head_dim, element_size, on_hopper if capability == HOPPER else (32, 1, 4))


def query_gradient_config(
    columns: int, head_dim: int, element_size: int, capability: tuple[int, int]
) -> GradientConfig:
    """Of `query_gradient_kernel`, lines by columns, for the columns of a tile."""
    on_hopper = (64, 3, 8)
    return _by_columns(columns, head_dim, element_size, on_hopper if capability == HOPPER else (64, 2, 4))


def _by_columns(columns: int, head_dim: int, element_size: int, tile: tuple[int, int, int]) -> GradientConfig:
    """The lines, stages and warps of `tile`, and all columns up to 64; smaller for float32 and large heads."""
    block_d = padded_head_dim(head_dim)
    if element_size == 4 or block_d > 128:
        return GradientConfig(16, 32 if block_d <= 64 and columns > 16 else 16, 1, 4)
    block_m, num_stages, num_warps = tile
    return GradientConfig(block_m, 16 if columns <= 16 else 32 if columns <= 32 else 64, num_stages, num_warps)
