"""One decoding step: called, captured and replayed, with recurrent state too.

Those not marked `gpu` also run in Triton's interpreter, where a step is called instead of captured.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_efficient.environment import triton_interpreted
from hf_efficient.modeling.decoder.cache_compat import CACHE_ARGUMENT
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig
from hf_efficient.modeling.decoder.decode_cache import DecodeCache
from hf_efficient.modeling.decoder.decode_step import DecodeStep
from hf_efficient.modeling.decoder.graph_capture import step_signature
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import (
    EfficientDecoderConfig,
    EfficientDecoderForCausalLM,
)
from tiny_shapes import TINY

SHAPE: dict[str, Any] = TINY | {"num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.2}
PROMPT, NEW = 7, 40
gpu = pytest.mark.gpu


def decoder(device: torch.device, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(0)
    return EfficientDecoderForCausalLM(EfficientDecoderConfig(**SHAPE, **fields)).to(device, dtype).eval()


@pytest.fixture
def recurrent(recurrent_model: ModuleType, device: torch.device) -> Any:
    torch.manual_seed(0)
    return recurrent_model.RecurrentForCausalLM(DecoderConfig(**SHAPE, eos_token_id=None)).to(device).eval()


def prompt(device: torch.device, length: int = PROMPT) -> Tensor:
    return torch.randint(3, 97, (3, length), generator=torch.Generator().manual_seed(1)).to(device)


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    settings = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, **settings)


def test_the_signature_of_a_step_changes_with_settings_and_modules(device: torch.device) -> None:
    ours = decoder(device, sliding_window=5)
    seen = {step_signature(ours)}
    ours.model.layers[0].self_attn.sliding_window = 3
    seen.add(step_signature(ours))
    ours.model.layers[0].mlp.act_fn = nn.GELU().eval()
    seen.add(step_signature(ours))
    ours.config.rms_norm_eps = 0.1
    seen.add(step_signature(ours))
    assert len(seen) == 4 and None not in seen


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_a_replay_equals_the_same_kernels_launched_one_by_one(
    rows: int, padded: bool, dtype: torch.dtype, device: torch.device
) -> None:
    ours = decoder(device, dtype, qk_norm=True, head_dim=16)
    config = ours.config
    results = []
    with torch.no_grad():
        for replayed in (False, True):
            cache = DecodeCache(config, rows, 64, dtype, device)
            generator = torch.Generator(device).manual_seed(0)
            for layer in cache.layers:
                layer.keys.normal_(generator=generator)
                layer.values.normal_(generator=generator)
                layer.cumulative_length.fill_(9)
            step = DecodeStep(cache, set(config.layer_types), padded)
            padding_mask = torch.ones(rows, 9, dtype=torch.bool, device=device)
            padding_mask[-1, :4] = False
            step.reset(9, torch.full((rows,), 9, device=device), padding_mask if padded else None)
            if replayed:
                step.capture(ours, cache, step_signature(ours))
            logits = []
            for token in range(5):
                step.tokens.fill_(3 + token)
                logits.append((step.replay() if replayed else step.run(ours, cache)).clone())
            results.append((torch.stack(logits), cache.layers[1].keys.clone(), cache.lengths.clone()))
    for called, replay in zip(*results, strict=True):
        assert torch.equal(called, replay)
    assert results[0][2].tolist() == [14] * config.num_hidden_layers


@gpu
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_a_prompt_needs_no_square_mask(padded: bool, device: torch.device) -> None:
    ours = decoder(device, torch.bfloat16)
    length = 16384
    ids = torch.randint(3, 97, (2, length), device=device)
    mask = torch.ones_like(ids)
    mask[1, : length // 2] = 1 - int(padded)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        ours(ids, attention_mask=mask, logits_to_keep=1)
    assert torch.cuda.max_memory_allocated() - before < length * length, "a boolean mask of one row alone is larger"


def test_a_recurrent_model_decodes_what_transformers_loop_does(recurrent: Any, device: torch.device) -> None:
    new = 4 if triton_interpreted() else NEW
    found = generate(recurrent, prompt(device), max_new_tokens=new)
    assert torch.equal(found, generate(recurrent, prompt(device), max_new_tokens=new, disable_compile=True))
    assert triton_interpreted() or len(recurrent.captured_steps()) == 1


@gpu
@pytest.mark.parametrize("last", [0, 1, 7, 8, 15, 16, 25, 38])
def test_no_token_past_the_end_enters_a_recurrent_state(last: int, recurrent: Any, device: torch.device) -> None:
    """Sequences end at different tokens; the kept state is that of the last token fed, for a second turn too."""
    free = generate(recurrent, prompt(device), disable_compile=True)
    ends = [int(free[row, PROMPT + max(last - 5 * row, 0)]) for row in range(3)]
    turns: list[Any] = []
    for options in ({}, {"disable_compile": True}):
        first = generate(recurrent, prompt(device), eos_token_id=ends, return_dict_in_generate=True, **options)
        cache = getattr(first, CACHE_ARGUMENT)
        length, states = int(cache.get_seq_length()), cache.states.clone()
        longer = torch.cat((first.sequences, prompt(device, 4)), 1)
        second = generate(recurrent, longer, past_key_values=cache, return_dict_in_generate=True, **options)
        assert getattr(second, CACHE_ARGUMENT) is cache
        turns.append((first.sequences, second.sequences, length, states, cache.states))
    for captured, called in zip(*turns, strict=True):
        if isinstance(captured, Tensor) and captured.is_floating_point():
            torch.testing.assert_close(captured, called, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(torch.as_tensor(captured), torch.as_tensor(called))


@gpu
def test_the_warm_up_of_a_capture_leaves_a_recurrent_state_as_it_was(recurrent: Any, device: torch.device) -> None:
    logits = []
    with torch.no_grad():
        for captured in (False, True):
            cache = recurrent.build_cache(3, 64)
            recurrent(prompt(device), past_key_values=cache)
            step = DecodeStep(cache, {"full_attention"}, padded=False)
            step.reset(PROMPT, torch.full((3,), PROMPT, device=device), None)
            if captured:
                before = [tensor.clone() for tensor in cache.state_tensors()]
                signature = step_signature(recurrent)
                assert signature is not None
                step.capture(recurrent, cache, signature)
                for tensor, value in zip(cache.state_tensors(), before, strict=True):
                    assert torch.equal(tensor, value)
            for token in range(5):
                step.tokens.fill_(3 + token)
                logits.append((step.replay() if captured else step.run(recurrent, cache)).clone())
    assert torch.equal(torch.stack(logits[:5]), torch.stack(logits[5:]))


@gpu
def test_a_pooled_recurrent_cache_begins_empty(recurrent: Any, device: torch.device) -> None:
    """Steps that ran past the end of one call leave no trace in the next."""
    free = generate(recurrent, prompt(device))
    for last in (3, 20):
        found = generate(recurrent, prompt(device), eos_token_id=free[:, PROMPT + last].tolist())
        assert torch.equal(found[:, : PROMPT + 1], free[:, : PROMPT + 1])
        assert torch.equal(generate(recurrent, prompt(device)), free)
    assert len(recurrent.captured_steps()) == 1
    recurrent.free_captured_steps()
    assert recurrent.captured_steps() == []
