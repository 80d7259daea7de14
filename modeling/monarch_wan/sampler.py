"""Sampling loops of the Wan transformer, on latents and embedded texts.

The flow is ``noise - video``: latents at noise level sigma are ``(1 - sigma) * video + sigma * noise``, and their
timestep is ``1000 * sigma``. Latents are float32 between the calls of the model.

Letters of the shapes: B videos, C channels of the latents, F latent frames, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.modeling.monarch_wan.cache import WanCache

# Steps that the distilled models, Self-Forcing among them, were trained for, before the shift.
DISTILLED_TIMESTEPS = (1000.0, 750.0, 500.0, 250.0)


def shifted_sigmas(timesteps: Sequence[float], shift: float) -> list[float]:
    """Return ``shift * x / (1 + (shift - 1) * x)`` for each ``x = timestep / 1000``.

    With a shift of 5, the timesteps 1000, 750, 500, 250 give 1, 0.9375, 0.8333, 0.625.

    Args:
        timesteps: falling, in (0, 1000].
        shift: positive; more than 1 spends more of the steps at high noise.

    Raises:
        HFEError: a timestep or the shift is out of its range, or the timesteps do not fall.
    """
    if not timesteps or not all(0 < t <= 1000 for t in timesteps) or sorted(set(timesteps))[::-1] != list(timesteps):
        raise HFEError(
            f"timesteps={list(timesteps)} must fall, between 1000 and 0 (excluded)", "order them from noise to video"
        )
    if shift <= 0:
        raise HFEError(f"shift={shift} must be positive", "use 5, as Self-Forcing does, or 1 for no shift")
    return [shift * t / (1000 + (shift - 1) * t) for t in timesteps]


def even_timesteps(num_steps: int) -> list[float]:
    """Return `num_steps` timesteps at equal distances, from 1000 down, before the shift.

    Raises:
        HFEError: `num_steps` is less than 1.
    """
    if num_steps < 1:
        raise HFEError(f"num_steps={num_steps} must be at least 1", "use 50, or 4 for a distilled model")
    return [1000 * (1 - step / num_steps) for step in range(num_steps)]


class WanSampling:
    """Mixin of `MonarchWanModel`: `sample` for whole videos, `sample_chunks` and `stream_chunks` for causal models."""

    # Attributes of the model that this is mixed into.
    config: Any
    new_cache: Callable[..., WanCache]

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        encoder_hidden_states: Tensor,
        negative_hidden_states: Tensor | None = None,
        *,
        guidance_scale: float = 5.0,
        timesteps: Sequence[float] | int = 50,
        shift: float = 5.0,
        renoise: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return latents, float32 [B, C, F, height, width], computed from noise for all frames together.

        Each step goes along the flow to the next noise level (Euler's method); or, with `renoise`, to the video that
        the flow predicts and from there with new noise to the next level, as models distilled to few steps are trained.

        Args:
            noise: standard normal, [B, C, F, height, width].
            encoder_hidden_states: texts [B, text_len, text_dim].
            negative_hidden_states: texts to move away from, same shape: classifier-free guidance, which doubles the
                batch. None for none, as for distilled models.
            guidance_scale: factor of the difference between the flows of the two texts; 1 is no guidance.
            timesteps: number of steps, or the timesteps before the shift, falling from 1000.
            shift: see `shifted_sigmas`.
            renoise: see above.
            generator: source of the new noise; not used without `renoise`.

        Raises:
            HFEError: timesteps or shift are out of range; errors of the model propagate.
        """
        sigmas = shifted_sigmas(even_timesteps(timesteps) if isinstance(timesteps, int) else timesteps, shift)
        guided = negative_hidden_states is not None and guidance_scale != 1
        texts = torch.cat((encoder_hidden_states, negative_hidden_states)) if guided else encoder_hidden_states
        latents = noise.float()
        for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
            doubled = torch.cat((latents, latents)) if guided else latents
            flow = self._flow(doubled, 1000 * sigma, texts)
            if guided:
                positive, negative = flow.chunk(2)
                flow = negative + guidance_scale * (positive - negative)
            if renoise:
                latents = _add_noise(latents - sigma * flow, following, generator)
            else:
                latents = latents + (following - sigma) * flow
        return latents

    def sample_chunks(self, noise: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Tensor:
        """Return latents, float32 [B, C, F, height, width], computed chunk by chunk with a causal model.

        Arguments, options and errors as for `stream_chunks`.
        """
        return torch.cat(list(self.stream_chunks(noise, encoder_hidden_states, **options)), 2)

    @torch.no_grad()
    def stream_chunks(
        self,
        noise: Tensor,
        encoder_hidden_states: Tensor,
        *,
        timesteps: Sequence[float] = DISTILLED_TIMESTEPS,
        shift: float = 5.0,
        context_timestep: float = 0.0,
        generator: torch.Generator | None = None,
        cache: WanCache | None = None,
    ) -> Iterator[Tensor]:
        """Yield the latents of each chunk, float32 [B, C, num_frames_per_block, height, width], when it is finished.

        At each timestep the model predicts the chunk without noise, and new noise brings it to the next level. A last
        call with the finished chunk writes its keys and values to the cache, for the chunks after it.

        Args:
            noise: standard normal, [B, C, F, height, width]; F a multiple of `config.num_frames_per_block`.
            encoder_hidden_states: texts [B, text_len, text_dim].
            timesteps, shift: see `shifted_sigmas`.
            context_timestep: timestep of the call with the finished chunk.
            generator: source of the new noise.
            cache: a cache to go on from, which then holds the new chunks too; by default a new one, to which the last
                chunk is not written.

        Raises:
            HFEError: the model is not causal, the frames are no whole chunks, or timesteps or shift are out of range;
                errors of the model propagate.
        """
        sigmas = shifted_sigmas(timesteps, shift)
        chunk, frames = self.config.num_frames_per_block, noise.shape[2]
        if frames % chunk:
            raise HFEError(
                f"{frames} frames are no whole number of chunks of num_frames_per_block={chunk} frames",
                f"use a multiple of {chunk} frames",
            )
        goes_on = cache is not None
        if cache is None:
            cache = self.new_cache(noise.shape[0], *noise.shape[2:])
        first = cache.num_frames
        # The text's keys and values are computed once; a cache to go on from gets those of the present text.
        text: Tensor | None = encoder_hidden_states
        for start in range(0, frames, chunk):
            latents = noise[:, :, start : start + chunk].float()
            for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
                flow = self._flow(latents, 1000 * sigma, text, cache=cache, start_frame=first + start)
                latents = _add_noise(latents - sigma * flow, following, generator)
                text = None
            if goes_on or start + chunk < frames:
                self._flow(latents, context_timestep, text, cache=cache, start_frame=first + start)
            yield latents

    def _flow(self, latents: Tensor, timestep: float, text: Tensor | None, **cached: Any) -> Tensor:
        """Return the flow, float32 [B, C, F, height, width], of latents that all have one timestep."""
        timesteps = torch.full((latents.shape[0],), timestep, dtype=torch.float32, device=latents.device)
        # The mixin does not know that it is callable.
        return self(latents, timesteps, text, **cached).sample.float()  # type: ignore[operator]


def _add_noise(video: Tensor, sigma: float, generator: torch.Generator | None) -> Tensor:
    """Return ``(1 - sigma) * video + sigma * noise``, drawing noise only if `sigma` is not 0."""
    if sigma == 0:
        return video
    # On the generator's device, so that the CPU's noise, say, is the same for every device of the model.
    device = video.device if generator is None else generator.device
    noise = torch.randn(video.shape, generator=generator, dtype=torch.float32, device=device).to(video.device)
    return (1 - sigma) * video + sigma * noise


__all__ = ["DISTILLED_TIMESTEPS", "WanSampling", "even_timesteps", "shifted_sigmas"]
