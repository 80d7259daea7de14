"""One layer of the decoder: norms, token mixer and feed-forward around the residual stream.

A patch, that is, a change of the architecture, may replace any of these modules.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_efficient.modeling.decoder.cache_compat import cache_argument, one_cache
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig
from hf_efficient.modeling.decoder.fused_steps import fused_gate, is_unhooked, linear, may_fuse
from hf_efficient.modeling.decoder.rms_norm import add_and_norm

# Modules whose hooks do not need the whole residual stream as a layer's output.
_PASSIVE_HOOKS = ("transformers.utils.output_capturing", "torch.distributed.fsdp.")


class GatedMLP(nn.Module):
    """Gated feed-forward: ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, token_ids: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Return ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``, plus `residual` if given.

        Args:
            hidden_states: x, [..., hidden_size].
            token_ids: not used; the decoder passes them to every feed-forward, since a patch's may be token-indexed.
            residual: [..., hidden_size], added to the output.

        Returns:
            [..., hidden_size].
        """
        gated = fused_gate(hidden_states, self.gate_proj, self.up_proj, self.act_fn)
        if gated is None:
            gated = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return linear(gated, self.down_proj, residual)


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block ``h += mixer(norm(h)); h += mlp(norm(h))``.

    Args:
        mixer: the token mixer, called like `DecoderAttention`.
        mlp: the feed-forward, called like `GatedMLP`.
        input_norm: norm before the mixer.
        post_norm: norm before the feed-forward.
    """

    def __init__(self, mixer: nn.Module, mlp: nn.Module, input_norm: nn.Module, post_norm: nn.Module) -> None:
        super().__init__()
        # Typed Any: a patch's module has attributes of its own.
        self.self_attn: Any = mixer
        self.mlp: Any = mlp
        self.input_layernorm: Any = input_norm
        self.post_attention_layernorm: Any = post_norm

    def forward(
        self,
        hidden_states: Tensor,
        pending: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        token_ids: Tensor | None = None,
        carry_residual: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the residual stream after this layer.

        Args:
            hidden_states: [B, S, hidden_size], the residual stream.
            pending: [B, S, hidden_size], output of the previous layer's feed-forward that is not yet added to
                `hidden_states`; None if it is. Passed as a positional argument, because gradient checkpointing may
                look for gradients only among these.
            attention_mask: mask for the mixer, in the form that the attention implementation expects.
            position_embeddings: cosines and sines, [B or 1, S, head_dim] each; `DecoderAttention` needs them.
            past_key_values, cache: the cache, under either name.
            token_ids: what `prepare_token_inputs` of the model returned; int64 [B, S] without a patch.
            carry_residual: return the feed-forward's output separately instead of adding it, so that the next norm
                adds it in the same kernel.
            kwargs: passed to the mixer.

        Returns:
            [B, S, hidden_size]; with `carry_residual` a tuple of the stream and the pending output, both of that shape.

        Raises:
            HFEError: two different caches were passed; by `DecoderAttention`, also if a cache, mask or positions were
                passed as an unknown keyword argument.
        """
        cache = one_cache(past_key_values, cache, kwargs)
        inputs = (hidden_states, None) if pending is None else (pending, hidden_states)
        # `statistic` is what the input norm hands to the post-attention norm, None for an RMSNorm.
        normed, hidden_states, statistic = add_and_norm(self.input_layernorm, *inputs)
        mixed, _ = self.self_attn(
            normed,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **cache_argument(cache),
            **kwargs,
        )
        normed, hidden_states, _ = add_and_norm(self.post_attention_layernorm, mixed, hidden_states, statistic)
        if carry_residual:
            return hidden_states, self.mlp(normed, token_ids)
        if may_fuse(normed) and is_unhooked(self.mlp):  # a hook must get the feed-forward's output without the residual
            return self.mlp(normed, token_ids, residual=hidden_states)
        return hidden_states + self.mlp(normed, token_ids)

    def has_output_hooks(self) -> bool:
        """True if a hook or wrapper may read the layer's output, which then must be one tensor, the residual stream."""
        # Hooks of transformers' output recording stay installed after use, and FSDP's hooks accept any output.
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        origins = [getattr(hook, "__module__", "") for each in hooks for hook in each.values()]
        readers = [origin for origin in origins if not origin.startswith(_PASSIVE_HOOKS)]
        return bool(readers) or "forward" in self.__dict__ or _has_any_global_hook()
