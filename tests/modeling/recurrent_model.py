"""A small decoder with recurrent state beside its keys and values: what a state-space layer asks of generation.

Every layer's mixer adds a gated recurrence to its attention: ``h_t = a_t * h_{t-1} + (1 - a_t) * x_t`` for each
channel, with the gate ``a_t = sigmoid(gate(x_t))``. Its cache keeps h in fp32 and overwrites it at each token, so it
cannot be truncated. Padding tokens enter the state like any others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.modeling.decoder.attention import DecoderAttention
from hf_efficient.modeling.decoder.cache_compat import one_cache
from hf_efficient.modeling.decoder.cache_contract import RecurrentCache
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig
from hf_efficient.modeling.decoder.decode_cache import DecodeCache
from hf_efficient.modeling.decoder.modeling_decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel


class StateCache(RecurrentCache, DecodeCache):
    """A `DecodeCache` with a recurrent state of each layer, [layers, B, hidden_size] in fp32."""

    def __init__(self, config: Any, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, batch_size, capacity, dtype, device)
        with torch.inference_mode(False):
            shape = (config.num_hidden_layers, batch_size, config.hidden_size)
            self.states = torch.zeros(shape, dtype=torch.float32, device=device)

    def memory(self) -> list[Tensor]:
        return [self.states, *super().memory()]

    def state_tensors(self) -> list[Tensor]:
        return [self.states, *super().state_tensors()]

    def select_sequences(self, indices: Tensor) -> None:
        DecodeCache.batch_select_indices(self, indices)
        self.states = self.states[:, indices]

    def reset(self) -> None:
        super().reset()
        self.states.zero_()


class RecurrentAttention(DecoderAttention):
    """`DecoderAttention` plus a gated recurrence over the same input."""

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[B, S, hidden_size] -> [B, S, hidden_size], and the attention weights."""
        cache = one_cache(kwargs.get("past_key_values"), kwargs.get("cache"), kwargs)
        output, weights = super().forward(hidden_states, **kwargs)
        inputs, gates = hidden_states.float(), torch.sigmoid(self.gate(hidden_states)).float()
        state = torch.zeros_like(inputs[:, 0]) if cache is None else cache.states[self.layer_idx].clone()
        history = []
        for t in range(inputs.shape[1]):
            state = gates[:, t] * state + (1 - gates[:, t]) * inputs[:, t]
            history.append(state)
        if cache is not None:
            cache.states[self.layer_idx].copy_(state)
        return output + torch.stack(history, dim=1).to(output.dtype), weights


class RecurrentPreTrainedModel(DecoderPreTrainedModel):
    config: DecoderConfig
    config_class = DecoderConfig
    cache_class = StateCache


class RecurrentModel(RecurrentPreTrainedModel, DecoderModel):
    def build_mixer(self, layer_idx: int) -> nn.Module:
        return RecurrentAttention(self.config, layer_idx)


class RecurrentForCausalLM(RecurrentPreTrainedModel, DecoderForCausalLM):
    model_class = RecurrentModel
