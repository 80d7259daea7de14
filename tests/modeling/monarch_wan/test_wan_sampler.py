"""Sampling loops: against the formulas with a model whose flow is known, and with the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.modeling.monarch_wan.sampler import WanSampling, even_timesteps, shifted_sigmas


class KnownFlow(WanSampling):
    """Its flow leads from the latents to `video` times the first number of the text: ``(latents - video) / sigma``."""

    def __init__(self, video: Tensor) -> None:
        self.video = video
        self.calls: list[tuple[list[int], list[float]]] = []

    def __call__(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Any:
        self.calls.append((list(latents.shape), timestep.tolist()))
        target = self.video * text[:, :1, 0, None, None, None]
        return SimpleNamespace(sample=(latents - target) / (timestep[:, None, None, None, None] / 1000))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_steps_of_self_forcing_are_shifted_as_published() -> None:
    expected = [1.0, 0.9375, 5 * 0.5 / 3, 0.625]
    assert shifted_sigmas((1000, 750, 500, 250), 5.0) == pytest.approx(expected, abs=1e-12)
    assert even_timesteps(4) == [1000, 750, 500, 250]


@pytest.mark.parametrize("renoise", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_straight_flow_is_followed_to_its_end(steps: int, renoise: bool) -> None:
    video = noise(1, 4, 3, 4, 4, seed=1)
    model, text = KnownFlow(video), torch.ones(1, 5, 32)
    found = model.sample(noise(1, 4, 3, 4, 4), text, timesteps=steps, renoise=renoise)
    torch.testing.assert_close(found, video, rtol=1e-5, atol=1e-5)
    assert [round(t[0]) for _, t in model.calls] == [round(1000 * s) for s in shifted_sigmas(even_timesteps(steps), 5)]


def test_guidance_extrapolates_the_flows_of_both_texts_in_one_call() -> None:
    """The flow is linear in the text, so guidance by 3 between the texts 2 and 1 is the text 1 + 3 * (2 - 1)."""
    video = noise(2, 4, 3, 4, 4, seed=1)
    model = KnownFlow(torch.cat((video, video)))
    texts = torch.full((2, 5, 32), 2.0), torch.ones(2, 5, 32)
    found = model.sample(noise(2, 4, 3, 4, 4), *texts, guidance_scale=3.0, timesteps=5)
    torch.testing.assert_close(found, 4 * video, rtol=1e-4, atol=1e-4)
    assert {tuple(shape) for shape, _ in model.calls} == {(4, 4, 3, 4, 4)} and len(model.calls) == 5


def test_chunks_are_those_of_the_loop_without_a_cache(wan: Callable, call: Callable) -> None:
    """Each call over the whole video, with timestep 0 for the finished frames, stands for a cached one."""
    model, text = wan(variant="causal", monarch={"h_reduce": 2}), call(6).encoder_hidden_states
    start = noise(2, 4, 6, 8, 12)
    found = model.sample_chunks(start, text, generator=torch.Generator().manual_seed(5))

    generator, sigmas = torch.Generator().manual_seed(5), [1.0, 0.9375, 5 * 0.5 / 3, 0.625]
    video = start.clone()
    for chunk in (slice(0, 3), slice(3, 6)):
        for step, sigma in enumerate(sigmas):
            timestep = torch.zeros(2, chunk.stop)
            timestep[:, chunk] = 1000 * sigma
            with torch.no_grad():
                flow = model(video[:, :, : chunk.stop], timestep, text).sample[:, :, chunk]
            clean = video[:, :, chunk] - sigma * flow
            if step < 3:
                fresh = torch.randn(clean.shape, generator=generator)
                clean = (1 - sigmas[step + 1]) * clean + sigmas[step + 1] * fresh
            video[:, :, chunk] = clean
    torch.testing.assert_close(found, video, rtol=1e-4, atol=1e-4)


def test_the_same_generator_gives_the_same_video(wan: Callable, call: Callable) -> None:
    model, text = wan(variant="causal"), call(6).encoder_hidden_states
    first, again, other = (
        model.sample_chunks(noise(2, 4, 6, 8, 12), text, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[:, :, :0], other[:, :, :0]) and first.shape == (2, 4, 6, 8, 12)


def test_a_video_goes_on_from_its_cache(wan: Callable, call: Callable) -> None:
    model, text, start = wan(variant="causal"), call(6).encoder_hidden_states, noise(2, 4, 9, 8, 12)
    whole = model.sample_chunks(start, text, generator=torch.Generator().manual_seed(3))
    cache, generator = model.new_cache(2, 9, 8, 12), torch.Generator().manual_seed(3)
    parts = [
        model.sample_chunks(part, text, cache=cache, generator=generator) for part in (start[:, :, :6], start[:, :, 6:])
    ]
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-4, atol=1e-4)
    assert cache.num_frames == 9


def test_chunks_are_yielded_when_they_are_finished(wan: Callable, call: Callable) -> None:
    model, calls = wan(variant="causal"), []
    model.register_forward_hook(lambda *given: calls.append(1))
    stream = model.stream_chunks(noise(2, 4, 9, 8, 12), call(6).encoder_hidden_states)
    assert next(stream).shape == (2, 4, 3, 8, 12) and len(calls) == 5
    assert not next(stream).requires_grad and len(calls) == 10
    assert len(list(stream)) == 1 and len(calls) == 14


def test_frame_by_frame_with_a_window_longer_than_the_cache(wan: Callable, call: Callable) -> None:
    model = wan(variant="causal", num_frames_per_block=1, local_attn_size=3, sink_size=1, monarch={"w_reduce": 2})
    found = model.sample_chunks(noise(2, 4, 7, 8, 12), call(6).encoder_hidden_states)
    assert found.shape == (2, 4, 7, 8, 12) and found.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": (500, 750)}, r"timesteps=\[500, 750\] must fall"),
        ({"timesteps": ()}, r"timesteps=\[\] must fall"),
        ({"timesteps": (1000, 0)}, r"timesteps=\[1000, 0\] must fall, between 1000 and 0 \(excluded\)"),
        ({"shift": 0.0}, "shift=0.0 must be positive"),
        ({"timesteps": 0}, "num_steps=0 must be at least 1"),
    ],
)
def test_wrong_steps_are_named(options: dict[str, Any], message: str, wan: Callable, call: Callable) -> None:
    with pytest.raises(HFEError, match=message):
        wan().sample(noise(2, 4, 3, 8, 12), call(3).encoder_hidden_states, **options)


def test_wrong_frames_and_models_are_named(wan: Callable, call: Callable) -> None:
    text = call(6).encoder_hidden_states
    with pytest.raises(HFEError, match="5 frames are no whole number of chunks of num_frames_per_block=3"):
        wan(variant="causal").sample_chunks(noise(2, 4, 5, 8, 12), text)
    with pytest.raises(HFEError, match="variant='bidirectional' has no cache"):
        wan().sample_chunks(noise(2, 4, 6, 8, 12), text)
