"""Random inputs of every kind of model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def example_inputs(config: Any) -> dict[str, Tensor]:
    """Two inputs for the model of a configuration, by the names of its arguments: token ids, images or latents."""
    generator = torch.Generator().manual_seed(2)
    if hasattr(config, "vocab_size"):
        return {"input_ids": torch.randint(3, config.vocab_size, (2, 9), generator=generator)}
    if hasattr(config, "image_size"):
        size = (2, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}
    _, height, width = config.patch_size
    return {
        # 2 frames of 4 x 3 tokens.
        "hidden_states": torch.randn(2, config.in_channels, 2, 4 * height, 3 * width, generator=generator),
        "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, config.text_len, config.text_dim, generator=generator),
    }
