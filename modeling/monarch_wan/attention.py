"""Self-attention over video tokens, softmax or Monarch, and cross-attention to the text of the Wan transformer.

Letters of the shapes: B videos, F frames of H x W tokens, N = F * H * W tokens of the call in the order (frame, row,
column), M cached tokens before them, L text tokens, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_efficient.errors import HFEError
from hf_efficient.kernels.monarch_attention.api import monarch_attention
from hf_efficient.kernels.monarch_attention.layout import GridLayout
from hf_efficient.modeling.monarch.monarch_spec import MonarchGridSpec
from hf_efficient.modeling.monarch_wan.cache import WanCacheLayer
from hf_efficient.modeling.monarch_wan.configuration_monarch_wan import MonarchWanConfig
from hf_efficient.modeling.monarch_wan.norms import MonarchWanRMSNorm
from hf_efficient.modeling.monarch_wan.rotary import apply_rotary


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in plain PyTorch, transformers' implementation `eager`; without a mask or dropout.

    Args:
        module, attention_mask, dropout, kwargs: not used; every implementation of transformers gets them.
        query, key, value: [B, heads, N or keys, D].
        scaling: factor of the scores.

    Returns:
        Output [B, N, heads, D] and weights [B, heads, N, keys], in the dtype of `query`; the softmax is in float32.
    """
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class _Attention(nn.Module):
    """What both attentions share: projections, RMSNorm of q and k over all heads together, softmax attention."""

    is_causal = False  # read by transformers' attention implementations
    num_key_value_groups = 1

    def __init__(self, config: MonarchWanConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        width = config.hidden_size
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        self.norm_q = MonarchWanRMSNorm(width, config.eps)
        self.norm_k = MonarchWanRMSNorm(width, config.eps)

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, hidden_size] -> [B, N, heads, D]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def _softmax(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend to all keys, with the implementation of `config._attn_implementation`.

        Args:
            query: [B, N, heads, D].
            key, value: [B, keys, heads, D].

        Returns:
            [B, N, heads, D].
        """
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return attend(self, *heads_first, attention_mask=None, dropout=0.0, scaling=self.scaling)[0]


class MonarchWanSelfAttention(_Attention):
    """Self-attention of video tokens with rotary positions.

    Without Monarch settings for this layer, or with `efficient` set to False, it is softmax attention: the same
    weights are then the teacher of the Monarch model.

    Attributes:
        spec: Monarch settings; None if this layer uses softmax attention.
        efficient: whether `spec` is used; True by default.
    """

    def __init__(self, config: MonarchWanConfig, layer_idx: int) -> None:
        super().__init__(config)
        self.layer_idx = layer_idx
        spec = config.monarch_spec
        self.spec = spec if spec is not None and spec.runs_in(layer_idx) else None
        self.efficient = True

    @property
    def active_spec(self) -> MonarchGridSpec | None:
        """Monarch settings that a call uses now; None for softmax attention."""
        return self.spec if self.efficient else None

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        grid: tuple[int, int, int],
        layer_cache: WanCacheLayer | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the attention output [B, N, hidden_size], and the keys and values of the call, [B, N, heads, D] each.

        Without `layer_cache` and `prefix`, tokens of a causal model attend to their chunk and the earlier ones, those
        of a bidirectional model to all.

        Args:
            hidden_states: [B, N, hidden_size].
            rotary: tables of `rotary_tables` for the N tokens.
            grid: (F, H, W).
            layer_cache: keys and values of the earlier chunks; those of the call, one chunk, are written to it and
                attended to there. No gradient passes.
            prefix: keys and values [B, M, heads, D] of the earlier chunks. Nothing is written; gradients reach the keys
                and values of the call.

        Raises:
            HFEError: the Monarch tiles do not fit the grid.
        """
        query = apply_rotary(self._split(self.norm_q(self.q(hidden_states))), rotary)
        key = apply_rotary(self._split(self.norm_k(self.k(hidden_states))), rotary)
        value = self._split(self.v(hidden_states))
        if layer_cache is not None:
            layer_cache.write(key, value)
            attended = self._attend(query, *layer_cache.visible(), grid)
        elif prefix is not None:
            keys, values = (torch.cat((old, new), 1) for old, new in zip(prefix, (key, value), strict=True))
            attended = self._attend(query, keys, values, grid)
        elif self.config.variant == "causal":
            attended = self._attend_causally(query, key, value, grid)
        else:
            attended = self._attend(query, key, value, grid)
        return self.o(attended.flatten(2)), key, value

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int, int], chunk: int | None = None
    ) -> Tensor:
        """Attend to all keys; or, with Monarch attention and `chunk`, to those of the own and the earlier chunks.

        Args:
            query, key, value: [B, N or keys, heads, D], whole frames.
            grid: (F, H, W); F is not read.
            chunk: frames of a chunk.

        Returns:
            [B, N, heads, D].
        """
        spec = self.active_spec
        if spec is None:
            return self._softmax(query, key, value)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        layout = grid_layout(spec, grid)
        output = monarch_attention(
            query, key, value, layout, num_iters=spec.num_iters, scale=self.scaling, causal_frames=chunk
        )
        return output.transpose(1, 2)

    def _attend_causally(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Attend to the frames of the own chunk and the earlier ones, or the window and the sink of them.

        Softmax attention runs once for each chunk, over the frames that it attends to. So it needs no mask, and every
        attention implementation works.

        Args and result as for `_attend`; N = F * H * W tokens on both sides.
        """
        frames, height, width = grid
        chunk, local, sink = self.config.num_frames_per_block, self.config.local_attn_size, self.config.sink_size
        if self.active_spec is not None and (local == -1 or frames <= local):
            return self._attend(query, key, value, grid, chunk)
        tokens = height * width
        outputs = []
        for start in range(0, frames, chunk):
            end = start + chunk
            if local == -1 or end <= local:
                keys, values = key[:, : end * tokens], value[:, : end * tokens]
            else:
                first = end - (local - sink)
                keys, values = (
                    torch.cat((x[:, : sink * tokens], x[:, first * tokens : end * tokens]), 1) for x in (key, value)
                )
            outputs.append(self._attend(query[:, start * tokens : end * tokens], keys, values, grid))
        return torch.cat(outputs, 1)


class MonarchWanCrossAttention(_Attention):
    """Softmax attention of video tokens to the text, without rotary positions."""

    def forward(
        self,
        hidden_states: Tensor,
        text: Tensor | None,
        layer_cache: WanCacheLayer | None = None,
        text_states: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the attention output [B, N, hidden_size].

        Args:
            hidden_states: [B, N, hidden_size].
            text: embedded text [B, L, hidden_size]; None with `text_states`.
            layer_cache: where keys and values of `text` are stored.
            text_states: keys and values of an earlier call, [B, L, heads, D] each.
        """
        query = self._split(self.norm_q(self.q(hidden_states)))
        if text_states is None:
            text_states = self._split(self.norm_k(self.k(text))), self._split(self.v(text))
            if layer_cache is not None:
                layer_cache.write_text(*text_states)
        return self.o(self._softmax(query, *text_states).flatten(2))


def grid_layout(spec: MonarchGridSpec, grid: tuple[int, int, int]) -> GridLayout:
    """Return the layout of Monarch attention for a grid (F, H, W) of tokens.

    Raises:
        HFEError: `h_reduce` or `w_reduce` does not divide H or W, or `f_tied` does not divide F.
    """
    sizes = dict(zip(("frames", "height", "width"), grid, strict=True))
    for name, axis in (("f_tied", "frames"), ("h_reduce", "height"), ("w_reduce", "width")):
        divisor = getattr(spec, name)
        if sizes[axis] % divisor:
            raise HFEError(
                f"monarch.{name}={divisor} must divide the {axis} of the token grid, {sizes[axis]} of {grid}",
                f"set {name} to a divisor of {sizes[axis]}, or change the size of the video",
            )
    return GridLayout(grid[1], grid[2], spec.f_tied, spec.h_reduce, spec.w_reduce, spec.row_axes)


__all__ = ["MonarchWanCrossAttention", "MonarchWanSelfAttention", "grid_layout"]
