"""The custom operator of decode_attention."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hf_efficient.kernels.operators import define_operator


def _load_launcher() -> Callable[..., Tensor]:
    from hf_efficient.kernels.decode_attention.triton_kernels import launch

    return launch


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    q_pos: Tensor,
    kv_segment_ids: Tensor | None,
    segment_visibility: Tensor | None,
    max_kv_len: int,
    window: int | None,
    scale: float,
) -> Tensor:
    batch, heads, queries, head_dim = q.shape
    return q.new_empty((batch, queries, heads, head_dim))


# [B, Q, Hq, D], contiguous. `kv_len` as a tensor is passed as it is, as a number it is `max_kv_len`.
decode_attention_forward = define_operator("decode_attention", _load_launcher, _fake)
