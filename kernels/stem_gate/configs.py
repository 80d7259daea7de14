"""Launch configurations of the stem_gate kernels: a table, not a search, so that the first call is quick.

Keys are classes of shapes, never the number of tokens itself: a growing sequence does not recompile.
"""

from __future__ import annotations

from dataclasses import dataclass

# Positions of one token id that one program of the backward kernel sums; longer runs are summed from partial rows.
CHUNK = 32
# Up to this many tokens a call counts as decoding: with so few rows, a program takes only one.
DECODE_TOKENS = 256


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of one program, BLOCK_TOKENS by BLOCK_WIDTH, and its warps."""

    block_tokens: int
    block_width: int
    num_warps: int


_DECODE = LaunchConfig(block_tokens=1, block_width=1024, num_warps=4)
_BULK = LaunchConfig(block_tokens=4, block_width=512, num_warps=4)
_RUNS = LaunchConfig(block_tokens=1, block_width=1024, num_warps=4)


def _fit_width(config: LaunchConfig, width: int) -> LaunchConfig:
    """`config` with a tile no wider than the next power of two of `width`: narrow models waste no threads."""
    fitting = max(64, 1 << (width - 1).bit_length())
    return config if fitting >= config.block_width else LaunchConfig(config.block_tokens, fitting, config.num_warps)


def elementwise_config(tokens: int, width: int) -> LaunchConfig:
    """For the forward kernel and for the gradient of the gate alone."""
    return _fit_width(_DECODE if tokens <= DECODE_TOKENS else _BULK, width)


def run_config(width: int) -> LaunchConfig:
    """For the backward kernel, which walks runs of equal ids token by token, and for the sum of its partial rows."""
    return _fit_width(_RUNS, width)
