"""The decoder under a topology: branches of one text that do not see each other, each at positions of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hf_efficient.environment import check_data
from hf_efficient.errors import HFEError, TopologyError
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
    check_is_topology,
    dense_mask,
    flex_mask,
)
from hf_efficient.modeling.topology.configuration_topology import TopologyConfig
from hf_efficient.modeling.topology.generation.generation_topology import ParallelGeneration


class TopologyPreTrainedModel(DecoderPreTrainedModel):
    config: TopologyConfig
    config_class = TopologyConfig  # transformers reads annotations unevaluated, so it is named here too

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """As in transformers, with our own attention where nobody asks for another."""
        unasked = requested_attention is None and self.config.topology is not None
        if unasked or requested_attention == "hfe_topology":  # an exported copy has it under a name of its own
            requested_attention = TOPOLOGY_ATTENTION
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


class TopologyModel(TopologyPreTrainedModel, DecoderModel):
    """`DecoderModel` whose tokens see what a topology says."""

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
        """As `DecoderModel`; `segment_ids` and `segment_visibility`, or `topology`, as for `TopologyForCausalLM`."""
        cache = one_cache(past_key_values, cache, kwargs)
        given = _as_topology(segment_ids, segment_visibility, topology)
        if given is not None:
            tokens = input_ids if input_ids is not None else inputs_embeds
            given = self._check_topology(given, tokens, attention_mask, position_ids)
            if kwargs.get("output_attentions") and self.config._attn_implementation == TOPOLOGY_ATTENTION:
                raise HFEError(
                    "the attention of a topology gives no weights, and output_attentions asks for them",
                    "load the model with attn_implementation='eager'",
                )
            columns = None
            if isinstance(given, TopologyQueries) and cache is not None:
                columns = cache.get_mask_sizes(given.columns.shape[1], 0)[0]
            # A mapping is taken as it is: nobody may read the jumps in the positions as packed sequences.
            mask, kwargs["topology"] = self._mask(given, columns)
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
        """Refuse a topology that does not belong to the call; the topology, less what a padding mask hides."""
        if position_ids is None:
            raise TopologyError("a topology was given without position_ids", "pass those of the same Topology")
        shape = tuple(tokens.shape[:2]) if tokens is not None else None
        of = topology.segment_ids if isinstance(topology, TopologyMask) else topology.columns
        if shape is not None and (of.ndim != 2 or of.shape[1] != shape[1] or of.shape[0] not in (1, shape[0])):
            raise TopologyError(
                f"the topology is of shape {list(of.shape)} and the tokens are of shape {list(shape)}",
                "make it of the same tokens, with the same padding",
            )
        if attention_mask is not None:
            is_padding = getattr(attention_mask, "ndim", 0) == 2 and attention_mask.shape == shape
            if not isinstance(topology, TopologyMask) or not is_padding:
                raise TopologyError(
                    "an attention mask was given beside a topology, which says itself who sees whom",
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
        """On the CPU always, elsewhere with HFE_CHECK=1: every segment has a bitmap, and positions are the model's."""
        if torch.compiler.is_compiling() or position_ids.is_meta or position_ids.numel() == 0:
            return
        if position_ids.device.type != "cpu" and not check_data():
            return
        if (
            isinstance(topology, TopologyMask)
            and int(topology.segment_ids.max()) >= topology.segment_visibility.shape[1]
        ):
            raise TopologyError(
                f"segment_ids names segment {int(topology.segment_ids.max())}, and segment_visibility has "
                f"{topology.segment_visibility.shape[1]}",
                "give both as Topology.stack makes them",
            )
        longest = int(position_ids.max())
        if longest >= self.config.max_position_embeddings:
            get_logger().warning(
                "position %d is beyond max_position_embeddings=%d", longest, self.config.max_position_embeddings
            )

    def _mask(self, topology: TopologyMask | TopologyQueries, columns: int | None) -> tuple[Any, Any]:
        """What the attention implementation takes as its mask, and as its topology; once for all layers."""
        implementation = self.config._attn_implementation
        if implementation == TOPOLOGY_ATTENTION:
            return None, topology.with_blocks() if isinstance(topology, TopologyMask) else topology
        if implementation in ("sdpa", DECODE_ATTENTION):
            return dense_mask(topology, columns), None
        if implementation == "flex_attention" and isinstance(topology, TopologyMask):
            return flex_mask(topology), None
        if implementation in ("eager", "flex_attention"):
            return additive_mask(topology, self.dtype, columns), None
        raise HFEError(
            f"attn_implementation={implementation!r} cannot compute attention under a topology",
            "use 'hfe_topology', 'sdpa', 'eager' or 'flex_attention'",
        )


def _as_topology(
    segment_ids: Tensor | None, segment_visibility: Tensor | None, topology: TopologyMask | TopologyQueries | None
) -> TopologyMask | TopologyQueries | None:
    """The one topology that a call gives, in either of two ways."""
    if (segment_ids is None) != (segment_visibility is None) or (segment_ids is not None and topology is not None):
        raise TopologyError(
            "a call gives its topology as segment_ids and segment_visibility, both of them, or as topology",
            "pass what the collator or Topology.stack gives, or a TopologyMask",
        )
    if segment_ids is None or segment_visibility is None:
        if topology is not None:
            check_is_topology(topology)
        return topology
    return TopologyMask(segment_ids, segment_visibility)


class TopologyForCausalLM(TopologyPreTrainedModel, ParallelGeneration, DecoderForCausalLM, GenerationMixin):
    """`TopologyModel` and a language-model head."""

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
        """Logits and loss as of `DecoderForCausalLM`; without a topology the text is an ordinary one.

        Args:
            position_ids: int64 [B, S], those of the topology; needed with one.
            segment_ids: int32 [B, S], segment of each token, -1 at padding.
            segment_visibility: int64 [B, N, W], bitmap of the segments that each segment sees.
            topology: the same as a `TopologyMask`; or, for tokens that follow a cache, `TopologyQueries`.
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
