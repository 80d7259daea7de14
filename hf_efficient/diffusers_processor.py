"""Monarch self-attention in a Wan pipeline of diffusers, without converting its weights.

The extra `hf_efficient[diffusers]` installs diffusers. Letters of the shapes: B videos (2 with guidance), N tokens of
the F x H x W grid in the order (frame, row, column), D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hf_efficient.errors import HFEError
from hf_efficient.kernels.monarch_attention.api import monarch_attention
from hf_efficient.modeling.monarch.monarch_spec import MonarchGridSpec
from hf_efficient.modeling.monarch_wan.attention import grid_layout
from hf_efficient.modeling.monarch_wan.rotary import apply_rotary

# Components of a pipeline that may be Wan transformers; Wan 2.2 has two.
_COMPONENTS = ("transformer", "transformer_2")
# Attribute of a transformer that holds what `disable_monarch_wan` restores.
_STATE = "_hfe_monarch"


class TokenGrid:
    """The grid of video tokens of a transformer's current call, which its attention modules are not passed.

    Attributes:
        size: (F, H, W); None before the first call.
    """

    def __init__(self) -> None:
        self.size: tuple[int, int, int] | None = None

    def read(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the transformer: set `size` from its latents [B, channels, frames, height, width]."""
        latents: Tensor = args[0] if args else kwargs["hidden_states"]
        frames, height, width = (
            size // each for size, each in zip(latents.shape[2:], transformer.config.patch_size, strict=True)
        )
        self.size = frames, height, width


class MonarchWanAttnProcessor:
    """Attention processor for the self-attention (`attn1`) of diffusers' `WanTransformer3DModel`.

    Projections, norms and rotary embedding are those of the module; Monarch attention takes the place of softmax
    attention. All frames attend to each other. `enable_monarch_wan` makes and sets one for every block.

    Args:
        spec: settings of Monarch attention.
        grid: the grid of the current call, shared by the processors of a transformer.
    """

    # diffusers sets them on every processor that has them: the backend of softmax attention, which is not used here,
    # and the split of a sequence over devices.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, spec: MonarchGridSpec, grid: TokenGrid) -> None:
        self.spec = spec
        self.grid = grid

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the attention output, [B, N, heads * D].

        Args:
            attn: the `WanAttention`, also with fused projections.
            hidden_states: [B, N, heads * D].
            encoder_hidden_states, attention_mask: must be None.
            rotary_emb: cosines and sines [1, N, 1, D] of the rotary embedding, each value twice in a row.

        Raises:
            HFEError: a text or a mask is passed, the sequence is split over devices, the transformer was not called
                through its hook, or the tiles do not fit the grid.
        """
        if encoder_hidden_states is not None or attention_mask is not None or self._parallel_config is not None:
            raise HFEError(
                "Monarch attention is self-attention over whole videos: it has no text, mask or context parallelism",
                "set the processor with enable_monarch_wan, on one device per video",
            )
        if self.grid.size is None:
            raise HFEError(
                "the processor does not know the grid of the video", "set it with enable_monarch_wan, which adds a hook"
            )
        if getattr(attn, "fused_projections", False):
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (each.unflatten(-1, (attn.heads, -1)) for each in (query, key, value))
        if rotary_emb is not None:
            cos, sin = rotary_emb
            tables = cos[0, :, 0, 0::2], sin[0, :, 0, 1::2]
            query, key = apply_rotary(query, tables), apply_rotary(key, tables)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        layout = grid_layout(self.spec, self.grid.size)
        attended = monarch_attention(query, key, value, layout, num_iters=self.spec.num_iters)
        project, dropout = attn.to_out
        return dropout(project(attended.transpose(1, 2).flatten(2)))


@dataclass
class _Enabled:
    """What `disable_monarch_wan` needs: the hook's handle, and the replaced processor of each block, by its index."""

    hook: RemovableHandle
    processors: dict[int, Any]


def enable_monarch_wan(
    pipeline_or_transformer: Any,
    *,
    h_reduce: int = 2,
    w_reduce: int = 1,
    f_tied: int = 1,
    row_axes: str = "fh",
    num_iters: int = 1,
    layers: list[int] | None = None,
) -> None:
    """Let the self-attention of a Wan transformer of diffusers be Monarch attention; `disable_monarch_wan` restores it.

    Cross-attention to the text stays as it is. A second call replaces the settings of the first. The default settings
    are for weights that were not trained with Monarch attention; `h_reduce=1` is faster, for weights that were.

    Args:
        pipeline_or_transformer: a pipeline with Wan transformers, such as `WanPipeline`, or a `WanTransformer3DModel`,
            compiled or not.
        h_reduce, w_reduce: parts into which the height and the width of the token grid are cut; they divide it. The
            grid of 832 x 480 pixels and 81 frames is 21 x 30 x 52.
        f_tied: frames that share a tile; divides the number of latent frames.
        row_axes: axes of a tile's rows: "fh", "f", "h", "w", "fw" or "hw".
        num_iters: steps of the approximation.
        layers: indices of the blocks with Monarch attention; None is all.

    Raises:
        HFEError: diffusers is not installed, the argument has no Wan transformer, or a setting is wrong. Settings that
            do not fit the size of a video raise when it is generated.
    """
    sizes = {"f_tied": f_tied, "h_reduce": h_reduce, "w_reduce": w_reduce}
    spec = MonarchGridSpec.from_dict({**sizes, "row_axes": row_axes, "num_iters": num_iters, "layers": layers})
    transformers = list(_transformers(pipeline_or_transformer))
    for transformer in transformers:
        spec.check_layers(len(transformer.blocks))
    disable_monarch_wan(pipeline_or_transformer)
    for transformer in transformers:
        grid, replaced = TokenGrid(), {}
        for index, block in enumerate(transformer.blocks):
            if spec.runs_in(index):
                replaced[index] = block.attn1.processor
                block.attn1.set_processor(MonarchWanAttnProcessor(spec, grid))
        hook = transformer.register_forward_pre_hook(grid.read, with_kwargs=True)
        setattr(transformer, _STATE, _Enabled(hook, replaced))


def disable_monarch_wan(pipeline_or_transformer: Any) -> None:
    """Restore the attention processors that `enable_monarch_wan` replaced; nothing if it was not called.

    Args and errors as for `enable_monarch_wan`.
    """
    for transformer in _transformers(pipeline_or_transformer):
        enabled: _Enabled | None = transformer.__dict__.pop(_STATE, None)
        if enabled is not None:
            enabled.hook.remove()
            for index, processor in enabled.processors.items():
                transformer.blocks[index].attn1.set_processor(processor)


def _transformers(pipeline_or_transformer: Any) -> Iterator[Any]:
    """The Wan transformers of a pipeline, or the argument itself; `HFEError` if there is none."""
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise HFEError(
            f"diffusers with WanTransformer3DModel cannot be imported ({error})",
            "pip install 'hf-efficient[diffusers]'",
        ) from error
    parts = [pipeline_or_transformer, *(getattr(pipeline_or_transformer, name, None) for name in _COMPONENTS)]
    # `torch.compile` wraps a module, and passes calls on to it, hooks included.
    found = [part for each in parts if isinstance(part := getattr(each, "_orig_mod", each), WanTransformer3DModel)]
    if not found:
        raise HFEError(
            f"{type(pipeline_or_transformer).__name__} is no WanTransformer3DModel of diffusers and has none as "
            f"{' or '.join(_COMPONENTS)}",
            "pass a WanPipeline or its transformer; in a converted checkpoint Monarch attention is a setting already",
        )
    return iter(found)
