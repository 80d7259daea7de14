"""Options of parallel generation: sampling, logits processors, stopping criteria, streamers, outputs."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from benchmarks.scripted_sampler import ScriptedSampler
from hf_efficient.errors import UsageError
from hf_efficient.modeling.topology.generation import generation_topology
from hf_efficient.modeling.topology.generation.branches import Branch, BranchPath
from hf_efficient.modeling.topology.generation.sampling import (
    ProcessedSampler,
    branch_key,
    sample,
    uniform,
)
from hf_efficient.modeling.topology.generation.streaming import BranchStreamer

EOS = 1
BLOCK = "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
INNER = "<Parallel><Goal><Outline>2.1: c</Outline><Outline>2.2: d</Outline></Goal>"
PATHS: dict[str, BranchPath] = {"": (), "1": ((0, "1"),), "2": ((0, "2"),), "2.1": ((0, "2"), (0, "2.1"))}


# Sampling


def test_numbers_are_uniform_and_differ_between_branches_and_tokens() -> None:
    numbers = torch.tensor([uniform(branch_key(7, row, PATHS["1"]), i) for row in range(20) for i in range(200)])
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    assert numbers.unique().numel() == 4000
    counts = torch.histc(numbers, 20, 0, 1)
    assert float(((counts - 200) ** 2 / 200).sum()) < 45, "chi-square with 19 degrees of freedom, p = 0.0007"
    assert len({branch_key(seed, row, path) for seed in range(3) for row in range(3) for path in PATHS.values()}) == 36


def test_draws_follow_the_distribution_and_never_take_what_is_excluded() -> None:
    chances = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0])
    points = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    choice = sample(chances.log().expand(10000, -1), points)
    assert choice.tokens.bincount(minlength=6).tolist() == [0, 5000, 2000, 0, 3000, 0]
    torch.testing.assert_close(choice.logprobs, chances[choice.tokens].log())
    edges = sample(chances.log().expand(2, -1), torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert edges.tokens.tolist() == [1, 4]


def test_samples_do_not_depend_on_other_branches(generate: Callable) -> None:
    """For any number of active branches."""
    options = {"do_sample": True, "temperature": 1.3, "top_p": 0.95, "seed": 11}
    first = generate(**options)
    for limit in (1, 2):
        assert torch.equal(generate(**options, max_branches=limit).sequences, first.sequences)
    assert not torch.equal(generate(**(options | {"seed": 12})).sequences, first.sequences)


def test_samples_of_a_row_do_not_depend_on_its_neighbours(generate: Callable, tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer.encode(f"Q{BLOCK}")])
    other = torch.tensor([tokenizer.encode(f"R{BLOCK}")])
    options = {"do_sample": True, "seed": 5, "suppress_tokens": [*range(3, 15)]}
    alone = generate(ids, **options).sequences[0]
    together = generate(torch.cat((ids, other)), **options).sequences[0]
    assert torch.equal(together[: len(alone)], alone)


def test_several_samples_of_a_prompt_differ(generate: Callable) -> None:
    found = generate(do_sample=True, num_return_sequences=3, seed=1).sequences
    assert found.shape[0] == 3 and len({tuple(row.tolist()) for row in found}) == 3


def test_without_a_seed_pytorch_decides(generate: Callable) -> None:
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(generate(do_sample=True).sequences)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# Processors and criteria


class SeenIds(LogitsProcessor):
    """Remembers the ids that it is shown."""

    def __init__(self) -> None:
        self.ids: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.shape[0] == scores.shape[0] == 1
        self.ids.append(input_ids[0].tolist())
        return scores


def test_a_processor_sees_what_the_branch_sees(generate: Callable, tokenizer: Any) -> None:
    seen = SeenIds()
    generate(f"Q{BLOCK}", logits_processor=LogitsProcessorList([seen]), branch_max_new_tokens=2, max_new_tokens=30)
    texts = [tokenizer.decode(ids) for ids in seen.ids]
    trunk = f"Q{BLOCK}\n"
    first, second = (text for text in texts if text.endswith(":"))
    assert (first, second) == (f"{trunk}<Path>\n1:", f"{trunk}<Path>\n2:"), "not its sibling"
    conclusion = next(text for text in texts if text.endswith("<Conclusion>\n"))
    assert conclusion.count("</Path>\n") == 2 and conclusion.startswith(f"{trunk}<Path>\n1:")


def test_processors_act_on_each_branch_by_itself(generate: Callable) -> None:
    """A penalty on repetitions in one branch does not depend on the other."""
    options = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "suppress_tokens": [*range(3, 15)]}
    assert torch.equal(generate(**options).sequences, generate(**options, max_branches=1).sequences)


class Ends(StoppingCriteria):
    """Holds for texts that end with these ids."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([row.tolist()[-len(self.ids) :] == self.ids for row in input_ids])


@pytest.mark.parametrize("by", ["criterion", "string"])
def test_a_criterion_ends_its_branch_alone(
    generate: Callable, tokenizer: Any, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {PATHS["1"]: " ab ! cd</Path>", PATHS["2"]: " efgh</Path>", (): "so!so"}
    sampler = ScriptedSampler({(0, path): tokenizer.encode(text) for path, text in texts.items()}, after=EOS)
    criterion = Ends(tokenizer.encode("!"))
    options: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([criterion])}
    if by == "string":
        module = "hf_efficient.modeling.topology.generation.generation_topology.StopStringCriteria"
        # The toy tokenizer is none of transformers'.
        monkeypatch.setattr(module, lambda tokenizer, strings: Ends(tokenizer.encode(strings)))
        options = {"stop_strings": "!"}
    found = generate(f"Q{BLOCK}", sampler=sampler, **options)
    text = tokenizer.decode(found.sequences[0])
    assert text == f"Q{BLOCK}\n<Path>\n1: ab !</Path>\n<Path>\n2: efgh</Path>\n<Conclusion>\nso!"
    assert [info.finish_reason for info in found.branch_info[0]] == [*("stopping_criteria",) * 2, ""]
    assert [info.truncated for info in found.branch_info[0]] == [False, True, False]


def test_the_clock_ends_everything(generate: Callable, tokenizer: Any) -> None:
    found = generate(f"Q{BLOCK}", max_time=0.0, sampler=ScriptedSampler({}, after=tokenizer.encode("x")[0]))
    assert {info.finish_reason for info in found.branch_info[0]} == {"max_time"}
    assert tokenizer.decode(found.sequences[0]).endswith("</Path>\n<Conclusion>\n")


def test_constrained_paths_hold_nothing_that_breaks_them(model: Any, tokenizer: Any) -> None:
    """With all tags as likely as not: without the constraint they do."""
    loud = copy.deepcopy(model)
    with torch.no_grad():
        loud.lm_head.weight[3:15] *= 4
        loud.lm_head.weight[EOS] *= 4
    ids = torch.tensor([tokenizer.encode(f"Q{BLOCK}")])
    ends: dict[bool, set[str]] = {True: set(), False: set()}
    for constrain in (True, False):
        for seed in range(6):
            found = loud.generate(
                ids, parallel=True, tokenizer=tokenizer, do_sample=True, seed=seed, constrain=constrain,
                max_new_tokens=80, return_dict_in_generate=True,
            )  # fmt: skip
            ends[constrain] |= {info.finish_reason for info in found.branch_info[0] if info.path}
    assert ends[True] <= {"", "length"}
    assert ends[False] - {"", "length"}


# Streams


def test_a_branch_streamer_gets_every_token_with_its_branch(
    generate: Callable, tokenizer: Any, nested: Callable
) -> None:
    streamer = BranchStreamer()
    found = generate("Question", sampler=nested(), streamer=streamer, max_new_tokens=200)
    text: dict[BranchPath, str] = {}
    for row, path, token in streamer.events:
        assert row == 0
        text[path] = text.get(path, "") + tokenizer.decode([token])
    assert text[PATHS["1"]] == "<Path>\n1: first</Path>\n"
    assert text[PATHS["2"]] == f"<Path>\n2: v{INNER}\n<Conclusion>\ninner</Conclusion></Parallel>y</Path>\n"
    assert len(streamer.events) == found.generated_tokens[0]
    both = [path for _, path, _ in streamer.events]
    assert both.index(PATHS["2"]) < len(both) - 1 - both[::-1].index(PATHS["1"]), "as they come"


class Lines(BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended = True


def test_a_plain_streamer_gets_the_text_in_its_order(generate: Callable, nested: Callable) -> None:
    streamer = Lines()
    found = generate("Question", sampler=nested(), streamer=streamer, max_new_tokens=200)
    assert sum(streamer.parts, []) == found.sequences[0].tolist()
    assert len(streamer.parts[0]) == len("Question") and all(len(part) == 1 for part in streamer.parts[1:])
    assert streamer.ended


def test_a_plain_streamer_takes_one_row(generate: Callable, tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer.encode("Q")] * 2)
    with pytest.raises((UsageError, ValueError), match="one sequence|batch size 1"):
        generate(ids, streamer=Lines())


# What it gives


def test_without_a_dictionary_the_sequences_come_alone(generate: Callable, nested: Callable) -> None:
    found = generate("Question", sampler=nested(), max_new_tokens=200)
    alone = generate("Question", sampler=nested(), max_new_tokens=200, return_dict_in_generate=False)
    assert torch.equal(alone, found.sequences)


def test_branches_are_reported(generate: Callable, nested: Callable) -> None:
    found = generate("Question", sampler=nested(), max_new_tokens=200)
    info = found.branch_info[0]
    assert [branch.path for branch in info] == [(), PATHS["1"], PATHS["2"], PATHS["2.1"], ((0, "2"), (0, "2.2"))]
    assert sum(branch.num_tokens for branch in info) == found.generated_tokens[0]
    assert info[0].finish_reason == "eos" and all(
        branch.state == "done" and not branch.finish_reason for branch in info[1:]
    )
    assert all(not branch.logprobs for branch in info)


def test_rows_that_end_early_are_padded_on_the_right(generate: Callable, tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer.encode("QQ"), tokenizer.encode("RR")])
    scripts = {(0, ()): [*tokenizer.encode("ab"), EOS], (1, ()): [*tokenizer.encode("abcdef"), EOS]}
    found = generate(ids, sampler=ScriptedSampler(scripts))
    assert found.sequences[0].tolist() == [*tokenizer.encode("QQab"), EOS, 0, 0, 0, 0]
    assert found.segment_ids[0].tolist() == [0] * 5 + [-1] * 4


def test_generation_leaves_the_model_as_it_was(generate: Callable, model: Any) -> None:
    before = model.generation_config.to_dict()
    generate(do_sample=True, max_new_tokens=5)
    assert model.generation_config.to_dict() == before
    assert model.captured_steps() == []
    model.free_captured_steps()


# Other options


def test_autocast_generates_what_a_model_of_that_type_nearly_would(
    model: Any, tokenizer: Any, nested: Callable
) -> None:
    """Keys come in float32 there and values in bfloat16."""
    ids = torch.tensor([tokenizer.encode("Q")])
    settings = {"parallel": True, "tokenizer": tokenizer, "max_new_tokens": 90, "do_sample": False}
    found = []
    for cast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            output = model.generate(
                ids, **settings, sampler=nested(), return_dict_in_generate=True, output_scores=True
            )  # fmt: skip
        found.append([logprob for branch in output.branch_info[0] for logprob in branch.logprobs])
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), atol=0.5, rtol=0)
    assert found[1] != found[0]


def test_what_a_branch_sees_has_one_order_whatever_the_schedule(generate: Callable, tokenizer: Any) -> None:
    """A block inside the first path, with the second path started or not."""
    texts = {
        (): f"t{BLOCK}so</Conclusion></Parallel>end",
        PATHS["1"]: f" v{INNER}inner</Conclusion></Parallel>y</Path>",
        ((0, "1"), (0, "2.1")): "p</Path>",
        ((0, "1"), (0, "2.2")): "qqqqqq</Path>",
        PATHS["2"]: " second</Path>",
    }
    seen: list[dict[Any, list[int]]] = []

    class Watching(ScriptedSampler):
        needs_logits = True

        def choose(self, branches: Any, logits: Tensor) -> Any:
            seen[-1] |= {(branch.path, branch.num_sampled_tokens): branch.visible_ids() for branch in branches}
            return super().choose(branches, logits)

    for most in (32, 1):
        seen.append({})
        scripts = {(0, path): tokenizer.encode(text) for path, text in texts.items()}
        generate("Q", sampler=Watching(scripts, after=EOS), max_branches=most, max_new_tokens=200)
    assert seen[0] == seen[1] and len(seen[0]) > 60


@pytest.mark.parametrize("given", ["keyword", "configuration", "model"])
def test_stop_strings_end_a_text_wherever_they_are_given(
    given: str, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_topology, "StopStringCriteria", lambda tokenizer, strings: After(strings))
    config = GenerationConfig(do_sample=False, max_new_tokens=20, pad_token_id=0, suppress_tokens=[EOS])
    options = {}
    if given == "keyword":
        options["stop_strings"] = [4]
    else:
        target = config if given == "configuration" else model.generation_config
        monkeypatch.setattr(target, "stop_strings", [4])
    output = model.generate(torch.tensor([[20, 21]]), config, parallel=True, tokenizer=tokenizer, **options)
    assert output.shape[1] == 6


class After(StoppingCriteria):
    """Stands for stop strings: ends a text some tokens after its prompt."""

    def __init__(self, strings: list[int]) -> None:
        self.length = 2 + strings[0]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([input_ids.shape[1] >= self.length])


def test_a_generation_config_is_honoured(model: Any, tokenizer: Any) -> None:
    config = GenerationConfig(max_new_tokens=7, do_sample=False, suppress_tokens=[EOS], pad_token_id=0)
    ids = torch.tensor([[20, 21]])
    assert model.generate(ids, config, parallel=True, tokenizer=tokenizer).shape[1] == 9


def test_processors_are_not_asked_where_a_sampler_is_given(generate: Callable, nested: Callable) -> None:
    seen = SeenIds()
    generate("Question", sampler=nested(), logits_processor=LogitsProcessorList([seen]), max_new_tokens=100)
    assert not seen.ids


def test_a_sampler_draws_the_same_for_a_branch_in_any_company() -> None:
    """The number belongs to row, branch and index, not to the place among those that are asked together."""

    class Stub:
        builder = None

        def __init__(self, row: int, path: BranchPath, sampled: int) -> None:
            self.row, self.path, self.num_sampled_tokens = row, path, sampled
            self.rng_key, self.context = None, "branch"

    rng = random.Random(0)
    stubs: list[Branch] = [Stub(row, path, i) for row in range(2) for path in PATHS.values() for i in range(3)]  # type: ignore
    scores = {id(stub): torch.randn(20) for stub in stubs}
    together = ProcessedSampler(LogitsProcessorList(), True, 3)
    alone = {id(s): int(together.choose([s], scores[id(s)][None]).tokens) for s in stubs}
    rng.shuffle(stubs)
    found = together.choose(stubs, torch.stack([scores[id(s)] for s in stubs])).tokens.tolist()
    assert found == [alone[id(s)] for s in stubs]
