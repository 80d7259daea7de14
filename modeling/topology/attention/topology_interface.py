"""The attention implementation ``hfe_topology``: attention under a topology, and plain causal attention without one.

Registered with transformers, so any stock model with full attention and rotary positions takes it:

    model.set_attn_implementation("hfe_topology")
    model(input_ids, position_ids=position_ids, topology=topology_mask)

Without ``topology=`` it is the implementation ``hfe_decode``, masks and padding included. With it the attention mask
that the model made is not read, for the topology says where padding is. (A stock model takes the jumps in
``position_ids`` for packed sequences and makes a mask of every pair in vain; an ``attention_mask`` of ones stops it.)
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
from hf_efficient.modeling.topology.attention.topology_mask import TopologyMask, TopologyQueries, check_is_topology

# An exported copy registers under a name of its own, so that two versions never replace each other.
TOPOLOGY_ATTENTION = "hfe_topology" if NS == "hf_efficient" else f"{NS}_topology"
# What a model may ask of its attention that a topology does not go with.
_UNKNOWN = ("softcap", "s_aux", "sliding_window")


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
    """Attention of the implementation ``hfe_topology``: query [B, Hq, Q, D] -> [B, Q, Hq, D], no weights.

    Args:
        topology: `TopologyMask`, for keys and values [B, Hkv, S, D] of the same tokens; `TopologyQueries`, for the
            columns of a cache [B, Hkv, C, D], the queries' own included; None, for plain causal attention.

    Raises:
        HFEError: the topology is of other tokens, or the model wants dropout, a window or a cap on scores with it.
    """
    if topology is None:
        return decode_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    check_is_topology(topology)
    for name in _UNKNOWN:
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
        # As PyTorch's attention does: rotary embeddings leave queries and keys in float32, values are half.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if isinstance(topology, TopologyMask):
        tokens = topology.segment_ids.shape[1]
        if not tokens == query.shape[2] == key.shape[2]:
            raise HFEError(
                f"the topology is of {tokens} tokens, with {query.shape[2]} queries and {key.shape[2]} keys",
                "give whole texts with a TopologyMask, and tokens that follow a cache with TopologyQueries",
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
            topology.columns[:, start : start + MAX_QUERIES],
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
