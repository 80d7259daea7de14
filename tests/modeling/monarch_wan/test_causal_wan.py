"""Causal Wan models: chunk by chunk with a cache, and all chunks in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.modeling.monarch_wan.modeling_monarch_wan import MonarchWanModel, WanCache

# Softmax, and Monarch attention that cuts the 4 x 6 tokens of a frame both ways.
SPECS = {"softmax": None, "monarch": {"h_reduce": 2, "w_reduce": 3}, "two-iterations": {"h_reduce": 2, "num_iters": 2}}


@torch.no_grad()
def by_chunks(model: MonarchWanModel, call: Any, cache: WanCache, runs: int = 1) -> Tensor:
    """The flow of all chunks, each computed `runs` times."""
    chunk, flows = model.config.num_frames_per_block, []
    for start in range(0, call.hidden_states.shape[2], chunk):
        part = call.frames(start, start + chunk)
        for run in range(runs):
            text = part.encoder_hidden_states if start == run == 0 else None
            flow = model(part.hidden_states, part.timestep, text, cache=cache, start_frame=start).sample
        flows.append(flow)
    return torch.cat(flows, 2)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("chunk", [3, 1], ids=["chunks", "frame-by-frame"])
@torch.no_grad()
def test_cached_chunks_are_slices_of_the_call_for_the_whole_video(
    chunk: int, spec: dict | None, wan: Callable, call: Callable
) -> None:
    model, whole = wan(variant="causal", num_frames_per_block=chunk, monarch=spec), call(6)
    found = by_chunks(model, whole, model.new_cache(2, 6, 8, 12))
    torch.testing.assert_close(found, model(*whole).sample, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tied_frames_share_tiles_of_a_chunk(wan: Callable, call: Callable) -> None:
    model, whole = wan(variant="causal", monarch={"f_tied": 3, "h_reduce": 2}), call(6)
    found = by_chunks(model, whole, model.new_cache(2, 6, 8, 12))
    torch.testing.assert_close(found, model(*whole).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@torch.no_grad()
def test_one_chunk_for_the_whole_video_is_the_bidirectional_model(
    spec: dict | None, wan: Callable, call: Callable
) -> None:
    whole = call(6)._replace(timestep=torch.tensor([300.0, 800.0]))
    expected = wan(monarch=spec)(*whole).sample
    model = wan(variant="causal", num_frames_per_block=6, monarch=spec)
    torch.testing.assert_close(model(*whole).sample, expected, rtol=1e-5, atol=1e-5)
    uniform = whole._replace(timestep=whole.timestep[:, None].expand(2, 6))
    torch.testing.assert_close(model(*uniform).sample, expected, rtol=1e-5, atol=1e-5)
    cached = by_chunks(model, uniform, model.new_cache(2, 6, 8, 12))
    torch.testing.assert_close(cached, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_later_chunks_do_not_change_earlier_ones(wan: Callable, call: Callable) -> None:
    model, whole = wan(variant="causal"), call(6)
    changed = whole.hidden_states.clone()
    changed[:, :, 3:] += 1
    flow, other = model(*whole).sample, model(changed, *whole[1:]).sample
    assert torch.equal(flow[:, :, :3], other[:, :, :3])
    assert (flow[:, :, 3:] - other[:, :, 3:]).abs().max() > 0.1


@torch.no_grad()
def test_computing_a_chunk_again_overwrites_its_slots(wan: Callable, call: Callable) -> None:
    model, whole = wan(variant="causal"), call(6)
    once, twice = (model.new_cache(2, 6, 8, 12) for _ in range(2))
    assert torch.equal(by_chunks(model, whole, once), by_chunks(model, whole, twice, runs=3))
    assert all(torch.equal(a, b) for a, b in zip(once.memory(), twice.memory(), strict=True))
    assert twice.get_seq_length() == 6 * 24 and twice.num_frames == 6


@torch.no_grad()
def test_noisy_passes_leave_no_trace_after_the_clean_pass(wan: Callable, call: Callable) -> None:
    model, whole, noisy = wan(variant="causal"), call(6), call(6, 2).hidden_states[:, :, :3] * 3
    expected = by_chunks(model, whole, model.new_cache(2, 6, 8, 12))
    cache = model.new_cache(2, 6, 8, 12)
    model(noisy, torch.tensor([1000.0, 1000.0]), whole.encoder_hidden_states, cache=cache)
    assert torch.equal(by_chunks(model, whole, cache), expected)


class FrameLists:
    """The window as lists of frames: what the model attends to is given by plain Python, frame by frame."""

    def __init__(self, local: int, sink: int) -> None:
        self.frames: list[int] = []
        self.local, self.sink = local, sink

    def add(self, frames: range) -> list[int]:
        self.frames += frames
        while len(self.frames) > self.local:
            del self.frames[self.sink]
        return list(self.frames)


@pytest.mark.parametrize(("local", "sink", "chunk"), [(6, 0, 3), (7, 3, 3), (4, 1, 1), (3, 0, 3), (2, 1, 1)])
@pytest.mark.parametrize("monarch", [None, {"h_reduce": 2}], ids=["softmax", "monarch"])
@torch.no_grad()
def test_the_window_keeps_sink_and_last_frames(
    monarch: dict | None, local: int, sink: int, chunk: int, wan: Callable, call: Callable
) -> None:
    window = {"local_attn_size": local, "sink_size": sink, "num_frames_per_block": chunk}
    model, whole = wan(variant="causal", monarch=monarch, **window), call(12)
    cache, lists = model.new_cache(2, 12, 8, 12), FrameLists(local, sink)
    assert cache.capacity == local * 24
    # All keys that the first block ever computed, before rotation by a window.
    everything = wan(variant="causal", monarch=monarch, num_frames_per_block=chunk)
    unlimited = everything.new_cache(2, 12, 8, 12)
    found = []
    for start in range(0, 12, chunk):
        part = whole.frames(start, start + chunk)
        for _ in range(2):
            found.append(model(*part, cache=cache, start_frame=start).sample)
        assert torch.equal(found[-1], found.pop(-2))
        everything(*part, cache=unlimited, start_frame=start)
        expected = lists.add(range(start, start + chunk))
        keys = unlimited.layers[0].keys.unflatten(1, (12, 24))[:, expected].flatten(1, 2)
        torch.testing.assert_close(cache.layers[0].visible()[0], keys, rtol=1e-5, atol=1e-5)
        assert cache.get_seq_length() == len(expected) * 24
    torch.testing.assert_close(torch.cat(found, 2), model(*whole).sample, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_positions_follow_the_start_frame(wan: Callable, call: Callable) -> None:
    """Attention depends on differences of positions: moving the whole video changes no flow, missing frames do."""
    for fields in ({}, {"variant": "causal"}):
        model, whole = wan(**fields), call(6)
        torch.testing.assert_close(model(*whole, start_frame=9).sample, model(*whole).sample, rtol=1e-3, atol=1e-4)
    absent, whole = wan(variant="causal"), call(6)
    first, last = absent(*whole.frames(3, 6)).sample, absent(*whole.frames(3, 6), start_frame=3).sample
    torch.testing.assert_close(first, last, rtol=1e-3, atol=1e-4)
    assert (first - absent(*whole).sample[:, :, 3:]).abs().max() > 0.1


def test_gradients_reach_the_keys_of_the_call_and_not_those_in_the_cache(wan: Callable, call: Callable) -> None:
    """The gradients of the second chunk's latents are those of the call for the whole video."""
    model, whole = wan(variant="causal"), call(6)
    cache = model.new_cache(2, 6, 8, 12)
    with torch.no_grad():
        model(*whole.frames(0, 3), cache=cache)
    last = whole.frames(3, 6)
    latents = last.hidden_states.clone().requires_grad_()
    flow = model(latents, *last[1:], cache=cache, start_frame=3).sample
    flow.square().sum().backward()
    found = latents.grad
    both = whole.hidden_states.clone().requires_grad_()
    expected_flow = model(both, *whole[1:]).sample[:, :, 3:]
    torch.testing.assert_close(flow, expected_flow, rtol=1e-5, atol=1e-5)
    expected_flow.square().sum().backward()
    torch.testing.assert_close(found, both.grad[:, :, 3:], rtol=1e-4, atol=1e-4)
    assert all(not states.requires_grad for states in cache.memory())
    with torch.no_grad():
        again = model(*last, cache=cache, start_frame=3).sample
    torch.testing.assert_close(again, flow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("local", [-1, 6])
def test_checkpointing_after_later_passes_gives_the_same_gradients(local: int, wan: Callable, call: Callable) -> None:
    """Blocks are computed again when the cache has gone on: the clean pass, and frames that left the window."""

    def gradients(checkpointing: bool) -> list[Tensor]:
        model, whole = wan(variant="causal", local_attn_size=local).train(), call(12)
        if checkpointing:
            model.gradient_checkpointing_enable()
        cache, losses = model.new_cache(2, 12, 8, 12), []
        for start in range(0, 12, 3):
            part = whole.frames(start, start + 3)
            losses.append(model(*part, cache=cache, start_frame=start).sample.square().mean())
            with torch.no_grad():
                model(part.hidden_states * 0.5, *part[1:], cache=cache, start_frame=start)
        sum(losses).backward()
        return [parameter.grad for parameter in model.parameters()]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_text_is_computed_once_or_again_when_it_is_passed(wan: Callable, call: Callable) -> None:
    model, whole = wan(variant="causal"), call(6)
    cache = model.new_cache(2, 6, 8, 12)
    part = whole.frames(0, 3)
    flow = model(*part, cache=cache).sample
    assert torch.equal(model(*part[:2], cache=cache).sample, flow)
    other = model(*part[:2], part.encoder_hidden_states.flip(0), cache=cache).sample
    assert (other - flow).abs().max() > 0.01
    assert torch.equal(model(*part[:2], cache=cache).sample, other)


@torch.no_grad()
def test_an_empty_cache_after_reset_is_like_a_new_one(wan: Callable, call: Callable) -> None:
    model, whole = wan(variant="causal"), call(6)
    cache = model.new_cache(2, 6, 8, 12)
    expected, addresses = by_chunks(model, whole, cache), cache.addresses()
    cache.reset()
    with pytest.raises(HFEError, match="encoder_hidden_states is missing"):
        model(*whole.frames(0, 3)[:2], cache=cache)
    assert torch.equal(by_chunks(model, whole, cache), expected) and cache.addresses() == addresses


@torch.no_grad()
def test_truncated_cache_goes_on_from_the_kept_frames(wan: Callable, call: Callable) -> None:
    model, whole = wan(variant="causal"), call(9)
    cache = model.new_cache(2, 9, 8, 12)
    expected = by_chunks(model, whole, cache)[:, :, 6:]
    cache.truncate(6 * 24)
    assert cache.get_seq_length() == 6 * 24 and cache.state_tensors() == []
    assert torch.equal(model(*whole.frames(6, 9), cache=cache, start_frame=6).sample, expected)
    with pytest.raises(HFEError, match="length=25 must be 0 to 9 frames of 24 tokens"):
        cache.truncate(25)
    with pytest.raises(HFEError, match="fixed size, 216 tokens"):
        cache.grow(300)


@torch.no_grad()
def test_cache_made_in_inference_mode_serves_outside_of_it(wan: Callable, call: Callable) -> None:
    model, whole = wan(variant="causal"), call(6)
    with torch.inference_mode():
        cache = model.new_cache(2, 6, 8, 12)
        model(*whole.frames(0, 3), cache=cache)
    found = model(*whole.frames(3, 6), cache=cache, start_frame=3).sample
    torch.testing.assert_close(found, model(*whole).sample[:, :, 3:], rtol=1e-5, atol=1e-5)
