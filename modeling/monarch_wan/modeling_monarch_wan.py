"""The Wan 2.1 text-to-video transformer, bidirectional and causal, with softmax or Monarch self-attention.

It predicts the flow ``noise - video`` of latents; the autoencoder, the text encoder and the schedulers are those of
diffusers. Tensor names are those of the original checkpoint.

Letters of the shapes: B videos, F latent frames, T timesteps of a video (1, or F), L text tokens.
"""

from __future__ import annotations

# ruff: noqa: E402  (an older transformers lacks what is imported below, and this error names the release it takes)
from hf_efficient.modeling.base.tested_releases import check_transformers

check_transformers()

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import capture_outputs

from hf_efficient.errors import HFEError
from hf_efficient.modeling.base.registered_model import RegisteredModel
from hf_efficient.modeling.monarch_wan.attention import grid_layout
from hf_efficient.modeling.monarch_wan.block import MonarchWanBlock, MonarchWanHead
from hf_efficient.modeling.monarch_wan.cache import WanCache
from hf_efficient.modeling.monarch_wan.configuration_monarch_wan import MonarchWanConfig
from hf_efficient.modeling.monarch_wan.input_checks import check_inputs, check_values
from hf_efficient.modeling.monarch_wan.norms import Float32Linear
from hf_efficient.modeling.monarch_wan.rotary import rotary_tables
from hf_efficient.modeling.monarch_wan.sampler import WanSampling


@dataclass
class MonarchWanOutput(ModelOutput):
    """Result of `MonarchWanModel`.

    Attributes:
        sample: the flow ``noise - video``, [B, out_channels, F, height, width].
        hidden_states: input of the first block and output of each, [B, tokens, hidden_size]; with
            `output_hidden_states=True`.
    """

    sample: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class MonarchWanPreTrainedModel(RegisteredModel, PreTrainedModel):
    """Settings for loading; creating a model checks its configuration again.

    Raises:
        StrictDataclassClassValidationError: (of huggingface_hub) a rule of `MonarchWanConfig` is violated.
    """

    config: MonarchWanConfig
    config_class = MonarchWanConfig  # set too: transformers does not resolve the string annotation above
    base_model_prefix = "model"
    main_input_name = "hidden_states"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MonarchWanBlock", "MonarchWanHead"]
    _skip_keys_device_placement = ["cache"]
    # Also loaded in half precision, they stay float32: they are small, and computed in float32.
    _keep_in_fp32_modules_strict = {"time_embedding", "time_projection", "modulation", "norm_q", "norm_k", "norm3"}
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Read by the Trainer, which would pass the number of labels to `forward`.
    accepts_loss_kwargs = False
    _can_record_outputs = {"hidden_states": MonarchWanBlock}

    def __init__(self, config: MonarchWanConfig, *args: Any, **kwargs: Any) -> None:
        config.validate()  # again: keyword arguments of `from_pretrained` set fields without the cross-field checks
        super().__init__(config, *args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """As in transformers, whose implementations are those of softmax attention here.

        Raises:
            HFEError: `monarch` was asked for, which arranges tokens as a sequence and not as a video.
        """
        if requested_attention is not None and requested_attention.endswith("monarch"):
            raise HFEError(
                f"attn_implementation={requested_attention!r} is for encoders, not for {self.config.model_type}",
                "set the configuration's field monarch, e.g. monarch={'h_reduce': 2}",
            )
        return super().get_correct_attn_implementation(requested_attention, is_init_check)


class MonarchWanModel(MonarchWanPreTrainedModel, WanSampling):
    """The Wan transformer: flow of noisy latents, given a timestep and a text.

    With `variant="bidirectional"` all frames attend to each other. With `variant="causal"` a frame attends to those of
    its chunk (`num_frames_per_block` frames) and of the chunks before it: in one call for a whole video, as in
    training, or chunk by chunk with a `WanCache`.
    """

    # Typed so, because the modules of a ModuleList have no types.
    blocks: Any

    def __init__(self, config: MonarchWanConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        patch = (1, config.patch_size[1], config.patch_size[2])
        self.patch_embedding = nn.Conv3d(config.in_channels, width, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.time_embedding = nn.Sequential(
            Float32Linear(config.freq_dim, width), nn.SiLU(), Float32Linear(width, width)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Float32Linear(width, 6 * width))
        self.blocks = nn.ModuleList(MonarchWanBlock(config, index) for index in range(config.num_hidden_layers))
        self.head = MonarchWanHead(config)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module in place, as the original code does.

        Linear layers Xavier uniform, those of the text and timestep embedding normal, the last one 0; biases 0; the
        patch embedding as a linear layer; modulations normal with variance 1 / hidden_size.
        """
        if isinstance(module, nn.Linear):
            if module is self.head.head:
                init.zeros_(module.weight)
            elif any(module is each for each in (*self.text_embedding, *self.time_embedding)):
                init.normal_(module.weight, std=self.config.initializer_range)
            else:
                init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv3d):
            bound = (6 / (module.weight.shape[0] + module.weight[0].numel())) ** 0.5
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
        elif isinstance(module, MonarchWanBlock | MonarchWanHead):
            init.normal_(module.modulation, std=self.config.hidden_size**-0.5)
        else:
            super()._init_weights(module)

    def new_cache(self, batch_size: int, num_frames: int, height: int, width: int) -> WanCache:
        """Return an empty cache for generating videos chunk by chunk, in the dtype and on the devices of the model.

        Args:
            batch_size: videos that are generated together.
            num_frames, height, width: size of their latents.

        Raises:
            HFEError: the model is not causal, or the size is no multiple of the patch size.
        """
        grid = self._token_grid((num_frames, height, width))
        devices = [_device_of(block.self_attn.norm_k) for block in self.blocks]
        return WanCache(self.config, batch_size, num_frames, grid[1:], self.dtype, devices)

    @capture_outputs
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cache: WanCache | None = None,
        start_frame: int = 0,
        **kwargs: Any,
    ) -> MonarchWanOutput:
        """Return the flow `sample` [B, out_channels, F, height, width], in the dtype of the model.

        Args:
            hidden_states: noisy latents [B, in_channels, F, height, width].
            timestep: [B], or [B, F] for a timestep of each latent frame; 1000 is noise, 0 is the video.
            encoder_hidden_states: text [B, text_len, text_dim], padded with zeros. With a cache that has seen the text
                (in a call without gradients) it may be None; if it is passed, its keys and values are computed again.
            cache: causal models: earlier chunks of the video. The call is then one chunk, which is written to it. With
                gradients enabled, they reach the keys and values of the call but not those in the cache.
            start_frame: position of the first frame in the video.
            kwargs: `output_hidden_states`, and `return_dict=False` for a tuple. Any other raises.

        Raises:
            HFEError: a shape does not fit the configuration, the Monarch tiles or the cache; an argument is unknown;
                on the CPU, or with HFE_CHECK=1, a value is NaN or infinite.
        """
        check_inputs(self.config, hidden_states, timestep, encoder_hidden_states, cache, start_frame, kwargs)
        check_values(hidden_states=hidden_states, timestep=timestep, encoder_hidden_states=encoder_hidden_states)
        grid = self._token_grid(hidden_states.shape[2:])
        if cache is not None:
            self._begin_chunk(cache, hidden_states.shape[0], grid, start_frame)

        tokens = self.patch_embedding(hidden_states.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = tokens.contiguous()
        embedding, timestep_states = self.embed_timestep(timestep)
        text = None
        if encoder_hidden_states is not None:
            text = self.text_embedding(encoder_hidden_states.to(tokens.dtype))
        rotary = rotary_tables(grid, start_frame, self.config.head_dim, self.config.rope_theta, tokens.device)
        # With gradients the keys and values of the call are no part of the cache's memory during the call: a block that
        # is computed again for the backward pass must not overwrite what later passes wrote.
        writes_inside = not torch.is_grad_enabled()
        # The window moves the cached frames before the backward pass may compute a block again.
        copies_prefix = self.training and self.blocks[0].gradient_checkpointing and self.config.local_attn_size != -1
        for index, block in enumerate(self.blocks):
            cached: dict[str, Any] = {}
            if cache is not None:
                layer = cache.layers[index]
                cached = {"layer_cache": layer} if writes_inside else {"prefix": layer.prefix(copies_prefix)}
                if text is None:
                    cached["text_states"] = layer.text_keys, layer.text_values
            tokens, key, value = block(tokens, timestep_states, text, rotary, grid, **cached)
            if cache is not None and not writes_inside:
                layer.write(key, value)
        if cache is not None and writes_inside:
            cache.has_text = True
        return MonarchWanOutput(sample=self._unpatchify(self.head(tokens, embedding), grid))

    def embed_timestep(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding, float32 [B, T, hidden_size], and its projection, float32 [B, T, 6, hidden_size].

        The first is for the head, the second for the blocks.

        Args:
            timestep: [B] or [B, F], of any dtype.
        """
        timestep = timestep if timestep.dim() == 2 else timestep[:, None]
        half = self.config.freq_dim // 2
        wide = torch.float32 if timestep.device.type == "mps" else torch.float64
        exponent = torch.arange(half, dtype=wide, device=timestep.device) / half
        angles = timestep.to(wide)[..., None] * 10000.0**-exponent
        embedding = self.time_embedding(torch.cat((angles.cos(), angles.sin()), -1).float())
        return embedding, self.time_projection(embedding).unflatten(-1, (6, -1))

    def _token_grid(self, size: tuple[int, ...]) -> tuple[int, int, int]:
        """Return frames, rows and columns of the tokens of latents with the size (F, height, width).

        Raises:
            HFEError: the size is no multiple of the patch size, or Monarch tiles do not fit.
        """
        frames, height, width = size
        _, patch_height, patch_width = self.config.patch_size
        if height % patch_height or width % patch_width:
            raise HFEError(
                f"latents of {height} x {width} are no whole number of patches of {patch_height} x {patch_width}",
                "resize or pad the video",
            )
        grid = (frames, height // patch_height, width // patch_width)
        for block in self.blocks:
            if block.self_attn.active_spec is not None:
                grid_layout(block.self_attn.active_spec, grid)
                break  # all blocks have the same tiles
        return grid

    def _begin_chunk(self, cache: WanCache, batch_size: int, grid: tuple[int, int, int], start_frame: int) -> None:
        """Check that the call fits the cache, and choose the slots of its frames; `HFEError` if it does not fit."""
        if cache.grid != grid[1:] or cache.batch_size != batch_size:
            raise HFEError(
                f"the call has {batch_size} videos of {grid[1]} x {grid[2]} tokens a frame, the cache "
                f"{cache.batch_size} of {cache.grid[0]} x {cache.grid[1]}",
                "keep the size of a video while it is generated, or make a new cache",
            )
        tiling = tuple(block.self_attn.active_spec for block in self.blocks)
        cache.begin_chunk(start_frame, grid[0], tiling)

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, N, patch height * patch width * out_channels] -> [B, out_channels, F, height, width]."""
        _, patch_height, patch_width = self.config.patch_size
        patches = patches.view(patches.shape[0], *grid, patch_height, patch_width, self.config.out_channels)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def _device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module with weights computes; accelerate may keep these elsewhere."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


__all__ = ["MonarchWanConfig", "MonarchWanModel", "MonarchWanOutput", "MonarchWanPreTrainedModel", "WanCache"]
