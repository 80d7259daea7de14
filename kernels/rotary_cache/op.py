"""The custom operator of rotary_cache, which writes the caches in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_efficient.kernels.operators import define_operator


def _load_launcher() -> Callable[..., Tensor]:
    from hf_efficient.kernels.rotary_cache.triton_kernels import launch

    return launch


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    cache_position: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    length: Tensor | None,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


# Rotated q as [B, Q, Hq, D]; k and v go to the caches.
rotary_cache_write = define_operator(
    "rotary_cache", _load_launcher, _fake, mutates=("key_cache", "value_cache", "length")
)
