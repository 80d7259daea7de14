"""Rotary position embedding of video tokens: the channels of a head are split among frame, row and column.

A head of D channels has ``D - 4 * (D // 6)`` channels for the frame, and ``2 * (D // 6)`` each for row and column: 44,
42 and 42 of 128. Each part has frequencies of its own, ``theta ** (-2 i / channels of the part)``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def axis_channels(head_dim: int) -> tuple[int, int, int]:
    """Return the channels of a head that encode the frame, the row and the column; all are even, if `head_dim` is."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary_tables(
    grid: tuple[int, int, int], start_frame: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the angles of every token, float32 [F * H * W, D / 2] each.

    Tokens are in the order (frame, row, column), the column fastest. Angles are computed in float64.

    Args:
        grid: F frames, H rows and W columns of tokens.
        start_frame: position of the first frame.
        head_dim: D, even.
        theta: base of the frequencies.
        device: where the result is.
    """
    # Apple's GPUs have no float64.
    computed_on = torch.device("cpu") if device.type == "mps" else device
    cosines: list[Tensor] = []
    sines: list[Tensor] = []
    for axis, (size, channels) in enumerate(zip(grid, axis_channels(head_dim), strict=True)):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=computed_on) / channels
        position = torch.arange(size, dtype=torch.float64, device=computed_on) + (start_frame if axis == 0 else 0)
        angles = position[:, None] / theta**exponent
        shape = [1, 1, 1, channels // 2]
        shape[axis] = size
        for tables, values in ((cosines, angles.cos()), (sines, angles.sin())):
            tables.append(values.to(device, torch.float32).view(shape).expand(*grid, -1))
    return torch.cat(cosines, dim=-1).flatten(0, 2), torch.cat(sines, dim=-1).flatten(0, 2)


def apply_rotary(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair of neighbouring channels ``(x[2 i], x[2 i + 1])`` by the angle of its token, in float32.

    Args:
        x: [B, N, heads, D], N tokens.
        tables: cosines and sines, float32 [N, D / 2] each.

    Returns:
        [B, N, heads, D] in the dtype of `x`.
    """
    cos, sin = (table[None, :, None, :] for table in tables)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    # A product with a float32 table is float32, whatever the dtype of `x`.
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(first * sin, second, cos)
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


__all__ = ["apply_rotary", "axis_channels", "rotary_tables"]
