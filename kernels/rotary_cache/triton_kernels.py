"""Triton kernel of rotary_cache and its launcher. Arguments are checked by `api.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.kernels.overlap import overlap_options
from hf_efficient.kernels.rotary_cache.configs import launch_config
from hf_efficient.kernels.triton_language import HAVE_TRITON, tl, triton

if HAVE_TRITON:

    @triton.jit
    def _load_half(start, d, mask):
        """Elements `d` from `start` on, in float32."""
        return tl.load(start + d, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _normalise(x, rstd, weight, d, inside, DTYPE: tl.constexpr):
        """x * rstd * weight, rounded after each product, as the stock families do."""
        w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
        return ((x * rstd[:, None]).to(DTYPE).to(tl.float32) * w[None, :]).to(DTYPE).to(tl.float32)

    @triton.jit
    def _rotate(target, source, target_stride, source_stride, head, mask, cos, sin, weight, eps, half, d):
        """Heads `head` of one token, normalised where there is a weight, and rotated, from `source` to `target`."""
        start = source + head[:, None] * source_stride
        inside = d < half
        from_mask = mask & inside[None, :]
        x1, x2 = _load_half(start, d[None, :], from_mask), _load_half(start, half + d[None, :], from_mask)
        if weight is not None:
            rstd = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / (2 * half) + eps)
            x1 = _normalise(x1, rstd, weight, d, inside, source.dtype.element_ty)
            x2 = _normalise(x2, rstd, weight, half + d, inside, source.dtype.element_ty)
        cos1, cos2 = _load_half(cos, d, inside)[None, :], _load_half(cos, half + d, inside)[None, :]
        sin1, sin2 = _load_half(sin, d, inside)[None, :], _load_half(sin, half + d, inside)[None, :]
        ptrs = target + head[:, None] * target_stride + d[None, :]
        tl.store(ptrs, (x1 * cos1 - x2 * sin1).to(target.dtype.element_ty), mask=from_mask)
        tl.store(ptrs + half, (x2 * cos2 + x1 * sin2).to(target.dtype.element_ty), mask=from_mask)

    @triton.jit(do_not_specialize=["queries", "cache_slots"])
    def rotary_cache_kernel(
        out,
        q,
        k,
        v,
        cos,
        sin,
        key_cache,
        value_cache,
        cache_position,
        length,
        q_weight,
        k_weight,
        eps,
        queries,
        cache_slots,
        q_heads,
        kv_heads,
        half,
        q_batch_stride,
        q_token_stride,
        q_head_stride,
        k_batch_stride,
        k_token_stride,
        k_head_stride,
        v_batch_stride,
        v_token_stride,
        v_head_stride,
        rotary_batch_stride,
        rotary_token_stride,
        key_batch_stride,
        key_head_stride,
        key_slot_stride,
        value_batch_stride,
        value_head_stride,
        value_slot_stride,
        position_batch_stride,
        position_token_stride,
        BLOCK_HEADS: tl.constexpr,
        BLOCK_HALF: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """Programs are (token, group of heads): the groups of q, then those of k, then those of v."""
        if OVERLAP:
            tl.extra.cuda.gdc_launch_dependents()
        token, group = tl.program_id(0), tl.program_id(1)
        b, t = (token // queries).to(tl.int64), (token % queries).to(tl.int64)
        q_groups, kv_groups = tl.cdiv(q_heads, BLOCK_HEADS), tl.cdiv(kv_heads, BLOCK_HEADS)
        d = tl.arange(0, BLOCK_HALF)
        one = tl.arange(0, 1)  # the interpreter has no masks from scalars, so masks come from blocks of one element
        cos += b * rotary_batch_stride + t * rotary_token_stride
        sin += b * rotary_batch_stride + t * rotary_token_stride
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        slot = t + one
        if cache_position is not None:
            slot = tl.load(cache_position + b * position_batch_stride + t * position_token_stride + one).to(tl.int64)
        if length is not None:  # noqa: SIM102 - the outer condition is known when compiling, the inner one is not
            if token == tl.num_programs(0) - 1 and group == 0:  # `length` is accessed by this program only
                tl.store(length + one, (slot + 1).to(length.dtype.element_ty))
        in_cache = ((slot >= 0) & (slot < cache_slots))[:, None]
        offset = tl.arange(0, BLOCK_HEADS).to(tl.int64)
        if group < q_groups:
            q_head = group * BLOCK_HEADS + offset
            source = q + b * q_batch_stride + t * q_token_stride
            target = out + token.to(tl.int64) * q_heads * 2 * half
            mask = (q_head < q_heads)[:, None]
            _rotate(target, source, 2 * half, q_head_stride, q_head, mask, cos, sin, q_weight, eps, half, d)
        elif group < q_groups + kv_groups:
            if key_cache is not None:
                k_head = (group - q_groups) * BLOCK_HEADS + offset
                k_source = k + b * k_batch_stride + t * k_token_stride
                k_target = key_cache + b * key_batch_stride + slot[:, None] * key_slot_stride
                k_mask = (k_head < kv_heads)[:, None] & in_cache
                _rotate(
                    k_target, k_source, key_head_stride, k_head_stride, k_head, k_mask, cos, sin, k_weight, eps, half, d
                )
        else:
            if value_cache is not None:
                v_head = (group - q_groups - kv_groups) * BLOCK_HEADS + offset
                v_mask = (v_head < kv_heads)[:, None] & in_cache & (d < half)[None, :]
                v_source = v + b * v_batch_stride + t * v_token_stride + v_head[:, None] * v_head_stride + d[None, :]
                v_target = value_cache + b * value_batch_stride + slot[:, None] * value_slot_stride
                v_target += v_head[:, None] * value_head_stride + d[None, :]
                tl.store(v_target, tl.load(v_source, mask=v_mask), mask=v_mask)
                tl.store(v_target + half, tl.load(v_source + half, mask=v_mask), mask=v_mask)


def launch(
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
    """Rotated q as [B, Q, Hq, D], contiguous; the caches and the length are changed in place."""
    batch, queries, q_heads, width = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tokens, kv_heads = batch * queries, k.shape[2]
    if tokens == 0:
        return out
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    key_strides = (0, 0, 0) if key_cache is None else key_cache.stride()[:3]
    value_strides = (0, 0, 0) if value_cache is None else value_cache.stride()[:3]
    position_strides = (0, 0)
    if cache_position is not None:
        position_strides = (
            cache_position.stride(0) if cache_position.dim() == 2 and cache_position.shape[0] > 1 else 0,
            cache_position.stride(-1),
        )
    cache = key_cache if key_cache is not None else value_cache
    config = launch_config(tokens)
    kv_groups = triton.cdiv(kv_heads, config.block_heads)
    groups = triton.cdiv(q_heads, config.block_heads) + (0 if cache is None else 2 * kv_groups)
    rotary_cache_kernel[(tokens, groups)](
        out,
        q,
        k,
        v,
        cos,
        sin,
        key_cache,
        value_cache,
        cache_position,
        length,
        None if q_weight is None else q_weight.contiguous(),
        None if k_weight is None else k_weight.contiguous(),
        eps,
        queries,
        0 if cache is None else cache.shape[2],
        q_heads,
        kv_heads,
        width // 2,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(1),
        *key_strides,
        *value_strides,
        *position_strides,
        BLOCK_HEADS=config.block_heads,
        BLOCK_HALF=max(16, triton.next_power_of_2(width // 2)),
        num_warps=config.num_warps,
        **overlap_options(q.device, tokens),
    )
    return out
