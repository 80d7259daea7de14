"""One block of the Wan transformer, and its head. Letters of the shapes as in `attention.py`; T is 1 or F.

The timestep modulates each frame on its own if there is one timestep for each (T = F), all tokens alike otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_efficient.modeling.monarch_wan.attention import MonarchWanCrossAttention, MonarchWanSelfAttention
from hf_efficient.modeling.monarch_wan.cache import WanCacheLayer
from hf_efficient.modeling.monarch_wan.configuration_monarch_wan import MonarchWanConfig
from hf_efficient.modeling.monarch_wan.norms import MonarchWanLayerNorm


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``normed * (1 + scale) + shift``, float32 [B, N, hidden_size]; shift and scale float32 [B, T, hidden_size]."""
    return torch.addcmul(shift[:, :, None], _by_frame(normed, scale), 1 + scale[:, :, None]).flatten(1, 2)


def add_gated(hidden_states: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """``hidden_states + update * gate`` in float32, rounded to the dtype of `hidden_states`, [B, N, hidden_size].

    Args:
        hidden_states, update: [B, N, hidden_size].
        gate: float32 [B, T, hidden_size].
    """
    total = torch.addcmul(_by_frame(hidden_states, gate), _by_frame(update, gate), gate[:, :, None])
    return total.flatten(1, 2).to(hidden_states.dtype)


def _by_frame(x: Tensor, modulation: Tensor) -> Tensor:
    """[B, N, hidden_size] -> [B, T, N / T, hidden_size], for a modulation [B, T, hidden_size]."""
    return x.unflatten(1, (modulation.shape[1], -1))


class MonarchWanBlock(GradientCheckpointingLayer):
    """Self-attention, cross-attention to the text, and feed-forward; the first and the last modulated by the timestep.

    ``x += g1 * self_attn(LN(x) * (1 + s1) + b1); x += cross_attn(LN_affine(x), text);
    x += g2 * ffn(LN(x) * (1 + s2) + b2)``, where (b1, s1, g1, b2, s2, g2) = `modulation` + the timestep's projection.
    Norms, modulation and gates are in float32.
    """

    def __init__(self, config: MonarchWanConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = MonarchWanLayerNorm(width, config.eps, elementwise_affine=False)
        self.self_attn = MonarchWanSelfAttention(config, layer_idx)
        # The names are those of the original checkpoint, where norm3 belongs to the cross-attention.
        self.norm3 = MonarchWanLayerNorm(width, config.eps)
        self.cross_attn = MonarchWanCrossAttention(config)
        self.norm2 = MonarchWanLayerNorm(width, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(width, config.intermediate_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.intermediate_size, width),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, width))

    def forward(
        self,
        hidden_states: Tensor,
        timestep_states: Tensor,
        text: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        grid: tuple[int, int, int],
        layer_cache: WanCacheLayer | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
        text_states: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the hidden states [B, N, hidden_size], and the keys and values of the self-attention.

        Args:
            hidden_states: [B, N, hidden_size].
            timestep_states: projection of the timestep, float32 [B, T, 6, hidden_size].
            text: embedded text [B, L, hidden_size]; None with `text_states`.
            rotary, grid, layer_cache, prefix: see `MonarchWanSelfAttention.forward`.
            text_states: see `MonarchWanCrossAttention.forward`.

        Raises:
            HFEError: the Monarch tiles do not fit the grid.
        """
        dtype = hidden_states.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + timestep_states).unbind(2)
        attended, key, value = self.self_attn(
            modulate(self.norm1(hidden_states), shift1, scale1).to(dtype), rotary, grid, layer_cache, prefix
        )
        hidden_states = add_gated(hidden_states, attended, gate1)
        crossed = self.cross_attn(self.norm3(hidden_states).to(dtype), text, layer_cache, text_states)
        hidden_states = hidden_states + crossed
        update = self.ffn(modulate(self.norm2(hidden_states), shift2, scale2).to(dtype))
        return add_gated(hidden_states, update, gate2), key, value


class MonarchWanHead(nn.Module):
    """Modulated norm and projection of each token to its patch of the flow."""

    def __init__(self, config: MonarchWanConfig) -> None:
        super().__init__()
        _, height, width = config.patch_size
        self.norm = MonarchWanLayerNorm(config.hidden_size, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.hidden_size, config.out_channels * height * width)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.hidden_size))

    def forward(self, hidden_states: Tensor, timestep_embedding: Tensor) -> Tensor:
        """Return the patches [B, N, height * width * out_channels] of a patch, the channel fastest.

        Args:
            hidden_states: [B, N, hidden_size].
            timestep_embedding: float32 [B, T, hidden_size].
        """
        shift, scale = (self.modulation.float() + timestep_embedding[:, :, None]).unbind(2)
        return self.head(modulate(self.norm(hidden_states), shift, scale).to(hidden_states.dtype))


__all__ = ["MonarchWanBlock", "MonarchWanHead"]
