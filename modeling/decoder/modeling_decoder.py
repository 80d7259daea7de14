"""The decoder that every language-model patch shares: Llama, Mistral, Qwen2 and Qwen3 by configuration.

Nothing here depends on a patch. A patch subclasses `DecoderModel` and overrides a factory method (`build_norm`,
`build_mlp`, `build_mixer`) or a hook (`build_masks`, `resolve_token_ids`, `prepare_token_inputs`, `begin_lookup`); the
overrides call `super()`, so that patches compose. A recurrent model sets `cache_class`.
"""

from __future__ import annotations

# ruff: noqa: E402  (a too old transformers fails on an import below; this error names the releases that work)
from hf_efficient.modeling.base.tested_releases import check_transformers

check_transformers()

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_efficient.environment import check_data
from hf_efficient.errors import HFEError, TokenIdError
from hf_efficient.modeling.base.class_lookup import offer_to_transformers
from hf_efficient.modeling.base.registered_model import RegisteredModel
from hf_efficient.modeling.decoder.attention import DecoderAttention, DecoderRotaryEmbedding
from hf_efficient.modeling.decoder.cache_compat import (
    CACHE_ARGUMENT,
    CACHE_ARGUMENTS,
    cache_argument,
    cache_of_arguments,
    check_arguments,
    one_cache,
)
from hf_efficient.modeling.decoder.cache_contract import round_capacity
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig
from hf_efficient.modeling.decoder.decode_cache import DecodeCache
from hf_efficient.modeling.decoder.decode_interface import DECODE_ATTENTION
from hf_efficient.modeling.decoder.fused_steps import fused_gate, is_unhooked, linear, may_fuse
from hf_efficient.modeling.decoder.generation_decoder import CapturedGeneration
from hf_efficient.modeling.decoder.rms_norm import DecoderRMSNorm, add_and_norm

# Tensors that change what attention computes: a checkpoint that has them needs a configuration that does.
_ATTENTION_EXTRA = re.compile(r"\.self_attn\.([qkvo]_proj\.bias|[qk]_norm\.weight)$")
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
        """``down_proj(act_fn(gate_proj(x)) * up_proj(x))``, plus `residual` where given.

        Args:
            hidden_states: [..., hidden_size].
            token_ids: not used; every feed-forward is called with them.
            residual: [..., hidden_size], added to the output.

        Returns:
            [..., hidden_size].
        """
        gated = fused_gate(hidden_states, self.gate_proj, self.up_proj, self.act_fn)
        if gated is None:
            gated = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return linear(gated, self.down_proj, residual)


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block ``h += mixer(norm(h)); h += mlp(norm(h))`` of modules that the model's factory methods built."""

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
        """The residual stream after this layer.

        Args:
            hidden_states: [B, S, hidden_size], the residual stream.
            pending: [B, S, hidden_size], output of the previous layer's feed-forward that is still to be added to
                `hidden_states`; None when it is. Positional: gradient checkpointing may look for gradients only there.
            attention_mask: mask of this layer's attention, of whatever type the attention implementation takes.
            position_embeddings: cosines and sines, [B, S, head_dim] each.
            past_key_values, cache: the cache, under either name.
            token_ids: what `prepare_token_inputs` of the model returned; int64 [B, S] without a patch.
            carry_residual: return the feed-forward's output beside the stream instead of adding it, so that the next
                norm adds it in the same kernel.

        Returns:
            [B, S, hidden_size]; with `carry_residual` the stream and the pending output, both of that shape.
        """
        cache = one_cache(past_key_values, cache, kwargs)
        inputs = (hidden_states, None) if pending is None else (pending, hidden_states)
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
        if may_fuse(normed) and is_unhooked(self.mlp):  # a hook must see the feed-forward's own output
            return self.mlp(normed, token_ids, residual=hidden_states)
        return hidden_states + self.mlp(normed, token_ids)

    def has_output_hooks(self) -> bool:
        """True when a hook or wrapper may read the layer's output, which then must be the whole residual stream."""
        # transformers' recording hooks stay installed after one use; FSDP's hooks accept any output.
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        origins = [getattr(hook, "__module__", "") for each in hooks for hook in each.values()]
        foreign = [origin for origin in origins if not origin.startswith(_PASSIVE_HOOKS)]
        return bool(foreign) or "forward" in self.__dict__ or _has_any_global_hook()


class DecoderPreTrainedModel(RegisteredModel, PreTrainedModel):
    config: DecoderConfig
    config_class = DecoderConfig  # transformers reads annotations unevaluated, so it is named here too
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = list(CACHE_ARGUMENTS)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The `CapturableCache` of captured steps. A recurrent model sets its own class, which its forward creates too.
    cache_class: type[Any] = DecodeCache
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": DecoderAttention}

    def __init__(self, config: DecoderConfig, *args: Any, **kwargs: Any) -> None:
        config.validate()  # again: keyword arguments of `from_pretrained` set fields without the cross-field checks
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint that the configuration does not describe is an error, not a warning.

        Raises:
            HFEError: the checkpoint is of another architecture; see `check_loaded`.
        """
        model, loading_info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing_keys = set(loading_info["missing_keys"])
        # An empty state dict asks for fresh weights.
        if any(name not in missing_keys for name, _ in model.named_parameters()):
            model.check_loaded(missing_keys, set(loading_info["unexpected_keys"]))
        return (model, loading_info) if output_loading_info else model

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """As in transformers, with `hfe_decode` as the default."""
        if requested_attention in (None, "hfe_decode"):  # an exported copy registers it under a name of its own
            requested_attention = DECODE_ATTENTION
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def check_loaded(self, missing_keys: set[str], unexpected_keys: set[str]) -> None:
        """Raise `HFEError` when the loaded checkpoint is of another architecture."""
        foreign = sorted(key for key in unexpected_keys if _ATTENTION_EXTRA.search(key))
        if foreign:
            raise HFEError(
                f"the configuration has no place for {len(foreign)} tensors of the checkpoint, {foreign[0]} first",
                "convert the stock model with `hf-efficient convert`, which sets attention_bias and qk_norm",
            )

    def build_cache(self, batch_size: int, capacity: int) -> Any:
        """An empty cache of `cache_class` with memory for `capacity` tokens of each sequence."""
        return self.cache_class(self.config, batch_size, capacity, self.dtype, self.device)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DecoderRotaryEmbedding):
            inv_freq, module.attention_scaling = module.frequencies()
            init.copy_(module.inv_freq, inv_freq)
            init.copy_(module.original_inv_freq, inv_freq)


class DecoderModel(DecoderPreTrainedModel):
    """Embedding, layers, final norm. Patches override the factory methods and hooks below."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(self.build_layer(i) for i in range(config.num_hidden_layers))
        self.norm = self.build_norm("final")
        self.rotary_emb = DecoderRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    # Factory methods

    def build_layer(self, layer_idx: int) -> nn.Module:
        """One decoder layer, made of the modules that the other factory methods return."""
        norms = (self.build_norm(position, layer_idx) for position in ("input", "post"))
        return DecoderLayer(self.build_mixer(layer_idx), self.build_mlp(layer_idx), *norms)

    def build_norm(self, position: str, layer_idx: int | None = None) -> nn.Module:
        """The norm of a position: `input` (before a mixer), `post` (before a feed-forward) or `final` (after all)."""
        return DecoderRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)

    def build_mixer(self, layer_idx: int) -> nn.Module:
        """The token mixer of a layer, called like `DecoderAttention`."""
        return DecoderAttention(self.config, layer_idx)

    def build_mlp(self, layer_idx: int) -> nn.Module:
        """The feed-forward of a layer, called like `GatedMLP`."""
        return GatedMLP(self.config)

    # Hooks

    def build_masks(self, **mask_inputs: Any) -> dict[str, Any]:
        """Attention mask of each type in `config.layer_types`; arguments as for transformers' `create_causal_mask`."""
        create = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        types = set(self.config.layer_types)
        if isinstance(cache_of_arguments(mask_inputs), DecodeCache) and mask_inputs["inputs_embeds"].shape[1] == 1:
            # Without a mask a single token would see the empty slots; transformers only knows its own static caches.
            mask_inputs["allow_is_causal_skip"] = False
        return {layer_type: create[layer_type](config=self.config, **mask_inputs) for layer_type in types}

    def create_cache(self, inputs_embeds: Tensor) -> Any:
        """The cache of a call with `use_cache` and without a cache, from its embeddings [B, S, hidden_size]."""
        if self.cache_class is DecodeCache:
            return DynamicCache(config=self.config)
        return self.build_cache(inputs_embeds.shape[0], round_capacity(inputs_embeds.shape[1]))

    def resolve_token_ids(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Ids, int64 [B, S], for token-indexed modules; None with `inputs_embeds` alone.

        A patch may remove its own arguments from `kwargs`.
        """
        return input_ids

    def prepare_token_inputs(
        self,
        token_ids: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """What the layers get as `token_ids`, from the arguments of the call.

        A patch overrides it to change what token-indexed modules read, and may remove its own arguments from `kwargs`.
        """
        return self.begin_lookup(token_ids)

    def begin_lookup(self, token_ids: Tensor | None) -> Any:
        """The token ids; a patch may start to fetch table rows for them and return a handle in their place."""
        return token_ids

    def vocabulary_rows(self) -> int:
        """Rows of the embedding; `config.vocab_size` where an adapter's wrapper hides them."""
        return getattr(self.embed_tokens, "num_embeddings", self.config.vocab_size)

    def check_token_ids(self, ids: Tensor) -> None:
        """Raise `TokenIdError` for an id outside [0, vocab_size): on the CPU always, elsewhere with HFE_CHECK=1."""
        if torch.compiler.is_compiling() or ids.numel() == 0 or ids.is_meta:
            return
        if ids.device.type != "cpu" and not check_data():
            return
        rows = self.vocabulary_rows()
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= rows:
            bad = ((ids < 0) | (ids >= rows)).nonzero()[0].tolist()
            raise TokenIdError(
                f"token id {int(ids[tuple(bad)])} at position {bad} is outside 0..{rows - 1}",
                "use the tokenizer that belongs to this checkpoint, or resize_token_embeddings first",
            )

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm, `last_hidden_state` [B, S, hidden_size], and the cache.

        Args:
            input_ids: int64 [B, S]; or `inputs_embeds`, not both.
            attention_mask: [B, cached tokens + S], 0 at padding; a mask [B, 1, S, key-value length]; or a mapping of
                layer type to mask, which is used as it is.
            position_ids: int64 [B, S] or [1, S]; by default those that follow the cached tokens.
            past_key_values, cache: the cache, under either name.
            inputs_embeds: [B, S, hidden_size].
            use_cache: create a cache where none is passed; by default `config.use_cache`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` were passed.
            TokenIdError: an id is outside the vocabulary; see `check_token_ids`.
            HFEError: two different caches were passed, or a cache, mask or positions under an unknown name.
        """
        cache = one_cache(past_key_values, cache, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        token_ids = self.resolve_token_ids(input_ids, inputs_embeds, kwargs)
        if token_ids is not None:
            self.check_token_ids(token_ids)
        token_inputs = self.prepare_token_inputs(token_ids, attention_mask, position_ids, cache, kwargs)
        check_arguments(self, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = self.create_cache(inputs_embeds)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)

        # `generate` with a static cache prepares the masks itself and passes the mapping.
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = self.build_masks(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **cache_argument(cache),
            )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        # Early exit in assisted generation lowers `num_hidden_layers` during a call.
        layers = self.layers[: self.config.num_hidden_layers]
        defer = self._may_defer_residual(layers, kwargs)
        pending: Tensor | None = None
        for layer_type, layer in zip(self.config.layer_types, layers, strict=False):
            outputs = layer(
                hidden_states,
                pending,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                token_ids=token_inputs,
                carry_residual=defer,
                **cache_argument(cache),
                **kwargs,
            )
            hidden_states, pending = outputs if defer else (outputs, None)
        inputs = (hidden_states, None) if pending is None else (pending, hidden_states)
        normed, _, _ = add_and_norm(self.norm, *inputs)
        return BaseModelOutputWithPast(last_hidden_state=normed, **cache_argument(cache))

    def layers_here(self) -> dict[int, Any]:
        """This pipeline stage's layers by index; a serving engine leaves an `nn.Identity` for each of another stage."""
        return {index: layer for index, layer in enumerate(self.layers) if not isinstance(layer, nn.Identity)}

    def _may_defer_residual(self, layers: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the residual add may be deferred into the next norm: no output between two layers is read."""
        recorded = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        if not self.config.carry_residual or recorded or len(self.layers_here()) < len(self.layers):
            return False
        return not any(layer.has_output_hooks() for layer in layers)


class DecoderForCausalLM(DecoderPreTrainedModel, CapturedGeneration, GenerationMixin):
    """A `DecoderModel` and a language-model head. Subclasses set `model_class`."""

    model_class: type[DecoderModel] = DecoderModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_rep"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        offer_to_transformers(cls)

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, K, vocab_size], the cache, and with `labels` the next-token cross-entropy.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache: as for
                `DecoderModel`.
            labels: int64 [B, S]; -100 is ignored.
            logits_to_keep: 0 for all positions (K = S), n for the last n, or a tensor of K positions.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        # slice(-0, None) is the whole sequence
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = linear(outputs.last_hidden_state[:, kept], self.lm_head)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **cache_argument(getattr(outputs, CACHE_ARGUMENT)),
        )


__all__ = ["DecoderConfig", "DecoderForCausalLM", "DecoderModel", "DecoderPreTrainedModel"]
