"""The decoder with topology attention: parallel branches of a text do not see each other, and share positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hf_efficient.environment import check_data
from hf_efficient.errors import HFEError
from hf_efficient.kernels.topology_blocks.api import check_segments
from hf_efficient.logging import get_logger
from hf_efficient.modeling.decoder.cache_compat import cache_argument, one_cache
from hf_efficient.modeling.decoder.decode_interface import DECODE_ATTENTION
from hf_efficient.modeling.decoder.modeling_decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel
from hf_efficient.modeling.topology.attention.topology_interface import TOPOLOGY_ATTENTION
from hf_efficient.modeling.topology.attention.topology_mask import (
    TopologyMask,
    TopologyQueries,
    additive_mask,
    check_topology_type,
    dense_mask,
    flex_mask,
)
from hf_efficient.modeling.topology.configuration_topology import TopologyConfig
from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.generation.generation_topology import ParallelGeneration


class TopologyPreTrainedModel(DecoderPreTrainedModel):
    """Base class: configuration class and default attention implementation."""

    config: TopologyConfig
    config_class = TopologyConfig  # with postponed annotations transformers cannot infer it from the line above

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """As in transformers; the default is ``hfe_topology`` where the configuration has a topology."""
        is_default = requested_attention is None and self.config.topology is not None
        if is_default or requested_attention == "hfe_topology":  # exported code registers it under another name
            requested_attention = TOPOLOGY_ATTENTION
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


class TopologyModel(TopologyPreTrainedModel, DecoderModel):
    """`DecoderModel` with topology attention."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: Tensor | None = None,
        segment_visibility: Tensor | None = None,
        topology: TopologyMask | TopologyQueries | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of `DecoderModel`, under a topology where one is given.

        Args:
            input_ids: int64 [B, S].
            attention_mask: padding mask [B, S], 0 at padding; not with `TopologyQueries`, nor in another form.
            position_ids: int64 [B, S], positions of the topology; required with one.
            past_key_values, cache: the cache, under either of its two names.
            inputs_embeds: [B, S, H], in place of `input_ids`.
            use_cache: return a cache.
            segment_ids: int32 [B, S], segment of each token, -1 at padding.
            segment_visibility: int64 [B, N, W], bitmap of the segments that each segment sees.
            topology: the same two as a `TopologyMask`; or, for tokens that follow a cache, `TopologyQueries`.

        Returns:
            `last_hidden_state` [B, S, H] and the cache.

        Raises:
            TopologyError: the topology is given twice or in part, without `position_ids`, beside another attention
                mask, or for another number of tokens.
            HFEError: the attention implementation does not support a topology, or gives no attention weights and
                `output_attentions` is set.
        """
        cache = one_cache(past_key_values, cache, kwargs)
        given = _as_topology(segment_ids, segment_visibility, topology)
        if given is not None:
            tokens = input_ids if input_ids is not None else inputs_embeds
            given = self._check_topology(given, tokens, attention_mask, position_ids)
            if kwargs.get("output_attentions") and self.config._attn_implementation == TOPOLOGY_ATTENTION:
                raise HFEError(
                    "the attention implementation hfe_topology gives no weights, and output_attentions is set",
                    "load the model with attn_implementation='eager'",
                )
            num_slots = None
            if isinstance(given, TopologyQueries) and cache is not None:
                num_slots = cache.get_mask_sizes(given.cache_position.shape[1], 0)[0]
            # DecoderModel uses a mapping of masks as it is; without one it reads jumps in positions as packing.
            mask, kwargs["topology"] = self._mask(given, num_slots)
            attention_mask = dict.fromkeys(self.config.layer_types, mask)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **cache_argument(cache),
            **kwargs,
        )

    def _check_topology(
        self,
        topology: TopologyMask | TopologyQueries,
        tokens: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
    ) -> TopologyMask | TopologyQueries:
        """The topology without the tokens that a padding mask hides; raises where it does not fit the call.

        Args:
            tokens: `input_ids` [B, S] or `inputs_embeds` [B, S, H].
        """
        if position_ids is None:
            raise TopologyError("a topology was given without position_ids", "pass those of the same Topology")
        shape = tuple(tokens.shape[:2]) if tokens is not None else None
        per_token = topology.segment_ids if isinstance(topology, TopologyMask) else topology.cache_position
        if shape is not None and (
            per_token.ndim != 2 or per_token.shape[1] != shape[1] or per_token.shape[0] not in (1, shape[0])
        ):
            raise TopologyError(
                f"the topology has shape {list(per_token.shape)} and the tokens have shape {list(shape)}",
                "make it from the same tokens, with the same padding",
            )
        if attention_mask is not None:
            is_padding = getattr(attention_mask, "ndim", 0) == 2 and attention_mask.shape == shape
            if not isinstance(topology, TopologyMask) or not is_padding:
                raise TopologyError(
                    "an attention mask was given with a topology, which already determines what each token sees",
                    "leave attention_mask out, or pass the padding mask [B, S]",
                )
            hidden = attention_mask.to(topology.segment_ids.device) == 0
            segment_ids = topology.segment_ids.masked_fill(hidden, -1)
            topology = TopologyMask(segment_ids, topology.segment_visibility)
        if isinstance(topology, TopologyMask):
            check_segments("topology", topology.segment_ids, topology.segment_visibility)
        self._check_values(topology, position_ids)
        return topology

    def _check_values(self, topology: TopologyMask | TopologyQueries, position_ids: Tensor) -> None:
        """Check that every segment has a bitmap; warn of positions beyond `max_position_embeddings`.

        Reading tensors waits for the device, so this runs on the CPU, and elsewhere only with HFE_CHECK=1.
        """
        if torch.compiler.is_compiling() or position_ids.is_meta or position_ids.numel() == 0:
            return
        if position_ids.device.type != "cpu" and not check_data():
            return
        if (
            isinstance(topology, TopologyMask)
            and int(topology.segment_ids.max()) >= topology.segment_visibility.shape[1]
        ):
            raise TopologyError(
                f"segment_ids contains segment {int(topology.segment_ids.max())}, and segment_visibility has "
                f"{topology.segment_visibility.shape[1]} segments",
                "pass both as Topology.stack returns them",
            )
        longest = int(position_ids.max())
        if longest >= self.config.max_position_embeddings:
            get_logger().warning(
                "position %d is beyond max_position_embeddings=%d", longest, self.config.max_position_embeddings
            )

    def _mask(self, topology: TopologyMask | TopologyQueries, num_slots: int | None) -> tuple[Any, Any]:
        """The attention implementation's arguments `attention_mask` and `topology`, computed once for all layers.

        Args:
            num_slots: length of the keys that the cache gives; None without a cache.
        """
        implementation = self.config._attn_implementation
        if implementation == TOPOLOGY_ATTENTION:
            return None, topology.with_blocks() if isinstance(topology, TopologyMask) else topology
        if implementation in ("sdpa", DECODE_ATTENTION):
            return dense_mask(topology, num_slots), None
        if implementation == "flex_attention" and isinstance(topology, TopologyMask):
            return flex_mask(topology), None
        if implementation in ("eager", "flex_attention"):
            return additive_mask(topology, self.dtype, num_slots), None
        raise HFEError(
            f"attn_implementation={implementation!r} cannot compute attention under a topology",
            "use 'hfe_topology', 'sdpa', 'eager' or 'flex_attention'",
        )


def _as_topology(
    segment_ids: Tensor | None, segment_visibility: Tensor | None, topology: TopologyMask | TopologyQueries | None
) -> TopologyMask | TopologyQueries | None:
    """The topology of a call, given as two tensors or as one object; None without one.

    Raises:
        TopologyError: one of the two tensors is missing, or the object is given too.
        UsageError: `topology` has another type.
    """
    if (segment_ids is None) != (segment_visibility is None) or (segment_ids is not None and topology is not None):
        raise TopologyError(
            "a topology is given either as both segment_ids and segment_visibility, or as topology",
            "pass what the collator or Topology.stack returns, or a TopologyMask",
        )
    if segment_ids is None or segment_visibility is None:
        if topology is not None:
            check_topology_type(topology)
        return topology
    return TopologyMask(segment_ids, segment_visibility)


class TopologyForCausalLM(TopologyPreTrainedModel, ParallelGeneration, DecoderForCausalLM, GenerationMixin):
    """`TopologyModel` with a language-modeling head; `generate` can decode branches in parallel."""

    model_class = TopologyModel
    captured_attention = frozenset({DECODE_ATTENTION, TOPOLOGY_ATTENTION})

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
        segment_ids: Tensor | None = None,
        segment_visibility: Tensor | None = None,
        topology: TopologyMask | TopologyQueries | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits and loss of `DecoderForCausalLM`; without a topology attention is causal.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, cache, inputs_embeds, use_cache, segment_ids,
                segment_visibility, topology: as for `TopologyModel.forward`.
            labels: int64 [B, S], -100 where there is no loss; the first tokens of segments must have none.
            logits_to_keep: compute logits of the last tokens only; 0 for all.

        Returns:
            `logits` [B, S, V], or [B, logits_to_keep, V]; `loss` where labels are given; and the cache.

        Raises:
            TopologyError, HFEError: as for `TopologyModel.forward`.
        """
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            segment_ids=segment_ids,
            segment_visibility=segment_visibility,
            topology=topology,
            cache=cache,
            **kwargs,
        )


__all__ = ["TopologyConfig", "TopologyForCausalLM", "TopologyModel", "TopologyPreTrainedModel"]
