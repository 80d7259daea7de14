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
    """Tile of one program, in queries and keys (divisors of a block), the depth of its pipeline and its warps.

    `descriptors`: tiles are fetched by the copy engine of Hopper and newer, where the tensors allow it.
    """

    block_queries: int
    block_keys: int
    num_stages: int
    num_warps: int
    descriptors: bool = False


# (kernel, padded head width, bytes of an element). On Hopper a program has 227 KB of shared memory for its tiles;
_HOPPER = {
    ("forward", 64, 2): LaunchConfig(64, 64, 3, 4, True),
    ("forward", 128, 2): LaunchConfig(64, 64, 3, 4, True),
    ("forward", 256, 2): LaunchConfig(128, 64, 2, 8, True),
    ("query_gradient", 64, 2): LaunchConfig(128, 64, 3, 4, True),
    ("query_gradient", 128, 2): LaunchConfig(128, 64, 3, 8, True),
    ("query_gradient", 256, 2): LaunchConfig(128, 32, 2, 8, True),
    ("key_gradient", 64, 2): LaunchConfig(64, 64, 3, 4, True),
    ("key_gradient", 128, 2): LaunchConfig(64, 64, 2, 4, True),
    ("key_gradient", 256, 2): LaunchConfig(32, 64, 2, 8, True),
}
# elsewhere it has 99 KB at least, and float32 has no tensor cores anywhere.
_OTHERS = {
    ("forward", 64, 2): LaunchConfig(128, 64, 3, 4),
    ("forward", 128, 2): LaunchConfig(128, 32, 3, 4),
    ("forward", 256, 2): LaunchConfig(64, 32, 2, 4),
    ("query_gradient", 64, 2): LaunchConfig(128, 32, 2, 8),
    ("query_gradient", 128, 2): LaunchConfig(64, 32, 2, 4),
    ("query_gradient", 256, 2): LaunchConfig(32, 32, 1, 4),
    ("key_gradient", 64, 2): LaunchConfig(32, 128, 2, 8),
    ("key_gradient", 128, 2): LaunchConfig(32, 64, 2, 4),
    ("key_gradient", 256, 2): LaunchConfig(32, 32, 1, 4),
    **{
        (kernel, width, 4): LaunchConfig(tile, tile, 1, 4)
        for kernel in ("forward", "query_gradient", "key_gradient")
        for width, tile in ((64, 64), (128, 32), (256, 16))
    },
}


def launch_config(kernel: str, width: int, element_size: int, capability: tuple[int, int]) -> LaunchConfig:
    """For one of the kernels `forward`, `query_gradient` and `key_gradient`, and heads of `width`."""
    key = kernel, max(64, padded_head_dim(width)), element_size
    return _HOPPER.get(key, _OTHERS[key]) if capability == HOPPER else _OTHERS[key]


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of `device`; that of the oldest supported one where there is none to ask."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
