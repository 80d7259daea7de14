"""Generation with recurrent state: tokens computed past the end do not change a cache that cannot be truncated.

On the CPU the steps of the loop are called, not captured; a stand-in for the graph runs them again when it is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from hf_efficient.errors import HFEError
from hf_efficient.modeling.decoder import decode_step
from hf_efficient.modeling.decoder.cache_compat import CACHE_ARGUMENT
from hf_efficient.modeling.decoder.cache_contract import StateSnapshot, restored
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig
from hf_efficient.modeling.decoder.decode_cache import DecodeCache, as_capturable, require_capturable
from hf_efficient.modeling.decoder.decode_step import DecodeStep
from hf_efficient.modeling.decoder.graph_capture import step_signature
from hf_efficient.modeling.topology.attention.topology_cache import TopologyCache
from tiny_shapes import TINY

SHAPE: dict[str, Any] = TINY | {"num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.2}
PROMPT, NEW = 5, 20


@pytest.fixture
def model(recurrent_model: ModuleType) -> Any:
    return recurrent_model.RecurrentForCausalLM(DecoderConfig(**SHAPE, eos_token_id=None)).eval()


def prompt(rows: int = 3, length: int = PROMPT) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    settings = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, **settings)


@torch.no_grad()
def greedy_without_cache(model: Any, ids: Tensor, new: int) -> Tensor:
    for _ in range(new):
        ids = torch.cat((ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids


@torch.no_grad()
def states_after(model: Any, ids: Tensor) -> Tensor:
    """The recurrent state after these tokens, computed in one forward."""
    cache = model.build_cache(len(ids), ids.shape[1])
    model(ids, past_key_values=cache)
    return cache.states


def test_the_cache_continues_a_text_in_both_loops(model: Any, served_by_the_loop: list[Any]) -> None:
    expected = greedy_without_cache(model, prompt(), NEW)
    assert torch.equal(generate(model, prompt()), expected)
    assert len(served_by_the_loop) == 1
    assert torch.equal(generate(model, prompt(), disable_compile=True), expected)
    assert torch.equal(generate(model, prompt(), use_cache=False), expected)
    assert len(served_by_the_loop) == 1


@pytest.mark.parametrize(("last", "sequences"), [(0, 3), (7, 3), (8, 3), (16, 3), (18, 3), (9, 1)])
def test_no_token_past_the_end_enters_a_kept_state(
    last: int, sequences: int, model: Any, served_by_the_loop: list[Any]
) -> None:
    """Sequences end one by one; the state is the one after the last token that was fed, for a second turn too."""
    rows = prompt(sequences)
    free = generate(model, rows, disable_compile=True)
    ends = [int(free[row, PROMPT + max(last - 5 * row, 0)]) for row in range(sequences)]
    expected = generate(model, rows, eos_token_id=ends, disable_compile=True)
    found = generate(model, rows, eos_token_id=ends, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    assert len(served_by_the_loop) == 1
    cache = getattr(found, CACHE_ARGUMENT)
    assert int(cache.get_seq_length()) == expected.shape[1] - 1
    assert torch.allclose(cache.states, states_after(model, expected[:, :-1]), rtol=1e-5, atol=1e-6)
    longer = torch.cat((found.sequences, prompt(len(rows), 4)), 1)
    second = generate(model, longer, past_key_values=cache, max_new_tokens=5, return_dict_in_generate=True)
    assert torch.equal(second.sequences, generate(model, longer, max_new_tokens=5, disable_compile=True))
    assert len(served_by_the_loop) == 2 and getattr(second, CACHE_ARGUMENT) is cache


class Replayed:
    """Stands in for a CUDA graph: it runs the step again, into the same result."""

    def __init__(self, run: Callable[[], Tensor], result: Tensor) -> None:
        self.run, self.result = run, result

    def replay(self) -> None:
        self.result.copy_(self.run())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(run: Callable[[], Tensor], device: torch.device, state: Sequence[Tensor]) -> tuple[Any, Tensor, int]:
        with restored(state):
            result = run().clone()
        return Replayed(run, result), result, 0

    monkeypatch.setattr(decode_step, "capture_graph", record)


@pytest.mark.usefixtures("recorded")
def test_the_warm_up_of_a_capture_leaves_cache_and_step_as_they_were(model: Any) -> None:
    ids, logits = prompt(), []
    with torch.no_grad():
        for captured in (False, True):
            cache = model.build_cache(3, 64)
            model(ids, past_key_values=cache)
            step = DecodeStep(cache, {"full_attention"}, padded=False)
            step.reset(PROMPT, torch.full((3,), PROMPT), None)
            before = [tensor.clone() for tensor in (*cache.state_tensors(), step.positions, step.mask)]
            if captured:
                signature = step_signature(model)
                assert signature is not None
                step.capture(model, cache, signature)
                for tensor, value in zip((*cache.state_tensors(), step.positions, step.mask), before, strict=True):
                    assert torch.equal(tensor, value)
            for token in range(5):
                step.tokens.fill_(3 + token)
                logits.append((step.replay() if captured else step.run(model, cache)).clone())
    assert torch.equal(torch.stack(logits[:5]), torch.stack(logits[5:]))


def test_a_failed_warm_up_leaves_the_state_as_it_was() -> None:
    state = [torch.arange(4.0), torch.zeros(2, dtype=torch.long)]
    with pytest.raises(torch.OutOfMemoryError), restored(state):
        state[0].mul_(2)
        state[1].add_(1)
        raise torch.OutOfMemoryError
    assert state[0].tolist() == [0, 1, 2, 3] and state[1].tolist() == [0, 0]


def test_a_snapshot_is_saved_again_in_the_same_memory() -> None:
    tensor = torch.zeros(3)
    snapshot = StateSnapshot([tensor])
    for value in (1.0, 2.0):
        tensor.fill_(value)
        snapshot.save()
        tensor.fill_(-1)
        snapshot.restore()
        assert tensor.tolist() == [value] * 3


def test_which_caches_can_be_truncated(model: Any) -> None:
    cache = model.build_cache(2, 16)
    assert not cache.can_truncate
    with pytest.raises(HFEError, match="recurrent state, from which tokens cannot be removed"):
        cache.truncate(3)
    plain = DecodeCache(model.config, 2, 16, torch.float32, torch.device("cpu"))
    plain.layers[0].cumulative_length.fill_(9)
    plain.truncate(3)
    assert plain.can_truncate and plain.get_seq_length() == 3
    assert plain.nbytes() > 0 and plain.addresses() == plain.addresses()
    branches = TopologyCache(2, 1, 16, torch.device("cpu"))
    branches.segments[0, :6] = 2
    branches.truncate(4)
    assert branches.segments[0, :8].tolist() == [2] * 4 + [-1] * 4 and branches.can_truncate
    assert branches.memory()[0] is branches.segments and branches.state_tensors() == []


def test_which_caches_of_transformers_are_capturable(model: Any) -> None:
    static = StaticCache(config=model.config, max_cache_len=16)
    capturable = require_capturable(static)
    assert capturable.capacity == 16 and not as_capturable(DynamicCache(config=model.config))
    with pytest.raises(HFEError, match="fixed size, here 16 slots"):
        capturable.ensure_capacity(20)
    with pytest.raises(HFEError, match="CUDA graphs does not support a DynamicCache"):
        require_capturable(DynamicCache(config=model.config))
    windowed = DecoderConfig(**SHAPE, sliding_window=4)
    assert as_capturable(StaticCache(config=windowed, max_cache_len=16)) is None


def test_only_a_cache_of_the_models_class_is_continued_in_the_loop(
    model: Any, served_by_the_loop: list[Any], recurrent_model: ModuleType
) -> None:
    """Another class has no place for the state: transformers' loop gets it, and the model fails or works with it."""
    static = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
    with pytest.raises(AttributeError, match="states"):
        generate(model, prompt(), past_key_values=static)
    assert served_by_the_loop == []
    own = recurrent_model.StateCache(model.config, 3, 16, torch.float32, torch.device("cpu"))
    expected = greedy_without_cache(model, prompt(), NEW)
    assert torch.equal(generate(model, prompt(), past_key_values=own), expected), "it grows"
    assert len(served_by_the_loop) == 1


def test_beams_carry_their_own_state(model: Any) -> None:
    settings: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # with the initial weights the beams keep their order
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    found = model.generate(prompt(), **settings)
    assert torch.equal(found, model.generate(prompt(), use_cache=False, **settings))


def test_a_recurrent_cache_repeats_and_selects_sequences(model: Any) -> None:
    cache = model.build_cache(3, 256)
    with torch.no_grad():
        model(prompt(), **{CACHE_ARGUMENT: cache})
    before = cache.states.clone()
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6 and torch.equal(cache.states, before.repeat_interleave(2, dim=1))
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert cache.batch_size == 2 and torch.equal(cache.states, before[:, [2, 0]])
