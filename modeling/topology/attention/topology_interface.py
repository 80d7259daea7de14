"""The attention implementation ``hfe_topology``: attention under a topology, and plain causal attention without one.

A topology (`TopologyMask` or `TopologyQueries`) says by segments, runs of consecutive tokens between forks and joins of
the text, which tokens may attend to each other. The implementation is registered with transformers when this file is
imported, so any model of transformers with full attention and rotary positions supports it:

    model.set_attn_implementation("hfe_topology")
    model(input_ids, position_ids=position_ids, topology=topology_mask)

Without ``topology=`` it computes the same as the implementation ``hfe_decode``, including masks and padding. With it
the model's own attention mask is ignored, because the topology marks padding. A model of transformers interprets jumps
in ``position_ids`` as packed sequences and builds a dense mask, which is then unused; an ``attention_mask`` of ones
avoids that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hf_efficient.errors import HFEError
from hf_efficient.kernels.decode_attention.api import decode_attention
from hf_efficient.kernels.namespace import NS
from hf_efficient.kernels.topology_attention.api import topology_attention
from hf_efficient.modeling.decoder.decode_interface import MAX_QUERIES, decode_attention_forward, decode_mask
from hf_efficient.modeling.topology.attention.topology_mask import TopologyMask, TopologyQueries, check_topology_type

# Exported code registers under another name, so that it and the installed package never replace each other.
TOPOLOGY_ATTENTION = "hfe_topology" if NS == "hf_efficient" else f"{NS}_topology"
# Arguments of attention functions that are not supported together with a topology.
_UNSUPPORTED = ("softcap", "s_aux", "sliding_window")


def topology_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    topology: TopologyMask | TopologyQueries | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function ``hfe_topology``: softmax attention with grouped-query heads.

    With a topology, query, key and value are cast to the dtype of autocast if that is on, except float64.

    Args:
        module: the attention module; only its class name is used with a topology.
        query: [B, Hq, Q, D].
        key, value: for a `TopologyMask` those of the same tokens, [B, Hkv, Q, D]; for `TopologyQueries` the slots of a
            cache, which already contains the queries' own tokens, [B, Hkv, C, D].
        attention_mask: as for ``hfe_decode`` without a topology; ignored with one.
        dropout: must be 0 with a topology.
        scaling: factor of the scores; ``D ** -0.5`` by default.
        topology: `TopologyMask` or `TopologyQueries`; None for plain causal attention.
        **kwargs: arguments that transformers passes to every attention function; with a topology, `softcap`, `s_aux`
            and `sliding_window` must be None or missing, and others are ignored. Without one, this holds for
            `softcap` and `s_aux`.

    Returns:
        Output [B, Q, Hq, D], zero for queries that may attend to nothing, and None in place of the attention weights.

    Raises:
        UsageError: `topology` has another type.
        HFEError: the topology has another number of tokens, or dropout, a sliding window, attention sinks or a soft cap
            is used with it; or a tensor has a dtype, shape or device that the kernels do not support; or, without a
            topology, attention sinks or a soft cap is used.
    """
    if topology is None:
        return decode_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    check_topology_type(topology)
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise HFEError(
                f"{type(module).__name__} computes attention with {name}={kwargs[name]}, and a topology was given",
                "use a model with full attention in every layer",
            )
    if dropout:
        raise HFEError(
            f"attention dropout is {dropout} and a topology was given",
            "set attention_dropout=0, or attn_implementation='sdpa'",
        )
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        # PyTorch's attention does the same: under autocast, rotary embeddings return float32 queries and keys, while
        # the values have half precision.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if isinstance(topology, TopologyMask):
        tokens = topology.segment_ids.shape[1]
        if not tokens == query.shape[2] == key.shape[2]:
            raise HFEError(
                f"the topology has {tokens} tokens, with {query.shape[2]} queries and {key.shape[2]} keys",
                "use a TopologyMask for full sequences, and TopologyQueries for tokens that follow a cache",
            )
        output = topology_attention(
            query, key, value, topology.segment_ids, topology.segment_visibility, blocks=topology.blocks, scale=scaling
        )
        return output.transpose(1, 2), None

    parts = [
        decode_attention(
            query[:, :, start : start + MAX_QUERIES],
            key,
            value,
            topology.kv_len,
            topology.cache_position[:, start : start + MAX_QUERIES],
            kv_segment_ids=topology.kv_segment_ids,
            segment_visibility=topology.segment_visibility[:, start : start + MAX_QUERIES],
            scale=scaling,
        )
        for start in range(0, query.shape[2], MAX_QUERIES)
    ]
    output = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return output.transpose(1, 2), None


AttentionInterface.register(TOPOLOGY_ATTENTION, topology_attention_forward)
AttentionMaskInterface.register(TOPOLOGY_ATTENTION, decode_mask)
