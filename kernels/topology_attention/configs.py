"""Launch configurations of topology_attention: a table, not a search, so that the first call is quick.

Keys are classes of shapes, never the length of the sequence.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from hf_efficient.kernels.decode_attention.configs import padded_head_dim

HOPPER = (9, 0)


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of one program, BLOCK_M queries by BLOCK_N keys (divisors of a block), its pipeline stages and its warps.

    `use_tma`: the tensor memory accelerator of Hopper and newer loads the tiles, where the tensors' layout allows it.
    """

    block_m: int
    block_n: int
    num_stages: int
    num_warps: int
    use_tma: bool = False


# (kernel, padded head_dim, bytes of an element). On Hopper a program has 227 KB of shared memory for its tiles.
_HOPPER = {
    ("forward", 64, 2): LaunchConfig(64, 64, 3, 4, True),
    ("forward", 128, 2): LaunchConfig(64, 64, 3, 4, True),
    ("forward", 256, 2): LaunchConfig(128, 64, 2, 8, True),
    ("dq", 64, 2): LaunchConfig(128, 64, 3, 4, True),
    ("dq", 128, 2): LaunchConfig(128, 64, 3, 8, True),
    ("dq", 256, 2): LaunchConfig(128, 32, 2, 8, True),
    ("dkdv", 64, 2): LaunchConfig(64, 64, 3, 4, True),
    ("dkdv", 128, 2): LaunchConfig(64, 64, 2, 4, True),
    ("dkdv", 256, 2): LaunchConfig(32, 64, 2, 8, True),
}
# Elsewhere it has at least 99 KB, and float32 has no tensor cores on any device.
_OTHERS = {
    ("forward", 64, 2): LaunchConfig(128, 64, 3, 4),
    ("forward", 128, 2): LaunchConfig(128, 32, 3, 4),
    ("forward", 256, 2): LaunchConfig(64, 32, 2, 4),
    ("dq", 64, 2): LaunchConfig(128, 32, 2, 8),
    ("dq", 128, 2): LaunchConfig(64, 32, 2, 4),
    ("dq", 256, 2): LaunchConfig(32, 32, 1, 4),
    ("dkdv", 64, 2): LaunchConfig(32, 128, 2, 8),
    ("dkdv", 128, 2): LaunchConfig(32, 64, 2, 4),
    ("dkdv", 256, 2): LaunchConfig(32, 32, 1, 4),
    **{
        (kernel, head_dim, 4): LaunchConfig(tile, tile, 1, 4)
        for kernel in ("forward", "dq", "dkdv")
        for head_dim, tile in ((64, 64), (128, 32), (256, 16))
    },
}


def launch_config(kernel: str, head_dim: int, element_size: int, capability: tuple[int, int]) -> LaunchConfig:
    """For one of the kernels `forward`, `dq` and `dkdv`, and a `head_dim`."""
    key = kernel, max(64, padded_head_dim(head_dim)), element_size
    return _HOPPER.get(key, _OTHERS[key]) if capability == HOPPER else _OTHERS[key]


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of `device`; that of the oldest supported device on the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
