"""rotary_cache over the Triton kernel, as an operator for tracing that changes the caches in place."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.kernels.operators import define_operator


def _launch(
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
    from hf_efficient.kernels.rotary_cache.triton_kernels import launch

    return launch(q, k, v, cos, sin, key_cache, value_cache, cache_position, q_weight, k_weight, eps, length)


def _fake(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


# rotated q as [B, Q, Hq, D]; k and v go to the caches
rotary_cache_write = define_operator("rotary_cache", _launch, _fake, mutates=("key_cache", "value_cache", "length"))
