"""Triton forward kernel of topology_attention, after FlashAttention-2, and its launcher; `api.py` checks arguments."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_efficient.kernels.decode_attention.configs import padded_head_dim
from hf_efficient.kernels.topology_attention.configs import LaunchConfig, capability_of, launch_config
from hf_efficient.kernels.topology_blocks.block_lists import BLOCK
from hf_efficient.kernels.triton_language import HAVE_TRITON, TensorDescriptor, tl, triton

if HAVE_TRITON:

    @triton.jit
    def load_tile(
        source,
        batch,
        head,
        start,
        length,
        stride_b,
        stride_h,
        stride_s,
        ROWS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        USE_TMA: tl.constexpr,
    ):
        """Rows [start, start + ROWS) of one head, [ROWS, BLOCK_D]; zeros past the length and the head_dim."""
        if USE_TMA:
            return source.load([batch, head, start, 0]).reshape(ROWS, BLOCK_D)
        else:
            row = start + tl.arange(0, ROWS)
            offs_d = tl.arange(0, BLOCK_D)
            ptrs = source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
            ptrs += row.to(tl.int64)[:, None] * stride_s + offs_d[None, :]
            return tl.load(ptrs, mask=(row < length)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)

    @triton.jit
    def visible(
        offs_m,
        offs_n,
        query_segment,
        key_segment,
        segment_visibility,
        present,
        WORDS: tl.constexpr,
        KEYS_FIRST: tl.constexpr,
    ):
        """Which keys [N] each query [M] sees: [M, N], or [N, M] with KEYS_FIRST.

        `segment_visibility` is that of the batch row, `present` the bitmap of the segments in the block of the keys.
        """
        bit = (key_segment & 63).to(tl.int64)
        causal = offs_n[:, None] <= offs_m[None, :] if KEYS_FIRST else offs_m[:, None] >= offs_n[None, :]
        seen = causal & False
        for word in range(WORDS):
            if WORDS == 1 or tl.load(present + word) != 0:
                bitmap = tl.load(
                    segment_visibility + query_segment.to(tl.int64) * WORDS + word, mask=query_segment >= 0, other=0
                )
                in_word = (key_segment >> 6) == word
                if KEYS_FIRST:
                    seen |= in_word[:, None] & (((bitmap[None, :] >> bit[:, None]) & 1) != 0)
                else:
                    seen |= in_word[None, :] & (((bitmap[:, None] >> bit[None, :]) & 1) != 0)
        return causal & seen

    @triton.jit
    def segments_of(segment_ids, index, length, count):
        """Segments of the tokens at `index`; -1 for holes, past the length, and for segments without a bitmap."""
        segment = tl.load(segment_ids + index, mask=index < length, other=-1)
        return tl.where(segment < count, segment, -1)

    # FlashAttention-2's forward pass with its online softmax, over the listed key blocks only: m_i is the running
    # maximum of the scores (to base 2), l_i the running sum of exponentials, acc the unnormalised output, alpha the
    # factor that rescales l_i and acc to a new maximum.
    @triton.jit(do_not_specialize=["length", "blocks", "segments"])
    def forward_kernel(
        out,
        lse,
        q,
        k,
        v,
        segment_ids,
        segment_visibility,
        counts,
        lists,
        present,
        length,
        blocks,
        segments,
        heads,
        qk_scale,
        q_stride_b,
        q_stride_h,
        q_stride_s,
        k_stride_b,
        k_stride_h,
        k_stride_s,
        v_stride_b,
        v_stride_h,
        v_stride_s,
        segment_stride,
        segment_visibility_stride,
        GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        WORDS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK: tl.constexpr,
        NUM_STAGES: tl.constexpr,
        USE_TMA: tl.constexpr,
    ):
        # The last queries see most keys, and start first: no long program is left for the end.
        block_m = tl.num_programs(0) - 1 - tl.program_id(0)
        head = tl.program_id(1) % heads
        batch = tl.program_id(1) // heads
        row = (batch * (segment_stride > 0)).to(tl.int64)
        kv_head = head // GROUP
        start_m = block_m * BLOCK_M
        block = start_m // BLOCK
        PARTS: tl.constexpr = BLOCK // BLOCK_N

        counts += row * 4 * blocks + block
        lists += (row * 4 * blocks + block) * blocks
        q_tile = load_tile(
            q, batch, head, start_m, length, q_stride_b, q_stride_h, q_stride_s,
            BLOCK_M, HEAD_DIM, BLOCK_D, USE_TMA,
        )  # fmt: skip
        m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)

        # Full blocks: every query sees every key, so no mask.
        count = tl.load(counts) * PARTS
        key_block = tl.load(lists)
        for i in tl.range(0, count, num_stages=NUM_STAGES):
            start_n = key_block * BLOCK + (i % PARTS) * BLOCK_N
            key_block = tl.load(lists + tl.minimum((i + 1) // PARTS, blocks - 1))
            k_tile = load_tile(
                k, batch, kv_head, start_n, length, k_stride_b, k_stride_h, k_stride_s,
                BLOCK_N, HEAD_DIM, BLOCK_D, USE_TMA,
            )  # fmt: skip
            qk = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            m_ij = tl.maximum(m_i, tl.max(qk, axis=1) * qk_scale)
            p = tl.exp2(qk * qk_scale - m_ij[:, None])
            alpha = tl.exp2(m_i - m_ij)
            l_i = l_i * alpha + tl.sum(p, axis=1)
            acc = acc * alpha[:, None]
            v_tile = load_tile(
                v, batch, kv_head, start_n, length, v_stride_b, v_stride_h, v_stride_s,
                BLOCK_N, HEAD_DIM, BLOCK_D, USE_TMA,
            )  # fmt: skip
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
            m_i = m_ij

        # Partial blocks: few, with a mask.
        offs_m = start_m + tl.arange(0, BLOCK_M)
        segment_ids += row * segment_stride
        segment_visibility += row * segment_visibility_stride
        query_segment = segments_of(segment_ids, offs_m, length, segments)
        lists += blocks.to(tl.int64) * blocks
        for i in tl.range(0, tl.load(counts + blocks) * PARTS, num_stages=1):
            key_block = tl.load(lists + i // PARTS)
            start_n = key_block * BLOCK + (i % PARTS) * BLOCK_N
            offs_n = start_n + tl.arange(0, BLOCK_N)
            key_segment = segments_of(segment_ids, offs_n, length, segments)
            seen = visible(
                offs_m,
                offs_n,
                query_segment,
                key_segment,
                segment_visibility,
                present + (row * blocks + key_block) * WORDS,
                WORDS,
                False,
            )
            k_tile = load_tile(
                k, batch, kv_head, start_n, length, k_stride_b, k_stride_h, k_stride_s,
                BLOCK_N, HEAD_DIM, BLOCK_D, USE_TMA,
            )  # fmt: skip
            v_tile = load_tile(
                v, batch, kv_head, start_n, length, v_stride_b, v_stride_h, v_stride_s,
                BLOCK_N, HEAD_DIM, BLOCK_D, USE_TMA,
            )  # fmt: skip
            # A hole may hold NaN, and 0 * NaN is NaN.
            v_tile = tl.where((key_segment >= 0)[:, None], v_tile, 0.0)
            qk = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * qk_scale
            qk = tl.where(seen, qk, float("-inf"))
            m_ij = tl.maximum(m_i, tl.max(qk, axis=1))
            # While a row has seen no key its maximum is -inf, and -inf - -inf is NaN.
            m_safe = tl.where(m_ij == float("-inf"), 0.0, m_ij)
            p = tl.exp2(qk - m_safe[:, None])
            alpha = tl.exp2(m_i - m_safe)
            l_i = l_i * alpha + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
            m_i = m_ij

        mask_m = offs_m < length
        l_safe = tl.where(l_i > 0.0, l_i, 1.0)
        offs_d = tl.arange(0, BLOCK_D)
        # Row of the output [B, S, Hq], which is what a model's output projection reads.
        out_row = (batch.to(tl.int64) * length + offs_m) * heads + head
        tl.store(
            out + out_row[:, None] * HEAD_DIM + offs_d[None, :],
            (acc / l_safe[:, None]).to(out.dtype.element_ty),
            mask=mask_m[:, None] & (offs_d < HEAD_DIM)[None, :],
        )
        # Log-sum-exp to base 2: -inf where a query sees nothing, 0 past the length up to the end of the last block.
        tl.store(
            lse + tl.program_id(1).to(tl.int64) * blocks * BLOCK + offs_m,
            tl.where(mask_m, m_i + tl.log2(l_safe), 0.0),
        )


class SharedLaunch(NamedTuple):
    """Arguments that the three launches share."""

    topology: tuple[Tensor, Tensor]
    strides: tuple[int, ...]
    constants: dict[str, Any]


def shared_launch(
    config: LaunchConfig, segment_ids: Tensor, segment_visibility: Tensor, *tiled: Tensor
) -> SharedLaunch:
    """Topology, its strides and the constants of a launch; `tiled` are the tensors that it loads in tiles, `q` and `k`
    first."""
    head_dim = tiled[0].shape[3]
    segment_ids, segment_visibility = segment_ids.contiguous(), segment_visibility.contiguous()
    constants = {
        "GROUP": tiled[0].shape[1] // tiled[1].shape[1],
        "HEAD_DIM": head_dim,
        "WORDS": segment_visibility.shape[2],
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK": BLOCK,
        "NUM_STAGES": config.num_stages,
        "USE_TMA": config.use_tma and all(map(_tma_readable, tiled)),
        "num_warps": config.num_warps,
    }
    # One row of segments may serve all batch rows.
    strides = tuple(0 if x.shape[0] == 1 else x.stride(0) for x in (segment_ids, segment_visibility))
    return SharedLaunch((segment_ids, segment_visibility), strides, constants)


def _tma_readable(x: Tensor) -> bool:
    """True where the tensor memory accelerator can read `x`: strides of whole 16 bytes, none of them zero."""
    return x.data_ptr() % 16 == 0 and all(
        stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3]
    )


def tiles(x: Tensor, rows: int, shared: SharedLaunch) -> Any:
    """`x` [B, H, S, D] as `load_tile` takes it, for tiles of `rows` rows: a pointer, or a descriptor for the TMA."""
    if not shared.constants["USE_TMA"]:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, shared.constants["BLOCK_D"]])


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor,
    segment_visibility: Tensor,
    counts: Tensor,
    lists: Tensor,
    present: Tensor,
    scale: float,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, S, Hq, D], and the log-sum-exp (to base 2) of each query's scores [B, Hq, NB * BLOCK].

    `config`: instead of that of the table, for measurements.
    """
    batch, heads, length, head_dim = q.shape
    out = torch.empty((batch, length, heads, head_dim), dtype=q.dtype, device=q.device)
    blocks = lists.shape[2]
    lse = torch.empty((batch, heads, blocks * BLOCK), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    config = config or launch_config("forward", head_dim, q.element_size(), capability_of(q.device))
    shared = shared_launch(config, segment_ids, segment_visibility, q, k, v)
    forward_kernel[(blocks * (BLOCK // config.block_m), batch * heads)](
        out,
        lse,
        tiles(q, config.block_m, shared),
        tiles(k, config.block_n, shared),
        tiles(v, config.block_n, shared),
        *shared.topology,
        counts,
        lists,
        present,
        length,
        blocks,
        segment_visibility.shape[1],
        heads,
        scale * math.log2(math.e),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *shared.strides,
        **shared.constants,
    )
    return out, lse
