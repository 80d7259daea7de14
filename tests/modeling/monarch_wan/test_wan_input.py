"""One clear error for each wrong configuration, argument and tiling of the Wan transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from hf_efficient.errors import HFEError
from hf_efficient.modeling.monarch_wan.modeling_monarch_wan import MonarchWanConfig, WanCache


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "streaming"}, r"variant='streaming' must be one of \['bidirectional', 'causal'\]"),
        ({"num_attention_heads": 5}, "hidden_size=48 must be a multiple of num_attention_heads=5"),
        ({"num_attention_heads": 16}, "= 3 must be even and at least 6"),
        ({"freq_dim": 15}, "freq_dim=15 must be even"),
        ({"text_len": 0}, "text_len=0 must be at least 1"),
        ({"patch_size": [2, 2, 2]}, r"patch_size=\[2, 2, 2\] must be \[1, height, width\]"),
        ({"local_attn_size": 6}, "local_attn_size=6 and sink_size=0 need variant='causal'"),
        ({"variant": "causal", "sink_size": 1}, "sink_size=1 must be at least 0, and 0 if local_attn_size is -1"),
        ({"variant": "causal", "local_attn_size": 5, "sink_size": 3}, "local_attn_size=5 must be -1 or at least .* 6"),
        ({"variant": "causal", "monarch": {"f_tied": 2}}, "f_tied=2 must divide num_frames_per_block=3"),
        (
            {"variant": "causal", "monarch": {"f_tied": 3}, "local_attn_size": 7},
            "f_tied=3 must divide local_attn_size=7",
        ),
        ({"monarch": {"layers": [0, 2]}}, r"layers contains \[2\]; the model has layers 0\.\.1"),
        ({"monarch": {"block_size": 4}}, r"unknown keys \['block_size'\]"),
        ({"monarch": {"h_reduce": 0}}, "h_reduce=0 must be an integer of at least 1"),
        ({"monarch": {"num_iters": 0}}, "num_iters=0 must be"),
        ({"monarch": {"row_axes": "wf"}}, "row_axes='wf' must be one of"),
    ],
)
def test_wrong_configuration_is_named(fields: dict[str, Any], message: str, wan: Callable) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        wan(**fields)


def test_a_field_of_another_type_is_refused() -> None:
    with pytest.raises(StrictDataclassError, match="'num_frames_per_block'"):
        MonarchWanConfig(num_frames_per_block="3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(2, 4, 3, 8)}, r"shape \[2, 4, 3, 8\]; it must be \[batch, 4, frames"),
        ({"hidden_states": torch.zeros(2, 5, 3, 8, 12)}, r"\[2, 5, 3, 8, 12\]; it must be \[batch, 4"),
        ({"hidden_states": torch.zeros(2, 4, 0, 8, 12)}, r"\[2, 4, 0, 8, 12\]"),
        ({"hidden_states": torch.zeros(2, 4, 3, 7, 12)}, "latents of 7 x 12 are no whole number of patches of 2 x 2"),
        ({"hidden_states": torch.full((2, 4, 3, 8, 12), float("nan"))}, "hidden_states has values that are NaN"),
        ({"timestep": torch.tensor([1.0, float("inf")])}, "timestep has values that are NaN or infinite"),
        ({"timestep": torch.zeros(3)}, r"timestep has the shape \[3\]; it must be \[2\], or \[2, 3\]"),
        ({"timestep": torch.zeros(2, 2)}, r"timestep has the shape \[2, 2\]"),
        ({"timestep": None}, "timestep has the shape None"),
        ({"encoder_hidden_states": None}, r"encoder_hidden_states is missing; pass the text \[2, 5, 32\]"),
        ({"encoder_hidden_states": torch.zeros(2, 4, 32)}, r"\[2, 4, 32\]; it must be \[2, 5, 32\]; Wan pads shorter"),
        ({"encoder_hidden_states": torch.zeros(1, 5, 32)}, r"\[1, 5, 32\]; it must be \[2, 5, 32\]"),
        ({"start_frame": -1}, "start_frame=-1 must be at least 0"),
        ({"start_frame": 1022}, "position 1024 on one axis; rope_max_seq_len=1024"),
        ({"attention_mask": torch.ones(2, 72)}, "was given attention_mask, which it does not know"),
        ({"kv_cache": [1]}, "was given kv_cache, which it does not know"),
        ({"position_ids": torch.arange(72)}, "was given position_ids, which it does not know"),
        ({"past_key_values": object()}, "was given past_key_values, which it does not know"),
        ({"cache": object()}, "cache is a object, not a WanCache; make it with model.new_cache"),
    ],
)
def test_wrong_argument_is_named(changes: dict[str, Any], message: str, wan: Callable, call: Callable) -> None:
    with pytest.raises(HFEError, match=message):
        wan()(**(call(3)._asdict() | changes))


def test_unknown_arguments_that_are_none_change_nothing(wan: Callable, call: Callable) -> None:
    model, given = wan(), call(3)
    assert torch.equal(model(*given, attention_mask=None, attention_kwargs=None).sample, model(*given).sample)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"h_reduce": 3}, r"monarch.h_reduce=3 must divide the height of the token grid, 4 of \(3, 4, 6\)"),
        ({"w_reduce": 4}, "monarch.w_reduce=4 must divide the width of the token grid, 6"),
        ({"f_tied": 2}, "monarch.f_tied=2 must divide the frames of the token grid, 3"),
    ],
)
def test_tiles_that_do_not_fit_the_grid_are_named(spec: dict, message: str, wan: Callable, call: Callable) -> None:
    model = wan(monarch=spec)
    with pytest.raises(HFEError, match=message):
        model(*call(3))
    for block in model.blocks:
        block.self_attn.efficient = False
    model(*call(3))


@torch.no_grad()
def test_a_cache_refuses_other_sizes_gaps_and_overflow(wan: Callable, call: Callable) -> None:
    model, whole = wan(variant="causal"), call(9)
    cache = model.new_cache(2, 6, 8, 12)
    with pytest.raises(HFEError, match="start_frame=3 must be between 0 and 0, the frames in the cache"):
        model(*whole.frames(3, 6), cache=cache, start_frame=3)
    model(*whole.frames(0, 3), cache=cache)
    with pytest.raises(HFEError, match="a call with a cache has 6 frames; a chunk has num_frames_per_block=3"):
        model(*whole.frames(0, 6), cache=cache)
    larger = torch.zeros(2, 4, 3, 8, 14)
    with pytest.raises(HFEError, match="2 videos of 4 x 7 tokens a frame, the cache 2 of 4 x 6; keep the size"):
        model(larger, *whole.frames(0, 3)[1:], cache=cache, start_frame=3)
    with pytest.raises(HFEError, match="1 videos of 4 x 6 tokens a frame, the cache 2"):
        model(*(x[:1] for x in whole.frames(3, 6)), cache=cache, start_frame=3)
    model(*whole.frames(3, 6), cache=cache, start_frame=3)
    with pytest.raises(HFEError, match="frames 6 to 8 do not fit into a cache of 6"):
        model(*whole.frames(6, 9), cache=cache, start_frame=6)
    with pytest.raises(HFEError, match="a cache needs a causal model"):
        wan()(*whole.frames(0, 3), cache=cache)
    with pytest.raises(HFEError, match="7 frames are no whole number of chunks of num_frames_per_block=3"):
        model(*whole.frames(0, 7))


@torch.no_grad()
def test_a_filled_cache_refuses_another_tiling(wan: Callable, call: Callable) -> None:
    first, second = (wan(variant="causal", monarch={"h_reduce": reduce}) for reduce in (1, 2))
    whole, cache = call(6), first.new_cache(2, 6, 8, 12)
    first(*whole.frames(0, 3), cache=cache)
    with pytest.raises(HFEError, match=r"in block 0 changed from .*h_reduce=1.* to .*h_reduce=2.* holds 3 frames"):
        second(*whole.frames(3, 6), cache=cache, start_frame=3)
    first.blocks[1].self_attn.efficient = False
    with pytest.raises(HFEError, match="in block 1 changed from .* to softmax attention, but"):
        first(*whole.frames(3, 6), cache=cache, start_frame=3)
    cache.reset()
    second(*whole.frames(0, 3), cache=cache)


@torch.no_grad()
def test_frames_that_left_the_window_cannot_be_computed_again(wan: Callable, call: Callable) -> None:
    model, whole = wan(variant="causal", local_attn_size=6), call(9)
    cache = model.new_cache(2, 9, 8, 12)
    for start in (0, 3, 6, 6):
        model(*whole.frames(start, start + 3), cache=cache, start_frame=start)
    with pytest.raises(HFEError, match="frame 3 cannot be computed again.*local_attn_size=6, which has seen 9"):
        model(*whole.frames(3, 6), cache=cache, start_frame=3)
    with pytest.raises(HFEError, match="frame 3 cannot be computed again"):
        cache.truncate(3 * 24)
    cache.truncate(6 * 24)
    model(*whole.frames(6, 9), cache=cache, start_frame=6)


@torch.no_grad()
def test_a_cache_of_another_dtype_or_without_size_is_refused(wan: Callable, call: Callable) -> None:
    model, whole = wan(variant="causal"), call(3)
    cache = WanCache(model.config, 2, 3, (4, 6), dtype=torch.bfloat16)
    with pytest.raises(HFEError, match="computed keys in torch.float32, the cache holds torch.bfloat16"):
        model(*whole, cache=cache)
    with pytest.raises(HFEError, match="batch_size=0, num_frames=3 and grid="):
        model.new_cache(0, 3, 8, 12)
    with pytest.raises(HFEError, match="latents of 8 x 13"):
        model.new_cache(2, 3, 8, 13)
