"""The decoder with topology attention: tokens of parallel branches may not attend to each other, and share positions.

A topology describes this by segments, runs of consecutive tokens between two points where the text forks into branches
or joins them: a token may attend to the tokens before it in its own segment and to all tokens of the segment's
ancestors. `TopologyMask` describes full sequences, `TopologyQueries` tokens that follow a key-value cache. B is the
batch size, S the sequence length, H the hidden size, V the vocabulary size, N the number of segments, and W that of
64-bit words in a bitmap of segments.
"""

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
        """Return the attention implementation to use, as in transformers.

        Without a requested one it is ``hfe_topology`` if the configuration has a topology.
        """
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
        """Compute the hidden states of `DecoderModel`, with attention restricted by a topology if one is given.

        Args:
            input_ids: int64 [B, S].
            attention_mask: with a `TopologyMask`, a padding mask [B, S] (0 at padding) or None; with `TopologyQueries`
                None; without a topology as for `DecoderModel`.
            position_ids: int64 [B, S], rotary positions of the topology; required with one.
            past_key_values, cache: the key-value cache; pass it under one of the two names.
            inputs_embeds: [B, S, H], in place of `input_ids`.
            use_cache: return a cache.
            segment_ids: int32 [B, S], segment of each token, -1 at padding.
            segment_visibility: int64 [B, N, W] or [1, N, W]: for each segment the bitmap of the segments that its
                tokens may attend to.
            topology: the same two as a `TopologyMask`; or, for tokens that follow a cache, `TopologyQueries`.
            **kwargs: as for `DecoderModel`.

        Returns:
            `last_hidden_state` [B, S, H] and `past_key_values`, the cache or None.

        Raises:
            TopologyError: the topology is given twice or in part, without `position_ids`, together with another
                attention mask, or for another number of tokens; or, on the CPU, a segment has no bitmap.
            UsageError: `topology` has another type.
            HFEError: the attention implementation does not support a topology, or `output_attentions` is set with
                ``hfe_topology``, which returns no attention weights; or a tensor of the topology has a wrong dtype,
                shape or device; or two different caches are passed. Further errors as for `DecoderModel`.
        """
        cache = one_cache(past_key_values, cache, kwargs)
        given = _as_topology(segment_ids, segment_visibility, topology)
        if given is not None:
            tokens = input_ids if input_ids is not None else inputs_embeds
            given = self._check_topology(given, tokens, attention_mask, position_ids)
            if kwargs.get("output_attentions") and self.config._attn_implementation == TOPOLOGY_ATTENTION:
                raise HFEError(
                    "the attention implementation hfe_topology returns no weights, but output_attentions is set",
                    "load the model with attn_implementation='eager'",
                )
            num_slots = None
            if isinstance(given, TopologyQueries) and cache is not None:
                num_slots = cache.get_mask_sizes(given.cache_position.shape[1], 0)[0]
            # DecoderModel uses a mapping of masks unchanged; otherwise it interprets jumps in positions as packing.
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
        """Check that a topology fits the other arguments of `forward`; return it with padding applied.

        Args:
            topology: the topology of the call.
            tokens: `input_ids` [B, S] or `inputs_embeds` [B, S, H].
            attention_mask: None, or a padding mask [B, S]; tokens where it is 0 get segment -1 in the result, a new
                mask without block lists (`TopologyMask.blocks`).
            position_ids: int64 [B, S].

        Raises:
            TopologyError: `position_ids` is missing, the shapes differ, or `attention_mask` is no padding mask; or, as
                for `_check_values`, a segment has no bitmap.
            HFEError: a tensor of the topology has a wrong dtype, shape or device.
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
                    "an attention mask was given with a topology, which already says what each token may attend to",
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
        """Raise `TopologyError` if a segment has no bitmap; warn of positions beyond `max_position_embeddings`.

        Reading tensor values synchronises with the device, so this runs on the CPU, and on other devices only with
        HFE_CHECK=1. It does nothing while the model is compiled or on `meta`.
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
        """Return the arguments `attention_mask` and `topology` of the attention function, the same for all layers.

        Args:
            topology: the topology of the call.
            num_slots: length of the keys that attention receives from the cache; None without a cache.

        Returns:
            ``hfe_topology``: None and the topology. ``sdpa`` and ``hfe_decode``: a bool mask [B, 1, S, S or num_slots]
            and None. ``eager``: the same as an additive mask. ``flex_attention``: a `BlockMask`, for `TopologyQueries`
            an additive mask.

        Raises:
            HFEError: the attention implementation is another one.
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
    """Return the topology of a call, which is given as two tensors or as one object; None if none is given.

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
        """Compute the logits and loss of `DecoderForCausalLM`; without a topology attention is causal.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, cache, inputs_embeds, use_cache, segment_ids,
                segment_visibility, topology: as for `TopologyModel.forward`.
            labels: int64 [B, S], -100 where there is no loss. They are not checked: set -100 at the first token of each
                segment, which the loss would predict from a token that it does not continue (the collator does this).
            logits_to_keep: compute the logits of the last tokens only; 0 for all. A tensor gives the indices of the
                tokens.

        Returns:
            `logits` [B, S, V], [B, logits_to_keep, V], or [B, n, V] for a tensor of n indices; `loss`, a scalar, if
            labels are given; `past_key_values`, the cache or None.

        Raises:
            TopologyError, UsageError, HFEError: as for `TopologyModel.forward`.
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
