"""A tiny Wan transformer with random weights, and its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hf_efficient.modeling.monarch_wan.modeling_monarch_wan import MonarchWanConfig, MonarchWanModel

# Heads of 24 channels: 8 each for frame, row and column.
TINY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "text_len": 5,
    "freq_dim": 16,
}


class Call(NamedTuple):
    """Latents [B, 4, F, 8, 12], so frames of 4 x 6 tokens; a timestep for each frame [B, F]; text [B, 5, 32]."""

    hidden_states: Tensor
    timestep: Tensor
    encoder_hidden_states: Tensor

    def frames(self, start: int, end: int) -> Call:
        """The same call for some of the frames."""
        return Call(self.hidden_states[:, :, start:end], self.timestep[:, start:end], self.encoder_hidden_states)


def _wan(**fields: Any) -> MonarchWanModel:
    model = MonarchWanModel(MonarchWanConfig(**(TINY | fields)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model.eval()


def _call(frames: int = 6, batch: int = 2) -> Call:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(batch, 4, frames, 8, 12, generator=generator)
    timestep = 1000 * torch.rand(batch, frames, generator=generator)
    return Call(latents, timestep, torch.randn(batch, 5, 32, generator=generator))


@pytest.fixture(scope="session")
def wan() -> Callable[..., MonarchWanModel]:
    """Makes the tiny model in evaluation mode, with fields changed; models of equal shape have equal weights."""
    return _wan


@pytest.fixture(scope="session")
def call() -> Callable[..., Call]:
    """Makes a call of the tiny model for a number of frames and a batch size."""
    return _call
