"""Parallel generation against its definitions: one pass over the whole text, branches as rows, stock `generate`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.scripted_sampler import ScriptedSampler
from hf_efficient.modeling.efficient_decoder.modeling_efficient_decoder import (
    EfficientDecoderConfig,
    EfficientDecoderForCausalLM,
)
from hf_efficient.modeling.topology.attention.topology_mask import TopologyMask
from hf_efficient.modeling.topology.generation import parallel_decoding
from hf_efficient.modeling.topology.generation.branches import Branch, slots_in_text_order
from hf_efficient.modeling.topology.generation.generation_topology import TopologyGenerateOutput, parallel_generate
from hf_efficient.modeling.topology.generation.sampling import Choice, Sampler, most_likely
from hf_efficient.modeling.topology.grammar.topology import Topology

EOS = 1
BLOCK = "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
INNER = "<Parallel><Goal><Outline>2.1: c</Outline><Outline>2.2: d</Outline></Goal>"
PLAN = (
    "<Plan><Outline> Transient Step 1: A -> B; Dependency: [] </Outline>"
    "<Outline> Transient Step 2: B -> C; Dependency: [1] </Outline>"
    "<Outline> Transient Step 3: A -> D; Dependency: [] </Outline>"
    "<Outline> Transient Step 4: C, D -> E; Dependency: [2, 3] </Outline></Plan>"
)


@pytest.fixture(scope="module")
def stock_of(small_shape: dict[str, Any]) -> Callable[..., Any]:
    """A stock model with the weights of ours."""
    kinds = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }

    def make(family: str = "llama", dtype: torch.dtype = torch.float64) -> Any:
        config, model = kinds[family]
        torch.manual_seed(0)
        return model(config(**small_shape)).to(dtype).eval()

    return make


class Recorder(Sampler):
    """A sampler that calls a function of branch and logits, and stores the logits of every token."""

    needs_logits = True

    def __init__(self, choose: Callable[[Branch, Tensor], int]) -> None:
        self.seen: list[tuple[Branch, int, Tensor]] = []
        self._choose = choose

    def choose(self, branches: Sequence[Branch], logits: Tensor) -> Choice:
        found = []
        for branch, scores in zip(branches, logits, strict=True):
            self.seen.append((branch, branch.last_slot, scores.clone()))
            found.append(self._choose(branch, scores))
        tokens = torch.tensor(found)
        return Choice(tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def scripted(vocabulary: Any, scripts: dict[tuple[str, ...], str]) -> Callable[[Branch, Tensor], int]:
    """A script of what each branch samples, by its labels; after it EOS."""

    def choose(branch: Branch, scores: Tensor) -> int:
        script = vocabulary.encode(scripts.get(tuple(label for _, label in branch.path), ""))
        return script[branch.num_sampled_tokens] if branch.num_sampled_tokens < len(script) else EOS

    return choose


def chatty(vocabulary: Any, seed: int) -> Callable[[Branch, Tensor], int]:
    """Random control tokens and text, with forks among them."""
    rng = random.Random(seed)
    multiverse = vocabulary.grammar == "multiverse"
    pieces = [BLOCK, INNER, "</Path>", "</Conclusion></Parallel>"] if multiverse else [PLAN, PLAN, "</Step>", "</Step>"]
    pieces += [*vocabulary.token_ids, *["x", "yy", "1: z\n"] * 5]
    waiting: dict[int, list[int]] = {}

    def choose(branch: Branch, scores: Tensor) -> int:
        ids = waiting.setdefault(id(branch), [])
        if not ids:
            ids += vocabulary.encode(rng.choice(pieces))
        return ids.pop(0)

    return choose


def prompts(vocabulary: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Rows of ids, padded on the left, and their mask."""
    rows = [vocabulary.encode(text) for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, tokenizer: Any, inputs: Any, **options: Any) -> TopologyGenerateOutput:
    given = inputs if isinstance(inputs, dict) else {"inputs": inputs}
    settings = {"parallel": True, "max_new_tokens": 150, "do_sample": False, "return_dict_in_generate": True} | options
    return model.generate(**given, tokenizer=tokenizer, **settings)


@torch.no_grad()
def one_pass(model: PreTrainedModel, output: TopologyGenerateOutput) -> Tensor:
    """Logits of the whole texts in one forward pass, with a dense mask of their topology."""
    segment_ids = output.segment_ids.numpy()
    assert output.parents is not None
    topologies = [
        Topology(segments, positions, parents)
        for segments, positions, parents in zip(segment_ids, output.position_ids.numpy(), output.parents, strict=True)
    ]
    batch = Topology.stack(topologies)
    mask = torch.from_numpy(np.stack([t.dense_mask().numpy() for t in topologies]))[:, None]
    assert torch.equal(batch.segment_ids, output.segment_ids)
    mask |= ~mask.any(-1, keepdim=True)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    logits = model(output.sequences, position_ids=output.position_ids, attention_mask=dict.fromkeys(
        model.config.layer_types, mask)).logits  # fmt: skip
    model.set_attn_implementation(implementation)
    return logits


def check_logits(
    model: Any, output: TopologyGenerateOutput, recorder: Recorder, offsets: Sequence[int], tolerance: float = 1e-10
) -> None:
    """Every token was chosen from the logits of one pass over the whole text."""
    expected = one_pass(model, output)
    places: dict[int, dict[int, int]] = {}
    for branch, slot, scores in recorder.seen:
        root = branch
        while root.parent is not None:
            root = root.parent
        if root.row not in places:
            prompt = min((c for c in slots_in_text_order(root)), default=0)
            slots = [*range(prompt), *slots_in_text_order(root)]
            places[root.row] = {c: offsets[root.row] + i for i, c in enumerate(slots)}
        wanted = expected[root.row, places[root.row][slot]]
        torch.testing.assert_close(scores, wanted, atol=tolerance, rtol=tolerance)


def reads_back(tokenizer: Any, output: TopologyGenerateOutput, offsets: Sequence[int], mode: str = "dag") -> None:
    """The text, read again, has the topology that it was generated with."""
    for b, offset in enumerate(offsets):
        real = output.segment_ids[b] >= 0
        read = Topology.from_token_ids(
            output.sequences[b][real],
            tokenizer.vocabulary.grammar,
            tokenizer.token_ids,
            mode=mode,
            strict=False,
            decode=tokenizer.decode,
            allow_truncated=True,
        )
        assert read.segment_ids.tolist() == output.segment_ids[b][real].tolist()
        assert read.position_ids.tolist() == output.position_ids[b][real].tolist()
        written = output.parents[b]
        assert [sorted(p) for p in read.parents[: len(written)]] == [sorted(p) for p in written]
        assert not real[:offset].any()


# One forward pass over the whole text


@pytest.mark.parametrize("attention", ["hfe_topology", "sdpa", "eager"])
@pytest.mark.parametrize(("grammar", "mode"), [("multiverse", "dag"), ("medverse", "dag"), ("medverse", "layers")])
def test_tokens_have_the_logits_of_one_pass_over_the_text(
    model_of: Callable, toy_tokenizer: Callable, grammar: str, mode: str, attention: str
) -> None:
    # The eager softmax is in float32 whatever the model's dtype.
    dtype, tolerance = (torch.float32, 1e-4) if attention == "eager" else (torch.float64, 1e-10)
    model, tokenizer = model_of(grammar, dtype, topology={"mode": mode}), toy_tokenizer(grammar)
    model.set_attn_implementation(attention)
    block = BLOCK if grammar == "multiverse" else PLAN
    texts = ["Question", f"Q {block}", f"QQ {block}\n"]
    inputs = prompts(tokenizer.vocabulary, texts)
    offsets = (inputs["attention_mask"] == 0).sum(1).tolist()
    for seed in range(2):
        recorder = Recorder(chatty(tokenizer.vocabulary, seed))
        output = generate(model, tokenizer, inputs, sampler=recorder, max_branches=4, max_new_tokens=100)
        reads_back(tokenizer, output, offsets, mode)
        check_logits(model, output, recorder, offsets, tolerance)
        assert len(recorder.seen) > 100


NESTED = {
    (): f"t{BLOCK}so</Conclusion></Parallel>end",
    ("1",): " first path</Path>",
    ("2",): f" v{INNER}inner</Conclusion></Parallel>y</Path>",
    ("2", "2.1"): "p</Path>",
    ("2", "2.2"): "qqqqqq</Path>",
}
STEPS = {(): f"t{PLAN}so</Conclusion>end"} | {(str(n),): "step" * (5 - n) + "</Step>" for n in range(1, 5)}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ["hfe_topology", "sdpa", "eager"])
def test_stock_models_generate_in_parallel(
    stock_of: Callable, toy_tokenizer: Callable, family: str, attention: str
) -> None:
    dtype, tolerance = (torch.float32, 1e-4) if attention == "eager" else (torch.float64, 1e-10)
    model, tokenizer = stock_of(family, dtype), toy_tokenizer("multiverse")
    model.set_attn_implementation(attention)
    ids = torch.tensor([tokenizer.encode("Question")])
    recorder = Recorder(scripted(tokenizer.vocabulary, NESTED))
    output = parallel_generate(
        model, ids, tokenizer=tokenizer, grammar="multiverse", sampler=recorder, max_new_tokens=150,
        return_dict_in_generate=True,
    )  # fmt: skip
    model.set_attn_implementation("sdpa")
    topology = Topology.from_token_ids(output.sequences[0], "multiverse", tokenizer.token_ids, decode=tokenizer.decode)
    with torch.no_grad():
        expected = model(
            output.sequences, position_ids=output.position_ids, attention_mask=topology.dense_mask()[None, None]
        ).logits
    slots = [*range(len(ids[0])), *slots_in_text_order(recorder.seen[0][0])]
    for _, slot, scores in recorder.seen:
        torch.testing.assert_close(scores, expected[0, slots.index(slot)], atol=tolerance, rtol=tolerance)


def test_other_patches_generate_in_parallel(toy_tokenizer: Callable, small_shape: dict[str, Any]) -> None:
    """STEM and Multiverse in one model."""
    tokenizer = toy_tokenizer("multiverse")
    topology = {"grammar": "multiverse", "token_ids": tokenizer.token_ids}
    torch.manual_seed(0)
    config = EfficientDecoderConfig(**small_shape, stem_layers=[1], topology=topology)
    model = EfficientDecoderForCausalLM(config).double().eval()
    recorder = Recorder(scripted(tokenizer.vocabulary, NESTED))
    output = generate(model, tokenizer, torch.tensor([tokenizer.encode("Question")]), sampler=recorder)
    check_logits(model, output, recorder, [0])


def test_a_conversation_goes_on_after_parallel_blocks(model_of: Callable, toy_tokenizer: Callable) -> None:
    model, tokenizer = model_of("multiverse"), toy_tokenizer("multiverse")
    turn = generate(
        model,
        tokenizer,
        torch.tensor([tokenizer.encode("Question")]),
        sampler=Recorder(scripted(tokenizer.vocabulary, NESTED)),
    )
    texts = [tokenizer.decode(turn.sequences[0]) + "And", "Short"]
    inputs = prompts(tokenizer.vocabulary, texts)
    offsets = (inputs["attention_mask"] == 0).sum(1).tolist()
    recorder = Recorder(scripted(tokenizer.vocabulary, NESTED))
    output = generate(model, tokenizer, inputs, sampler=recorder)
    reads_back(tokenizer, output, offsets)
    check_logits(model, output, recorder, offsets)
    assert output.critical_path[0] == output.critical_path[1] == turn.critical_path[0]


def test_rows_of_a_batch_are_those_of_each_alone(model_of: Callable, toy_tokenizer: Callable) -> None:
    model, tokenizer = model_of("multiverse"), toy_tokenizer("multiverse")
    texts = ["Question", f"Q {BLOCK}", "A longer question than the others?"]
    choices = {0: NESTED, 1: {(): "so", ("1",): "u</Path>", ("2",): "vvvv</Path>"}, 2: {(): "plain text"}}

    def choose(of: Callable[[Branch], int]) -> Recorder:
        scripts = {row: scripted(tokenizer.vocabulary, text) for row, text in choices.items()}
        return Recorder(lambda branch, scores: scripts[of(branch)](branch, scores))

    together = choose(lambda branch: branch.row)
    batch = generate(model, tokenizer, prompts(tokenizer.vocabulary, texts), sampler=together)
    for b, text in enumerate(texts):
        alone = choose(lambda branch, b=b: b)  # type: ignore[misc]
        single = generate(model, tokenizer, torch.tensor([tokenizer.encode(text)]), sampler=alone)
        real = batch.segment_ids[b] >= 0
        assert torch.equal(batch.sequences[b][real], single.sequences[0])
        assert batch.parents[b] == single.parents[0]
        mine = [scores for branch, _, scores in together.seen if branch.row == b]
        for (_, _, one), other in zip(alone.seen, mine, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_a_cache_that_grows_loses_nothing(
    model_of: Callable, toy_tokenizer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_decoding, "INITIAL_NEW_SLOTS", 1)
    model, tokenizer = model_of("multiverse"), toy_tokenizer("multiverse")
    scripts = {(): f"t{BLOCK}so", ("1",): "u" * 120 + "</Path>", ("2",): "v" * 150 + "</Path>"}
    recorder = Recorder(scripted(tokenizer.vocabulary, scripts))
    output = generate(model, tokenizer, torch.tensor([tokenizer.encode("Q")]), sampler=recorder, max_new_tokens=400)
    assert output.sequences.shape[1] > 256
    check_logits(model, output, recorder, [0])


def test_more_than_64_segments_and_queries(model_of: Callable, toy_tokenizer: Callable) -> None:
    model, tokenizer = model_of("multiverse"), toy_tokenizer("multiverse")
    outlines = "".join(f"<Outline>{n}: a</Outline>" for n in range(1, 71))
    scripts = {(): f"<Parallel><Goal>{outlines}</Goal>so"} | {(str(n),): "u</Path>" for n in range(1, 71)}
    recorder = Recorder(scripted(tokenizer.vocabulary, scripts))
    ids = torch.tensor([tokenizer.encode("Q")])
    output = generate(model, tokenizer, ids, sampler=recorder, max_new_tokens=600, max_branches=100)
    assert len(output.parents[0]) == 72
    check_logits(model, output, recorder, [0])


# Branches as rows


def test_greedy_branches_are_those_of_rows_of_their_own(stock_of: Callable, toy_tokenizer: Callable) -> None:
    """Each path alone behind the trunk, decoded by a stock model; the conclusion behind all their keys and values."""
    model, tokenizer = stock_of(), toy_tokenizer("multiverse")
    tags, length = set(tokenizer.token_ids.values()) | {0, EOS}, 12

    def text_only(scores: Tensor) -> int:
        return int(scores.index_fill(0, torch.tensor(sorted(tags)), float("-inf")).argmax())

    def choose(branch: Branch, scores: Tensor) -> int:
        if branch.parent is None:
            script = tokenizer.encode(BLOCK)
            return script[branch.num_sampled_tokens] if branch.num_sampled_tokens < len(script) else text_only(scores)
        return text_only(scores) if branch.num_sampled_tokens < length else tokenizer.token_ids["</Path>"]

    ids = torch.tensor([tokenizer.encode("Question")])
    recorder = Recorder(choose)
    output = parallel_generate(
        model, ids, tokenizer=tokenizer, grammar="multiverse", sampler=recorder, max_new_tokens=90,
        return_dict_in_generate=True,
    )  # fmt: skip

    @torch.no_grad()
    def decode(tokens: list[int], position: int, cache: DynamicCache, count: int) -> tuple[list[int], int]:
        """Feed tokens one after the other, then `count` of the model's own."""
        chosen: list[int] = []
        for at in range(len(tokens) + count):
            token = tokens[at] if at < len(tokens) else chosen[-1]
            place = torch.tensor([[position + at]])
            mask = torch.ones(1, cache.get_seq_length() + 1)
            fed = torch.tensor([[token]])
            scores = model(fed, position_ids=place, attention_mask=mask, past_key_values=cache).logits[0, -1]
            if at >= len(tokens) - 1:
                if len(chosen) == count:
                    break
                chosen.append(text_only(scores))
        return chosen, position + at + 1

    trunk = [*ids[0].tolist(), *tokenizer.encode(f"{BLOCK}\n")]
    expected, ends, suffixes = list(trunk), [], []
    for label in "12":
        cache = DynamicCache()
        header = tokenizer.encode(f"<Path>\n{label}:")
        path, _ = decode([*trunk, *header], 0, cache, length)
        rest = [*trunk, *header, *path, *tokenizer.encode("</Path>\n")]
        cache = DynamicCache()
        _, end = decode(rest, 0, cache, 0)
        suffixes.append([(layer.keys[:, :, len(trunk) :], layer.values[:, :, len(trunk) :]) for layer in cache.layers])
        ends.append(end)
        expected += rest[len(trunk) :]
    joined = DynamicCache()
    decode(trunk, 0, joined, 0)
    for suffix in suffixes:
        for i, (keys, values) in enumerate(suffix):
            joined.update(keys, values, i)
    header = tokenizer.encode("<Conclusion>\n")
    left = output.sequences.shape[1] - len(expected) - len(header)
    assert left > 20
    conclusion, _ = decode(header, max(ends), joined, left)
    assert output.sequences[0].tolist() == [*expected, *header, *conclusion]


# Plain text


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"max_new_tokens": 1}, id="one-token"),
        pytest.param({"eos_token_id": [1, 40, 50, 60, 77]}, id="several-ends"),
        pytest.param({"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}, id="processors"),
        pytest.param({"min_new_tokens": 20, "eos_token_id": [1, *range(90, 140)]}, id="least-length"),
        pytest.param({"max_new_tokens": None, "max_length": 30}, id="length"),
        pytest.param({"forced_eos_token_id": 1}, id="forced-end"),
        pytest.param({"num_return_sequences": 2, "do_sample": True, "top_k": 1}, id="several"),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_plain_text_is_that_of_stock_generate(
    model_of: Callable, stock_of: Callable, toy_tokenizer: Callable, options: dict[str, Any], padded: bool
) -> None:
    ours, stock, tokenizer = model_of("multiverse"), stock_of(), toy_tokenizer("multiverse")
    ours.load_state_dict(stock.state_dict())
    inputs = prompts(tokenizer.vocabulary, ["A question", "Q?", "?????"] if padded else ["A question"])
    settings = {"max_new_tokens": 40, "do_sample": False, "suppress_tokens": list(range(3, 15))} | options
    expected = stock.generate(**inputs, **settings)
    assert torch.equal(ours.generate(**inputs, **settings, parallel=True, tokenizer=tokenizer), expected)
    assert torch.equal(
        parallel_generate(stock, **inputs, **settings, tokenizer=tokenizer, grammar="multiverse"), expected
    )


def test_plain_text_of_the_model_whose_blocks_are_not_trained_is_stock(
    model_of: Callable, stock_of: Callable, toy_tokenizer: Callable
) -> None:
    """Untrained, `generate` is the plain one; trained, it follows forks without being asked."""
    tokenizer, stock = toy_tokenizer("multiverse"), stock_of()
    ids = torch.tensor([tokenizer.encode(BLOCK)])
    plain = stock.generate(ids, max_new_tokens=40, do_sample=False)
    for trained in (False, True):
        model = model_of("multiverse", topology={"trained": trained})
        model.load_state_dict(stock.state_dict())
        found = model.generate(ids, max_new_tokens=40, do_sample=False, tokenizer=tokenizer)
        assert torch.equal(found, plain) != trained
        assert torch.equal(model.generate(ids, max_new_tokens=40, do_sample=False, parallel=False), plain), (
            "it can be switched off"
        )


# What is chosen is computed by the step itself where nothing looks at logits


def test_scripts_run_while_the_model_makes_its_own_choices(model_of: Callable, toy_tokenizer: Callable) -> None:
    model, tokenizer = model_of("medverse"), toy_tokenizer("medverse")
    scripts = {(0, tuple((0, label) for label in labels)): tokenizer.encode(text) for labels, text in STEPS.items()}
    ids = torch.tensor([tokenizer.encode("Q")])
    output = generate(model, tokenizer, ids, sampler=ScriptedSampler(scripts, after=EOS), max_new_tokens=400)
    recorded = generate(
        model, tokenizer, ids, sampler=Recorder(scripted(tokenizer.vocabulary, STEPS)), max_new_tokens=400
    )
    assert torch.equal(output.sequences, recorded.sequences)
    assert output.num_forward_passes == recorded.num_forward_passes < output.generated_tokens[0]
    assert output.parallelism == output.generated_tokens[0] / output.critical_path[0] > 1


def test_log_probabilities_are_those_of_one_pass(model_of: Callable, toy_tokenizer: Callable) -> None:
    model, tokenizer = model_of("multiverse"), toy_tokenizer("multiverse")
    inputs = torch.tensor([tokenizer.encode(f"Q{BLOCK}")])
    output = generate(model, tokenizer, inputs, output_scores=True, max_new_tokens=60)
    expected = one_pass(model, output).log_softmax(-1)[0]
    ids, segments = output.sequences[0], output.segment_ids[0]
    for info in output.branch_info[0][1:]:
        assert len(info.logprobs) == info.num_sampled_tokens > 10
        places = [i for i, segment in enumerate(segments.tolist()) if segment in info.segments]
        header = len(tokenizer.encode("<Path>\n1:"))
        sampled = places[header : header + info.num_sampled_tokens]
        # The last token may have been replaced by the closing tag.
        for i, chance in list(zip(sampled, info.logprobs, strict=True))[:-1]:
            assert chance == pytest.approx(float(expected[places[places.index(i) - 1], ids[i]]), abs=1e-5)


def test_most_likely_takes_the_first_of_equals() -> None:
    choice = most_likely(torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]]))
    assert choice.tokens.tolist() == [1, 0]
    torch.testing.assert_close(choice.logprobs[1], torch.tensor(1 / 3).log())


def test_the_model_takes_a_topology_of_prompts(model_of: Callable) -> None:
    model = model_of("multiverse")
    topology = Topology.from_spec([(3, []), (2, [0]), (2, [0]), (1, [1, 2])])
    batch = Topology.stack([topology])
    ids = torch.arange(20, 28)[None]
    with torch.no_grad():
        given = model(
            ids, position_ids=batch.position_ids, topology=TopologyMask(batch.segment_ids, batch.segment_visibility)
        ).logits
    output = TopologyGenerateOutput(
        sequences=ids, segment_ids=batch.segment_ids, position_ids=batch.position_ids, parents=[topology.parents]
    )
    torch.testing.assert_close(given, one_pass(model, output), atol=1e-10, rtol=1e-10)
