"""Speculative steps give the same output as sequential ones.

Steps are speculative where they are replayed from CUDA graphs; here speculation is turned on on the CPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.scripted_sampler import ScriptedSampler
from hf_efficient.modeling.decoder.cache_contract import restored
from hf_efficient.modeling.decoder.graph_capture import step_signature
from hf_efficient.modeling.topology.attention.topology_cache import TopologyCache
from hf_efficient.modeling.topology.generation.parallel_decoding import ParallelDecodeLoop
from hf_efficient.modeling.topology.generation.topology_session import TopologySession
from hf_efficient.modeling.topology.generation.topology_step import TopologyStep

EOS = 1
BLOCK = "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
SCRIPTS = {
    (0, ()): f"t{BLOCK}so it is</Conclusion></Parallel>end",
    (0, ((0, "1"),)): " the first path</Path>",
    (0, ((0, "2"),)): " v</Path>",
    (1, ()): "no block at all, and longer than the rest",
}


@pytest.fixture
def speculations(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Turns speculation on; for each speculative step, whether its assumptions held."""
    found: list[bool] = []
    speculation_holds = ParallelDecodeLoop.speculation_holds

    def watched(loop: ParallelDecodeLoop, speculative: Any) -> bool:
        found.append(speculation_holds(loop, speculative))
        return found[-1]

    monkeypatch.setattr(TopologySession, "can_speculate", lambda session: True)
    monkeypatch.setattr(ParallelDecodeLoop, "speculation_holds", watched)
    return found


def _run(model: Any, tokenizer: Any, ids: Tensor, **options: Any) -> Any:
    settings = {"parallel": True, "tokenizer": tokenizer, "max_new_tokens": 60, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    return model.generate(ids, **(settings | options))


def _same(first: Any, second: Any) -> None:
    for name in ("sequences", "segment_ids", "position_ids"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    for rows in zip(first.branch_info, second.branch_info, strict=True):
        for one, other in zip(*rows, strict=True):
            assert (one.path, one.finish_reason) == (other.path, other.finish_reason)
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-9, atol=1e-9)


def test_branches_and_joins_with_proposed_tokens(
    model_of: Callable, toy_tokenizer: Callable, speculations: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = model_of("multiverse"), toy_tokenizer("multiverse")
    ids = torch.tensor([tokenizer.encode("Q"), tokenizer.encode("R")])
    sampler = ScriptedSampler({key: tokenizer.encode(text) for key, text in SCRIPTS.items()}, after=EOS)
    speculative = _run(model, tokenizer, ids, sampler=sampler)
    assert True in speculations and False in speculations
    with monkeypatch.context() as patched:
        patched.setattr(TopologySession, "can_speculate", lambda session: False)
        sequential = _run(model, tokenizer, ids, sampler=sampler)
    _same(speculative, sequential)
    # Each failed speculation costs one forward pass.
    assert speculative.num_forward_passes == sequential.num_forward_passes + speculations.count(False)


def test_branches_speculate_with_tokens_on_the_device(
    model_of: Callable, toy_tokenizer: Callable, speculations: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parallel branches whose tokens the host does not know when the next step is dispatched."""
    model, tokenizer = model_of("multiverse"), toy_tokenizer("multiverse")
    ids = torch.tensor([tokenizer.encode(f"Q{BLOCK}"), tokenizer.encode(f"R{BLOCK}")])
    speculative = _run(model, tokenizer, ids, branch_max_new_tokens=9)
    assert speculations.count(True) > 8 and False in speculations
    with monkeypatch.context() as patched:
        patched.setattr(TopologySession, "can_speculate", lambda session: False)
        _same(speculative, _run(model, tokenizer, ids, branch_max_new_tokens=9))


@pytest.mark.parametrize("grammar", ["multiverse", "medverse"])
def test_random_prompts_limits_and_cache_sizes(
    grammar: str,
    model_of: Callable,
    toy_tokenizer: Callable,
    random_text: Callable,
    speculations: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random prompts that end where branches begin: ends, joins, queues and growth happen during speculative steps."""
    model, tokenizer, rng = model_of(grammar), toy_tokenizer(grammar), random.Random(7)
    model.lm_head.weight.data[list(tokenizer.token_ids.values())] *= 1.5  # so that tags are chosen now and then
    fork = {"multiverse": "</Goal>", "medverse": "</Plan>"}[grammar]
    monkeypatch.setattr(f"{TopologyCache.__module__}.round_capacity", lambda tokens: tokens + 3)
    monkeypatch.setattr(f"{ParallelDecodeLoop.__module__}.INITIAL_NEW_SLOTS", 4)
    for seed in range(8):
        prompts = [f"{random_text(grammar, seed + 50 * b, seed % 2 == 0).split(fork)[0]}{fork}" for b in range(3)]
        rows = [tokenizer.encode(prompt) for prompt in prompts[: rng.randint(1, 3)]]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        options = {
            "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
            "max_new_tokens": rng.choice((25, 50, 90)),
            "budget": rng.choice(("positions", "tokens")),
            "max_branches": rng.choice((1, 2, 32)),
            "min_fork_budget": 0,
            "branch_max_new_tokens": rng.choice((None, 5, 9)),
        }
        speculative = _run(model, tokenizer, ids, **options)
        with monkeypatch.context() as patched:
            patched.setattr(TopologySession, "can_speculate", lambda session: False)
            _same(speculative, _run(model, tokenizer, ids, **options))
    assert speculations.count(True) > 50 and speculations.count(False) > 5


def test_no_speculation_with_a_sampler_that_changes_tokens(
    model_of: Callable, toy_tokenizer: Callable, speculations: list[bool]
) -> None:
    class Stubborn(ScriptedSampler):
        def propose(self, branches: Any) -> None:
            return None

    model, tokenizer = model_of("multiverse"), toy_tokenizer("multiverse")
    scripts = {key: tokenizer.encode(text) for key, text in SCRIPTS.items() if key[0] == 0}
    output = _run(model, tokenizer, torch.tensor([tokenizer.encode("Q")]), sampler=Stubborn(scripts, after=EOS))
    assert speculations == [] and output.parallelism > 1
    sampled = _run(model, tokenizer, torch.tensor([tokenizer.encode("Q")]), do_sample=True, seed=3)
    assert speculations == [] and sampled.sequences.shape[1] > 1


def test_a_sampler_that_proposes_other_tokens_than_it_returns(
    model_of: Callable, toy_tokenizer: Callable, speculations: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of proposed tokens is dropped when other tokens are returned: it computed the wrong keys."""

    class Louder(ScriptedSampler):
        def finalize(self, branches: Any, tokens: list[int]) -> list[int]:
            replayed = super().finalize(branches, tokens)
            return [ord(chr(token - 16).upper()) + 16 if token > 100 else token for token in replayed]

    model, tokenizer = model_of("multiverse"), toy_tokenizer("multiverse")
    ids = torch.tensor([tokenizer.encode(f"Q{BLOCK}")])
    sampler = Louder({key: tokenizer.encode(text) for key, text in SCRIPTS.items()}, after=EOS)
    speculative = _run(model, tokenizer, ids, sampler=sampler)
    assert False in speculations
    with monkeypatch.context() as patched:
        patched.setattr(TopologySession, "can_speculate", lambda session: False)
        _same(speculative, _run(model, tokenizer, ids, sampler=sampler))


def test_a_step_without_memory_for_its_graph_reads_the_tokens_of_the_last_step(
    model_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capturing runs the step once, which must not overwrite the tokens that the step reads."""

    def record_and_fail(run: Callable[[], Tensor], device: torch.device, state: Sequence[Tensor]) -> None:
        with restored(state):
            run()
            raise torch.OutOfMemoryError("no room for a graph")

    def logits_of(session: TopologySession) -> Tensor:
        session._chosen[:2] = torch.tensor([70, 80])
        step = session.step_for(2, 2, 1, False)
        step.tokens[:] = torch.tensor([-1, -2])  # the two that the last step chose
        step.positions[:] = step.slots[:] = torch.tensor([0, 1])
        step.segment_visibility[:], step.kv_len[:] = 1, 2
        session.execute(step, model)
        return step.logits

    model = model_of("multiverse", torch.float32)
    with torch.no_grad():
        expected = logits_of(TopologySession(model, 1, 2))
        monkeypatch.setattr(f"{TopologySession.__module__}.can_capture_steps", lambda model: True)
        monkeypatch.setattr(f"{TopologyStep.__module__}.capture_graph", record_and_fail)
        session = TopologySession(model, 1, 2, step_signature(model))
        assert torch.equal(logits_of(session), expected) and not session.may_capture


def test_suppressed_tokens_are_suppressed_by_the_step_itself(
    model_of: Callable, toy_tokenizer: Callable, speculations: list[bool]
) -> None:
    """Every converted checkpoint has such tokens, and they must not turn speculation off."""
    model, tokenizer = model_of("multiverse"), toy_tokenizer("multiverse")
    ids = torch.tensor([tokenizer.encode(f"Q{BLOCK}")])
    free = _run(model, tokenizer, ids, branch_max_new_tokens=9)
    seen = [int(token) for token in free.sequences[0, ids.shape[1] :].unique() if token >= 16]
    speculations.clear()
    without = _run(model, tokenizer, ids, branch_max_new_tokens=9, suppress_tokens=seen)
    assert True in speculations
    assert not set(without.sequences[0, ids.shape[1] :].tolist()) & set(seen) - set(tokenizer.encode("\n12:"))
    speculations.clear()
    # The same with a custom logits processor, which needs the logits.
    processors = LogitsProcessorList([_Without(seen)])
    looked_at = _run(model, tokenizer, ids, branch_max_new_tokens=9, logits_processor=processors)
    assert speculations == []
    _same(without, looked_at)
    _same(free, _run(model, tokenizer, ids, branch_max_new_tokens=9))  # what was left out is back
    # Ids that the vocabulary does not have are no ids of it: neither an error nor, counted from behind, others.
    last = model.config.vocab_size - 1
    model.lm_head.weight.data[last] = 10 * model.lm_head.weight.data[int(free.sequences[0, -1])]
    chosen = _run(model, tokenizer, ids, branch_max_new_tokens=9)
    assert last in chosen.sequences
    _same(chosen, _run(model, tokenizer, ids, branch_max_new_tokens=9, suppress_tokens=[-1, last + 1]))


class _Without(LogitsProcessor):
    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(-1, torch.tensor(self.ids), float("-inf"))
