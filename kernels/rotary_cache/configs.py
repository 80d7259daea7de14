"""Launch configurations of the rotary_cache kernel."""

from __future__ import annotations

from dataclasses import dataclass

# Up to this many tokens a call counts as decoding: with few programs, each takes fewer heads.
DECODE_TOKENS = 64


@dataclass(frozen=True)
class LaunchConfig:
    """Heads of one token that a program takes, and its warps."""

    block_heads: int
    num_warps: int


def launch_config(tokens: int) -> LaunchConfig:
    """For `tokens` tokens in total."""
    return LaunchConfig(4, 1) if tokens <= DECODE_TOKENS else LaunchConfig(8, 2)
