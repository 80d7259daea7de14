"""Checks of what `MonarchWanModel.forward` is given, with one clear error each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_efficient.environment import check_data
from hf_efficient.errors import HFEError
from hf_efficient.modeling.monarch_wan.cache import WanCache
from hf_efficient.modeling.monarch_wan.configuration_monarch_wan import MonarchWanConfig

# Further keyword arguments that transformers' decorators read.
_KNOWN = ("output_hidden_states",)


def check_inputs(
    config: MonarchWanConfig,
    hidden_states: Tensor,
    timestep: Tensor | None,
    text: Tensor | None,
    cache: Any,
    start_frame: int,
    further: dict[str, Any],
) -> None:
    """Check shapes and names; no value is read, so this needs no device synchronisation.

    Args:
        config: configuration of the model.
        hidden_states, timestep, text, cache, start_frame: as for `MonarchWanModel.forward`.
        further: keyword arguments for which its forward has no parameter.

    Raises:
        HFEError: a shape does not fit, an argument is missing, or one is unknown.
    """
    for name, value in further.items():
        if value is not None and name not in _KNOWN:
            raise HFEError(
                f"MonarchWanModel was given {name}, which it does not know and must not ignore",
                "pass hidden_states, timestep, encoder_hidden_states, cache and start_frame; there are no masks",
            )
    if cache is not None and not isinstance(cache, WanCache):
        raise HFEError(f"cache is a {type(cache).__name__}, not a WanCache", "make it with model.new_cache(...)")
    if hidden_states.dim() != 5 or hidden_states.shape[1] != config.in_channels or not all(hidden_states.shape[2:]):
        raise HFEError(
            f"hidden_states has the shape {list(hidden_states.shape)}",
            f"it must be [batch, {config.in_channels}, frames, height, width]",
        )
    batch, _, frames = hidden_states.shape[:3]
    if timestep is None or list(timestep.shape) not in ([batch], [batch, frames]):
        shape = None if timestep is None else list(timestep.shape)
        raise HFEError(
            f"timestep has the shape {shape}", f"it must be [{batch}], or [{batch}, {frames}] for each latent frame"
        )
    _check_text(config, text, batch, cache)
    if start_frame < 0:
        raise HFEError(f"start_frame={start_frame} must be at least 0", "give the position of the first frame")
    patches = [1, *config.patch_size[1:]]
    last = max(start_frame + frames, *(size // p for size, p in zip(hidden_states.shape[2:], patches, strict=True)))
    if last > config.rope_max_seq_len:
        raise HFEError(
            f"the token grid has position {last - 1} on one axis; rope_max_seq_len={config.rope_max_seq_len}",
            "use a smaller video, or a larger rope_max_seq_len in the configuration",
        )
    _check_causal(config, frames, cache)


def _check_text(config: MonarchWanConfig, text: Tensor | None, batch: int, cache: WanCache | None) -> None:
    """Raise `HFEError` unless the text has its shape, or the cache has it already."""
    expected = [batch, config.text_len, config.text_dim]
    if text is None:
        if cache is None or not cache.has_text:
            raise HFEError(
                "encoder_hidden_states is missing", f"pass the text {expected}; only a cache that has seen it keeps it"
            )
    elif list(text.shape) != expected:
        raise HFEError(
            f"encoder_hidden_states has the shape {list(text.shape)}",
            f"it must be {expected}; Wan pads shorter texts with zeros",
        )


def _check_causal(config: MonarchWanConfig, frames: int, cache: WanCache | None) -> None:
    """Raise `HFEError` unless the frames are whole chunks, with a cache one chunk of a causal model."""
    chunk = config.num_frames_per_block
    if config.variant != "causal":
        if cache is not None:
            raise HFEError(
                "a cache needs a causal model: with variant='bidirectional' all frames attend to each other",
                "load the checkpoint with variant='causal', if it was trained so",
            )
        return
    if cache is not None and frames != chunk:
        raise HFEError(
            f"a call with a cache has {frames} frames; a chunk has num_frames_per_block={chunk}",
            "pass one chunk in each call",
        )
    if frames % chunk:
        raise HFEError(
            f"{frames} frames are no whole number of chunks of num_frames_per_block={chunk} frames",
            f"use a multiple of {chunk} frames",
        )


def check_values(**tensors: Tensor | None) -> None:
    """Check that no value is NaN or infinite.

    Only for tensors on the CPU, and with HFE_CHECK=1 on every device, since it synchronises; not in a compiled call.

    Raises:
        HFEError: a value is not finite; the message has the name of the tensor.
    """
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if tensor is None or tensor.is_meta or (tensor.device.type != "cpu" and not check_data()):
            continue
        if not torch.isfinite(tensor).all():
            raise HFEError(f"{name} has values that are NaN or infinite", "check the step that computed it")


__all__ = ["check_inputs", "check_values"]
