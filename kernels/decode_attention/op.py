"""decode_attention over the Triton kernels: the operator for tracing."""

from __future__ import annotations

from torch import Tensor

from hf_efficient.kernels.operators import define_operator


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    q_pos: Tensor,
    kv_segment_ids: Tensor | None,
    segment_visibility: Tensor | None,
    columns: int,
    window: int | None,
    scale: float,
) -> Tensor:
    from hf_efficient.kernels.decode_attention.triton_kernels import launch

    return launch(q, k, v, kv_len, q_pos, kv_segment_ids, segment_visibility, columns, window, scale)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor | None,
    q_pos: Tensor,
    kv_segment_ids: Tensor | None,
    segment_visibility: Tensor | None,
    columns: int,
    window: int | None,
    scale: float,
) -> Tensor:
    batch, heads, queries, width = q.shape
    return q.new_empty((batch, queries, heads, width))


# [B, Q, Hq, D], contiguous. Of `kv_len` a tensor comes here as it is; a number is in `columns`.
decode_attention_forward = define_operator("decode_attention", _launch, _fake)
