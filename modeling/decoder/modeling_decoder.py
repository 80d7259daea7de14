"""The decoder that every language-model patch shares: Llama, Mistral, Qwen2 and Qwen3 by configuration.

Nothing here depends on a patch, that is, a change of the architecture. A patch subclasses `DecoderModel`
and overrides a factory method (`build_norm`, `build_mlp`, `build_mixer`) or a hook (`build_masks`, `resolve_token_ids`,
`prepare_token_inputs`, `begin_lookup`); the overrides call `super()`, so that patches compose. A recurrent model sets
`cache_class`.

Letters of the shapes: B sequences, S tokens of the call, L key-value length (cached tokens and S, or all slots of a
static cache).
"""

from __future__ import annotations

# ruff: noqa: E402  (an old transformers fails on an import below; this check first names the releases that work)
from hf_efficient.modeling.base.tested_releases import check_transformers

check_transformers()

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
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
from hf_efficient.modeling.decoder.decoder_layer import DecoderLayer, GatedMLP
from hf_efficient.modeling.decoder.fused_steps import linear
from hf_efficient.modeling.decoder.generation_decoder import CapturedGeneration
from hf_efficient.modeling.decoder.rms_norm import DecoderRMSNorm, add_and_norm

# Tensors that change what attention computes: a checkpoint that has them needs a configuration that does.
_ATTENTION_EXTRA = re.compile(r"\.self_attn\.([qkvo]_proj\.bias|[qk]_norm\.weight)$")


class DecoderPreTrainedModel(RegisteredModel, PreTrainedModel):
    """Loading, checks and settings that `DecoderModel` and the models with a head share.

    Raises:
        ValueError: the configuration breaks a rule across fields, see `DecoderConfig.validate_architecture`.
    """

    config: DecoderConfig
    config_class = DecoderConfig  # set too: transformers does not resolve the string annotation above
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = list(CACHE_ARGUMENTS)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Cache of decoding with CUDA graphs, a `CapturableCache` (see `cache_contract.py`). A recurrent model sets its own
    # class, of which its forward creates a cache too.
    cache_class: type[Any] = DecodeCache
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": DecoderAttention}

    def __init__(self, config: DecoderConfig, *args: Any, **kwargs: Any) -> None:
        config.validate()  # again: keyword arguments of `from_pretrained` set fields without the cross-field checks
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers; then `check_loaded` checks missing and unexpected tensors, if any parameter was loaded.

        Raises:
            HFEError: the checkpoint is of another architecture; transformers only warns.
        """
        model, loading_info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing_keys = set(loading_info["missing_keys"])
        # With an empty state dict every parameter is missing: the caller wants initial weights, so nothing is checked.
        if any(name not in missing_keys for name, _ in model.named_parameters()):
            model.check_loaded(missing_keys, set(loading_info["unexpected_keys"]))
        return (model, loading_info) if output_loading_info else model

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """As in transformers, with `hfe_decode` (see `decode_interface.py`) as the default."""
        if requested_attention in (
            None,
            "hfe_decode",
        ):  # code exported into a checkpoint registers it under its own name
            requested_attention = DECODE_ATTENTION
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def check_loaded(self, missing_keys: set[str], unexpected_keys: set[str]) -> None:
        """Check that the checkpoint has no attention biases or QK-norms that the model lacks. A patch checks more.

        Args:
            missing_keys: parameters and buffers of the model that the checkpoint does not have.
            unexpected_keys: tensors of the checkpoint that the model does not have.

        Raises:
            HFEError: the checkpoint is of another architecture.
        """
        unexpected = sorted(key for key in unexpected_keys if _ATTENTION_EXTRA.search(key))
        if unexpected:
            raise HFEError(
                f"the model does not have {len(unexpected)} tensors of the checkpoint, e.g. {unexpected[0]}",
                "convert the stock model with `hf-efficient convert`, which sets attention_bias and qk_norm",
            )

    def build_cache(self, batch_size: int, capacity: int) -> Any:
        """Return an empty cache of `cache_class` with memory for `capacity` tokens of each sequence.

        In the dtype and on the device of the model. `torch.OutOfMemoryError` propagates.
        """
        return self.cache_class(self.config, batch_size, capacity, self.dtype, self.device)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module in place, as in transformers; the rotary frequencies too."""
        super()._init_weights(module)
        if isinstance(module, DecoderRotaryEmbedding):
            inv_freq, module.attention_scaling = module.frequencies()
            init.copy_(module.inv_freq, inv_freq)
            init.copy_(module.original_inv_freq, inv_freq)


class DecoderModel(DecoderPreTrainedModel):
    """Decoder without a head: embedding, layers, final norm. Patches override the factory methods and hooks below."""

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
        """Return layer `layer_idx`, made of the modules that the other factory methods return."""
        norms = (self.build_norm(position, layer_idx) for position in ("input", "post"))
        return DecoderLayer(self.build_mixer(layer_idx), self.build_mlp(layer_idx), *norms)

    def build_norm(self, position: str, layer_idx: int | None = None) -> nn.Module:
        """Return a norm over `hidden_size` channels.

        Args:
            position: `input` (before a mixer), `post` (before a feed-forward) or `final` (after the last layer).
            layer_idx: index of the layer; None for `final`.
        """
        return DecoderRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)

    def build_mixer(self, layer_idx: int) -> nn.Module:
        """Return the token mixer of a layer, called like `DecoderAttention`."""
        return DecoderAttention(self.config, layer_idx)

    def build_mlp(self, layer_idx: int) -> nn.Module:
        """Return the feed-forward of a layer, called like `GatedMLP`."""
        return GatedMLP(self.config)

    # Hooks

    def build_masks(self, **mask_inputs: Any) -> dict[str, Any]:
        """Return the attention mask of each type in `config.layer_types`.

        Args:
            mask_inputs: arguments of transformers' `create_causal_mask` except `config`: `inputs_embeds`
                [B, S, hidden_size], `attention_mask`, `position_ids` and the cache.

        Returns:
            Layer type -> mask of the attention implementation's type; None where it needs none.
        """
        create = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        types = set(self.config.layer_types)
        if isinstance(cache_of_arguments(mask_inputs), DecodeCache) and mask_inputs["inputs_embeds"].shape[1] == 1:
            # Without a mask a single token would attend to the empty slots; transformers handles this for its own
            # static caches only.
            mask_inputs["allow_is_causal_skip"] = False
        return {layer_type: create[layer_type](config=self.config, **mask_inputs) for layer_type in types}

    def create_cache(self, inputs_embeds: Tensor) -> Any:
        """Return an empty cache for a call with `use_cache` that was passed none.

        A `DynamicCache`, or a cache of `cache_class` if the model sets another class than `DecodeCache`.

        Args:
            inputs_embeds: embeddings of the call, [B, S, hidden_size].
        """
        if self.cache_class is DecodeCache:
            return DynamicCache(config=self.config)
        return self.build_cache(inputs_embeds.shape[0], round_capacity(inputs_embeds.shape[1]))

    def resolve_token_ids(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Return the ids of the call for token-indexed modules, int64 [B, S]; None with `inputs_embeds` alone.

        Args:
            input_ids, inputs_embeds: as for `forward`; one of them is None.
            kwargs: further arguments of `forward`; a patch may remove its own.
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
        """Return what the layers get as `token_ids`; without a patch the ids themselves.

        A patch overrides it to change what token-indexed modules read.

        Args:
            token_ids: result of `resolve_token_ids`.
            attention_mask, position_ids, past_key_values: as for `forward`, the cache under either name.
            kwargs: further arguments of `forward`; a patch may remove its own.
        """
        return self.begin_lookup(token_ids)

    def begin_lookup(self, token_ids: Tensor | None) -> Any:
        """Return the ids, int64 [B, S] or None.

        A patch may start to copy the rows of its tables for these ids, and return an object that holds them instead.
        """
        return token_ids

    def vocabulary_rows(self) -> int:
        """Return the number of rows of the embedding; `config.vocab_size` if an adapter's wrapper hides it."""
        return getattr(self.embed_tokens, "num_embeddings", self.config.vocab_size)

    def check_token_ids(self, ids: Tensor) -> None:
        """Check that all ids, int64 [B, S], are rows of the embedding.

        Ids on the CPU are always checked; on other devices with HFE_CHECK=1 only, since the check synchronises. Not in
        a compiled call.

        Raises:
            TokenIdError: an id is negative or too large; the message has the first such id and its position.
        """
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
        """Return the hidden states after the final norm, `last_hidden_state` [B, S, hidden_size], and the cache.

        Args:
            input_ids: int64 [B, S]; or `inputs_embeds`, not both.
            attention_mask: [B, cached tokens + S], 0 at padding; a mask [B, 1, S, L]; or a dictionary of layer type to
                mask, which is used as it is.
            position_ids: int64 [B, S] or [1, S]; by default those that follow the cached tokens, padding counted too.
            past_key_values, cache: the cache, under either name.
            inputs_embeds: [B, S, hidden_size].
            use_cache: create a cache if none is passed; by default `config.use_cache`.
            kwargs: `output_hidden_states`, `output_attentions`, arguments of patches; the others are passed to the
                layers.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` were passed.
            TokenIdError: an id is outside the vocabulary; see `check_token_ids`.
            HFEError: two different caches were passed, or a cache, mask or positions were passed as an unknown keyword
                argument. A patch's hooks may raise more.
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

        # `generate` with a static cache prepares the masks itself and passes the dictionary.
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
        carry_residual = self._may_carry_residual(layers, kwargs)
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
                carry_residual=carry_residual,
                **cache_argument(cache),
                **kwargs,
            )
            hidden_states, pending = outputs if carry_residual else (outputs, None)
        inputs = (hidden_states, None) if pending is None else (pending, hidden_states)
        normed, _, _ = add_and_norm(self.norm, *inputs)
        return BaseModelOutputWithPast(last_hidden_state=normed, **cache_argument(cache))

    def layers_here(self) -> dict[int, Any]:
        """Return the layers of this pipeline stage by index.

        A serving engine replaces each layer of another stage by an `nn.Identity`.
        """
        return {index: layer for index, layer in enumerate(self.layers) if not isinstance(layer, nn.Identity)}

    def _may_carry_residual(self, layers: Any, kwargs: dict[str, Any]) -> bool:
        """True if a layer may leave its last residual addition to the next norm (`carry_residual` of `DecoderLayer`).

        `config.carry_residual` must be set, and nothing may read the hidden states between two layers: no recording of
        hidden states, no hook on a layer, no pipeline stage.

        Args:
            layers: the layers that the call runs.
            kwargs: further arguments of `forward`.
        """
        recorded = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        if not self.config.carry_residual or recorded or len(self.layers_here()) < len(self.layers):
            return False
        return not any(layer.has_output_hooks() for layer in layers)


class DecoderForCausalLM(DecoderPreTrainedModel, CapturedGeneration, GenerationMixin):
    """A `DecoderModel` and a language-model head. Subclasses set `model_class`, the class of the `DecoderModel`.

    Defining a subclass sets it as an attribute of `transformers`, see `offer_to_transformers`.
    """

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
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, K, vocab_size], the cache, and with `labels` the next-token cross-entropy.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache: as for
                `DecoderModel.forward`, which raises the same errors.
            labels: int64 [B, S], the ids themselves: the loss shifts them; -100 is ignored.
            logits_to_keep: 0 for all positions (K = S), which `labels` need; n for the last n; or an int64 tensor [K]
                of indices.
            kwargs: passed to the model and to the loss (`num_items_in_batch`).
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
        # slice(-0, None) selects all positions.
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = linear(outputs.last_hidden_state[:, positions], self.lm_head)
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
