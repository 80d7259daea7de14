"""Attention of the decoder: rotary position embedding, grouped-query attention, key-value cache.

Letters of the shapes: B sequences, S tokens of the call, Hq query heads, Hkv key-value heads, D = `head_dim`, L the
key-value length: S without a cache, with one its cached tokens and S, or all its slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticCache, StaticLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_efficient.kernels.rotary_cache.api import rotary_cache
from hf_efficient.modeling.decoder.cache_compat import check_arguments, one_cache, update_cache
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig
from hf_efficient.modeling.decoder.decode_interface import is_decode_mask, query_slots
from hf_efficient.modeling.decoder.fused_steps import fused_linear, linear, may_fuse
from hf_efficient.modeling.decoder.rms_norm import DecoderRMSNorm, may_fuse_norm


def default_rope_frequencies(config: DecoderConfig, *_: Any, **__: Any) -> tuple[Tensor, float]:
    """Inverse frequencies ``theta ** (-2 i / D)`` for i in [0, D / 2), float32 [D / 2], and attention scaling 1.0.

    Further arguments, which transformers passes to such functions, are ignored.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
    return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0


class DecoderRotaryEmbedding(nn.Module):
    """Computes the cosines and sines of the rotary position embedding; called as ``(x, position_ids)``.

    The type is `config.rope_parameters["rope_type"]`: `default` or a key of transformers' `ROPE_INIT_FUNCTIONS`;
    another type raises `KeyError`.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor
    attention_scaling: float

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        # These names are read by `dynamic_rope_update` and by transformers' buffer initialisation.
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        self.compute_default_rope_parameters = default_rope_frequencies
        inv_freq, self.attention_scaling = self.frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def frequencies(self) -> tuple[Tensor, float]:
        """Inverse frequencies, float32 [D / 2], and attention scaling (1.0 by default) of the configured type."""
        compute = default_rope_frequencies if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        return compute(self.config)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the angles, [B or 1, S, D] each as `position_ids`, in dtype and device of `x`.

        Both are multiplied by `attention_scaling`. For the types `dynamic` and `longrope`, transformers' decorator
        `dynamic_rope_update` may first replace `inv_freq` according to the largest position.

        Args:
            x: only its dtype and device are used.
            position_ids: int64 [B, S], or [1, S] for all sequences.
        """
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """``(x1, x2) -> (-x2, x1)`` for the two halves of the last dimension, as in Llama; same shape as `x`."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q [B, Hq, S, D] and k [B, Hkv, S, D], rotated by cos and sin [B or 1, S, D] each; the shapes stay."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def repeat_kv(x: Tensor, repeats: int) -> Tensor:
    """Return x [B, Hkv, S, D] as [B, Hkv * repeats, S, D], each head repeated next to itself; x itself for 1."""
    if repeats == 1:
        return x
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, repeats, length, width).reshape(batch, heads * repeats, length, width)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in plain PyTorch, transformers' implementation `eager`.

    Args:
        module: the attention module; only its `training` is read.
        query: [B, Hq, S, D].
        key, value: [B, Hkv, L, D], Hq a multiple of Hkv.
        attention_mask: added to the scores, broadcasts to [B, Hq, S, L]; 0 where a query may attend. None for no mask.
        scaling: factor of the scores.
        dropout: probability of dropping a weight in training.

    Returns:
        Output [B, S, Hq, D] and weights [B, Hq, S, L], both in the dtype of `query`; the softmax is in float32.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class DecoderAttention(nn.Module):
    """Grouped-query attention with rotary positions; optional per-head RMSNorm on q and k, optional sliding window.

    Projections and the cache write use fused kernels where those may run (see `fused_steps.py`).
    """

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None

        width, kv_width = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = DecoderRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = DecoderRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output [B, S, hidden_size] and the weights [B, Hq, S, L].

        The weights are None unless the attention implementation returns them, as `eager` does.

        Args:
            hidden_states: [B, S, hidden_size].
            position_embeddings: cosines and sines, [B or 1, S, D] each.
            attention_mask: passed to the attention implementation, so of its type: None, a bool or float mask
                [B, 1, S, L] (`sdpa`, `eager`), [B, L] (flash attention), a `BlockMask` (flex attention); for
                `hfe_decode` a mask as for `sdpa`, or one of the int32 masks of `decode_interface.py`.
            past_key_values, cache: the cache, under either name; keys and values of the call, [B, Hkv, S, D] each, are
                added to it.
            kwargs: passed to the attention implementation.

        Raises:
            HFEError: two different caches were passed, or a cache, mask or positions were passed as an unknown keyword
                argument. Errors of the attention implementation propagate.
        """
        cache = one_cache(past_key_values, cache, kwargs)
        check_arguments(self, kwargs)
        q, k, v = self.project(hidden_states)
        write = find_cache_write(cache, self.layer_idx, attention_mask, q.shape[1])
        if write is not None and self.may_write_cache(q):
            q, k, v = self.write_cache(q, k, v, position_embeddings, write)
        else:
            if self.config.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = apply_rotary(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
            v = v.transpose(1, 2)
            if cache is not None:
                k, v = update_cache(cache, k, v, self.layer_idx, kwargs)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return linear(output.reshape(*hidden_states.shape[:-1], -1).contiguous(), self.o_proj), weights

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, S, Hq, D], keys and values [B, S, Hkv, D] of hidden states [B, S, hidden_size].

        Before QK-norm and rotary embedding. In one fused kernel where that may replace the three linear modules.
        """
        per_head = (*hidden_states.shape[:-1], -1, self.head_dim)
        modules = (self.q_proj, self.k_proj, self.v_proj)
        packed = fused_linear(hidden_states, modules)
        if packed is None:
            q, k, v = (module(hidden_states).view(per_head) for module in modules)
            return q, k, v
        kv_heads = self.config.num_key_value_heads
        heads = packed.view(per_head)
        q, k, v = heads.split((heads.shape[-2] - 2 * kv_heads, kv_heads, kv_heads), dim=-2)
        return q, k, v

    def may_write_cache(self, q: Tensor) -> bool:
        """True when `write_cache` may be used for queries `q` [B, S, Hq, D]: no gradient, QK-norms without hooks."""
        norms = (self.q_norm, self.k_norm) if self.config.qk_norm else ()
        return may_fuse(q) and all(may_fuse_norm(norm, q) for norm in norms)

    def write_cache(
        self, q: Tensor, k: Tensor, v: Tensor, position_embeddings: tuple[Tensor, Tensor], write: CacheWrite
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply QK-norm and rotary embedding and write keys and values to the cache, in one kernel.

        Args:
            q: [B, S, Hq, D].
            k, v: [B, S, Hkv, D].
            position_embeddings: cosines and sines, [B or 1, S, D] each.
            write: the cache memory, which is written in place; its `length` is advanced. `may_write_cache(q)` must
            hold.

        Returns:
            Rotated queries [B, Hq, S, D]; `write.keys` and `write.values` [B, Hkv, L, D], the cache's memory itself,
            which later calls write to.
        """
        norms = (self.q_norm, self.k_norm) if self.config.qk_norm else None
        q = rotary_cache(
            q,
            k,
            v,
            *position_embeddings,
            write.keys,
            write.values,
            write.slots,
            q_weight=norms[0].weight if norms else None,
            k_weight=norms[1].weight if norms else None,
            eps=self.config.rms_norm_eps,
            length=write.length,
        )
        return q, write.keys, write.values


class CacheWrite(NamedTuple):
    """Where the S tokens of a call are written in one layer of a cache with fixed slots (no sliding-window layer).

    Attributes:
        keys, values: [B, Hkv, L, D], the layer's memory.
        slots: integer [S] or [B, S], index into L of each token; a token with an index outside [0, L) is not stored.
        length: scalar tensor with the number of cached tokens, which the write advances by S; None to advance none.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    length: Tensor | None = None


def find_cache_write(cache: Cache | None, layer_idx: int, mask: Any, queries: int) -> CacheWrite | None:
    """Where a kernel may write the `queries` tokens of a call; None if `cache.update` must be called instead.

    A cache with a method `next_write(layer_idx)` returns its own `CacheWrite` or None. Otherwise the cache must be a
    `StaticCache` (see `static_layer`) and the mask a decode mask: the int32 mask that `pack_decode_mask` of
    `decode_interface.py` makes, whose row 0 holds the slot of each query.

    Args:
        cache: the cache of the call, or None.
        layer_idx: index of the layer.
        mask: the layer's attention mask, of any type.
        queries: number of tokens of the call, S.
    """
    if hasattr(cache, "next_write"):
        return cache.next_write(layer_idx)
    layer = static_layer(cache, layer_idx) if is_decode_mask(mask) else None
    if layer is None:
        return None
    return CacheWrite(layer.keys, layer.values, query_slots(mask, queries), layer.cumulative_length)


def static_layer(cache: Cache | None, layer_idx: int) -> StaticLayer | None:
    """The layer if `cache` is a `StaticCache` without offloading and the layer is an initialised `StaticLayer`.

    None otherwise.
    """
    layer = cache.layers[layer_idx] if isinstance(cache, StaticCache) and not cache.offloading else None
    # A sliding-window layer shifts its contents; another subclass may override `update`.
    return layer if type(layer) is StaticLayer and layer.is_initialized else None
