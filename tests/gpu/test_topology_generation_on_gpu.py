"""Parallel generation with captured steps: what the called ones give, and what the CPU gives.

Without a GPU a few of these run in Triton's interpreter, where a step is called instead of captured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.scripted_sampler import ScriptedSampler
from hf_efficient.modeling.medverse.modeling_medverse import MedVerseConfig, MedVerseForCausalLM
from hf_efficient.modeling.multiverse.modeling_multiverse import MultiverseConfig, MultiverseForCausalLM
from hf_efficient.modeling.topology.generation import parallel_decoding, topology_session, topology_step
from hf_efficient.modeling.topology.generation.branches import BranchPath
from hf_efficient.modeling.topology.generation.generation_topology import TopologyGenerateOutput
from hf_efficient.modeling.topology.grammar.control_tokens import CONTROL_TOKENS

EOS = 1
SHAPE: dict[str, Any] = {
    "vocab_size": 150,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
BLOCK = "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
INNER = "<Parallel><Goal><Outline>2.1: c</Outline><Outline>2.2: d</Outline></Goal>"
PLAN = (
    "<Plan><Outline> Transient Step 1: A -> B; Dependency: [] </Outline>"
    "<Outline> Transient Step 2: B -> C; Dependency: [1] </Outline>"
    "<Outline> Transient Step 3: A -> D; Dependency: [] </Outline></Plan>"
)
gpu = pytest.mark.gpu


class Characters:
    """A tokenizer with one id for each tag and each character."""

    def __init__(self, grammar: str) -> None:
        self.token_ids = {tag: 3 + i for i, tag in enumerate(CONTROL_TOKENS[grammar])}
        self._tags = {token_id: tag for tag, token_id in self.token_ids.items()}
        self._split = re.compile("(" + "|".join(map(re.escape, self.token_ids)) + ")")

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            ids += [self.token_ids[part]] if part in self.token_ids else [16 + ord(letter) for letter in part]
        return ids

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(self._tags.get(int(i)) or (chr(int(i) - 16) if i > 15 else "") for i in ids)


def build(grammar: str, device: torch.device, dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[Any, Any]:
    """A model with wide random weights, the same on every device; and its tokenizer."""
    tokenizer = Characters(grammar)
    config, model = {
        "multiverse": (MultiverseConfig, MultiverseForCausalLM),
        "medverse": (MedVerseConfig, MedVerseForCausalLM),
    }[grammar]
    torch.manual_seed(0)
    made = model(config(**(SHAPE | fields), topology={"token_ids": tokenizer.token_ids}))
    return made.to(device, dtype).eval(), tokenizer


def prompts(tokenizer: Characters, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    rows = [tokenizer.encode(text) for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": (ids != 0).long().to(device)}


class Guided(ScriptedSampler):
    """A script in which ~ means the model's own choice, so that the text shows whether the model is right."""

    own = 16 + ord("~")

    def finalize(self, branches: Sequence[Any], tokens: list[int]) -> list[int]:
        scripted = super().finalize(branches, tokens)
        text = [token if token > 15 else 16 + token for token in tokens]  # no tags
        return [mine if want == self.own else want for want, mine in zip(scripted, text, strict=True)]

    def propose(self, branches: Sequence[Any]) -> list[int] | None:
        scripted = super().propose(branches)
        return None if scripted is None or self.own in scripted else scripted


def guide(tokenizer: Characters, rows: int, texts: dict[BranchPath, str]) -> Guided:
    return Guided(
        {(row, path): tokenizer.encode(text) for row in range(rows) for path, text in texts.items()}, after=EOS
    )


NESTED: dict[BranchPath, str] = {
    (): f"~~~{BLOCK}~~~~</Conclusion></Parallel>~~~~~~~~",
    ((0, "1"),): "~" * 15 + "</Path>",
    ((0, "2"),): f"~~~~~{INNER}~~~~~~</Conclusion></Parallel>~~~</Path>",
    ((0, "2"), (0, "2.1")): "~~~~~</Path>",
    ((0, "2"), (0, "2.2")): "~~~~~~~~~~</Path>",
}
STEPS: dict[BranchPath, str] = {
    (): f"~~{PLAN}~~~~</Conclusion>~~~~",
    ((0, "1"),): "~~~</Step>",
    ((0, "2"),): "~~~~~~~</Step>",
    ((0, "3"),): "~~~~~~~~~~~~~</Step>",
}


def generate(model: Any, tokenizer: Any, inputs: dict[str, Tensor], **options: Any) -> TopologyGenerateOutput:
    settings = {"parallel": True, "max_new_tokens": 300, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(**inputs, tokenizer=tokenizer, **(settings | options))


def forks(tokenizer: Characters, rows: int, grammar: str) -> ScriptedSampler:
    return guide(tokenizer, rows, NESTED if grammar == "multiverse" else STEPS)


@pytest.mark.parametrize("grammar", ["multiverse", "medverse"])
def test_tokens_are_those_of_the_cpu(grammar: str, device: torch.device) -> None:
    model, tokenizer = build(grammar, device)
    found = generate(model, tokenizer, prompts(tokenizer, ["Q"], device), sampler=forks(tokenizer, 1, grammar))
    model, tokenizer = build(grammar, torch.device("cpu"))
    model.set_attn_implementation("sdpa")
    inputs = prompts(tokenizer, ["Q"], torch.device("cpu"))
    expected = generate(model, tokenizer, inputs, sampler=forks(tokenizer, 1, grammar))
    assert torch.equal(found.sequences.cpu(), expected.sequences)
    assert found.parents == expected.parents
    assert len(found.parents[0]) == (7 if grammar == "multiverse" else 5)


@gpu
@pytest.mark.parametrize("grammar", ["multiverse", "medverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_captured_steps_are_the_called_ones_bit_for_bit(
    grammar: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and log-probabilities, over forks, joins, several widths of the step, and three rows."""
    model, tokenizer = build(grammar, device, dtype, qk_norm=True)
    inputs = prompts(tokenizer, ["Question", "Q?", "A longer question"], device)
    options: dict[str, Any] = {"output_scores": True}
    captured = generate(model, tokenizer, inputs, sampler=forks(tokenizer, 3, grammar), **options)
    assert model.captured_steps(), "steps were captured"
    again = generate(model, tokenizer, inputs, sampler=forks(tokenizer, 3, grammar), **options)
    model.free_captured_steps()
    monkeypatch.setattr(topology_session, "can_capture_steps", lambda model: False)
    called = generate(model, tokenizer, inputs, sampler=forks(tokenizer, 3, grammar), **options)
    assert not model.captured_steps()
    for other in (again, called):
        assert torch.equal(captured.sequences, other.sequences)
        assert captured.branch_info == other.branch_info


@gpu
def test_speculative_steps_give_what_sequential_steps_do(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parallel branches that continue with tokens which the host does not know, in two sequences."""
    model, tokenizer = build("multiverse", device, torch.bfloat16)
    inputs = prompts(tokenizer, [f"Q{BLOCK}", f"A longer one{BLOCK}"], device)
    options: dict[str, Any] = {"branch_max_new_tokens": 200, "output_scores": True}
    for _ in range(3):  # the first captures its steps
        speculative = generate(model, tokenizer, inputs, **options)
    with monkeypatch.context() as patched:
        patched.setattr(topology_session.TopologySession, "can_speculate", lambda session: False)
        waited = generate(model, tokenizer, inputs, **options)
    assert torch.equal(speculative.sequences, waited.sequences) and speculative.branch_info == waited.branch_info
    assert speculative.num_forward_passes > waited.num_forward_passes, "some speculations failed"


@gpu
def test_rows_do_not_change_each_other(device: torch.device) -> None:
    model, tokenizer = build("multiverse", device)
    texts = ["Question", f"Q {BLOCK}", "A longer question than the others?"]
    batch = generate(model, tokenizer, prompts(tokenizer, texts, device), sampler=forks(tokenizer, 3, "multiverse"))
    for b, text in enumerate(texts):
        inputs = prompts(tokenizer, [text], device)
        alone = generate(model, tokenizer, inputs, sampler=forks(tokenizer, 1, "multiverse"))
        assert torch.equal(batch.sequences[b][batch.segment_ids[b] >= 0], alone.sequences[0])


@gpu
def test_a_cache_that_grows_goes_on(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = build("multiverse", device)
    texts: dict[BranchPath, str] = {
        (): f"{BLOCK}~~",
        ((0, "1"),): "~" * 400 + "</Path>",
        ((0, "2"),): "~" * 700 + "</Path>",
    }
    inputs = prompts(tokenizer, ["Q"], device)
    wide = generate(model, tokenizer, inputs, sampler=guide(tokenizer, 1, texts), max_new_tokens=1000)
    model.free_captured_steps()
    monkeypatch.setattr(parallel_decoding, "INITIAL_NEW_SLOTS", 1)
    grown = generate(model, tokenizer, inputs, sampler=guide(tokenizer, 1, texts), max_new_tokens=1000)
    assert torch.equal(wide.sequences, grown.sequences)
    assert wide.generated_tokens[0] > 1000


@gpu
def test_few_steps_are_captured_and_their_memory_is_given_back(device: torch.device) -> None:
    model, tokenizer = build("multiverse", device)
    inputs = prompts(tokenizer, ["Q"], device)
    generate(model, tokenizer, inputs, sampler=forks(tokenizer, 1, "multiverse"))
    count = len(model.captured_steps())
    assert 1 < count <= 7, "one for each power of two of queries"
    held = torch.cuda.memory_allocated()
    for _ in range(5):
        generate(model, tokenizer, inputs, sampler=forks(tokenizer, 1, "multiverse"))
    assert len(model.captured_steps()) == count
    assert torch.cuda.memory_allocated() <= held
    before = torch.cuda.memory_allocated()
    model.free_captured_steps()
    assert model.captured_steps() == [] and torch.cuda.memory_allocated() < before


@gpu
def test_changed_weights_are_seen(device: torch.device) -> None:
    """Weights that moved, and a hook: a captured step of the old model is not replayed."""
    model, tokenizer = build("multiverse", device)
    inputs = prompts(tokenizer, [f"Q{BLOCK}"], device)
    first = generate(model, tokenizer, inputs, max_new_tokens=60)
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
    second = generate(model, tokenizer, inputs, max_new_tokens=60)
    assert not torch.equal(first.sequences, second.sequences)
    calls: list[int] = []
    handle = model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    third = generate(model, tokenizer, inputs, max_new_tokens=60)
    handle.remove()
    assert torch.equal(third.sequences, second.sequences)
    assert len(calls) == third.num_forward_passes


@gpu
def test_a_graph_that_does_not_fit_leaves_its_steps_to_calls(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = build("multiverse", device)
    inputs = prompts(tokenizer, ["Q"], device)
    expected = generate(model, tokenizer, inputs, sampler=forks(tokenizer, 1, "multiverse"))
    model.free_captured_steps()

    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room for a graph")

    monkeypatch.setattr(topology_step, "capture_graph", out_of_memory)
    found = generate(model, tokenizer, inputs, sampler=forks(tokenizer, 1, "multiverse"))
    assert torch.equal(found.sequences, expected.sequences)
    assert not model.captured_steps()


@gpu
def test_samples_are_those_of_any_company(device: torch.device) -> None:
    model, tokenizer = build("multiverse", device)
    inputs = prompts(tokenizer, [f"Q{BLOCK}"], device)
    options = {"do_sample": True, "seed": 3, "top_p": 0.9, "max_new_tokens": 80}
    wide = generate(model, tokenizer, inputs, **options)
    assert torch.equal(wide.sequences, generate(model, tokenizer, inputs, **options, max_branches=1).sequences)


@gpu
def test_plain_text_is_that_of_plain_generation(device: torch.device) -> None:
    model, tokenizer = build("multiverse", device)
    inputs = prompts(tokenizer, ["A question", "Q?"], device)
    settings = {"max_new_tokens": 60, "do_sample": False, "suppress_tokens": list(range(3, 16))}
    plain = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, parallel=True, tokenizer=tokenizer), plain)


@gpu
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_gives_the_same_tokens(implementation: str, device: torch.device) -> None:
    model, tokenizer = build("multiverse", device)
    inputs = prompts(tokenizer, ["Question", "Q?"], device)
    expected = generate(model, tokenizer, inputs, sampler=forks(tokenizer, 2, "multiverse"))
    model.set_attn_implementation(implementation)
    found = generate(model, tokenizer, inputs, sampler=forks(tokenizer, 2, "multiverse"))
    assert torch.equal(found.sequences, expected.sequences)
