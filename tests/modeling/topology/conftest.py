"""A toy vocabulary for both grammars, random texts, oracles of visibility and positions, and a scheduler to run."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.scripted_sampler import ScriptedSampler
from hf_efficient.modeling.medverse.modeling_medverse import MedVerseConfig, MedVerseForCausalLM
from hf_efficient.modeling.multiverse.modeling_multiverse import MultiverseConfig, MultiverseForCausalLM
from hf_efficient.modeling.topology.generation.branches import Branch, BranchPath, all_branches
from hf_efficient.modeling.topology.generation.limits import Limits
from hf_efficient.modeling.topology.generation.scheduler import SequenceScheduler
from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder
from hf_efficient.modeling.topology.grammar.control_tokens import CONTROL_TOKENS
from hf_efficient.modeling.topology.grammar.forced_text import ForcedText
from hf_efficient.modeling.topology.grammar.topology import Topology
from tiny_shapes import TINY

EOS = 1
BLOCK = "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
INNER = "<Parallel><Goal><Outline>2.1: c</Outline><Outline>2.2: d</Outline></Goal>"
PATHS: dict[str, BranchPath] = {"": (), "1": ((0, "1"),), "2": ((0, "2"),), "2.1": ((0, "2"), (0, "2.1"))}


class ToyVocabulary:
    """One id a character, after the control tokens of one grammar."""

    size = 150

    def __init__(self, grammar: str) -> None:
        self.grammar = grammar
        self.token_ids = {tag: 3 + i for i, tag in enumerate(CONTROL_TOKENS[grammar])}
        self._tags = {token_id: tag for tag, token_id in self.token_ids.items()}
        self._split = re.compile("(" + "|".join(map(re.escape, self.token_ids)) + ")")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            ids += [self.token_ids[part]] if part in self.token_ids else [16 + ord(character) for character in part]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._tags.get(i) or chr(i - 16) for i in ids)

    def parse(self, text: str, **options: object) -> Topology:
        return self.parse_ids(self.encode(text), **options)

    def parse_ids(self, ids: Sequence[int], **options: object) -> Topology:
        return Topology.from_token_ids(ids, self.grammar, self.token_ids, decode=self.decode, **options)  # type: ignore


def words(rng: random.Random, most: int = 4) -> str:
    return "".join(rng.choice("abcde ") for _ in range(rng.randrange(most)))


def multiverse_text(rng: random.Random, glue: bool, depth: int = 3, most_paths: int = 3, prefix: str = "") -> str:
    """Random text with blocks nested up to `depth`; a path may be empty or the only one."""
    end = "\n" if glue else ""
    text = words(rng)
    for block in range(rng.randrange(1, 3) if depth == 3 else rng.randrange(2) if depth else 0):
        labels = [f"{prefix}{10 * block + i + 1}" for i in range(rng.randint(1, most_paths))]
        outlines = "".join(f"<Outline> {label}: {words(rng)}</Outline>{end}" for label in labels)
        text += f"<Parallel>{end}<Goal>{end}{outlines}</Goal>{end}"
        for label in labels:
            inside = multiverse_text(rng, glue, depth - 1, most_paths, f"{label}.")
            body = rng.choice(("", f"{end}{label}: {inside}", f"{end}{label}: {inside}"))
            text += f"<Path>{body}</Path>{end}"
        text += f"<Conclusion>{end}{words(rng)}</Conclusion>{end}</Parallel>{end}{words(rng)}"
    return text


def medverse_text(rng: random.Random, glue: bool, steps: int, plan: dict[int, list[int]] | None = None) -> str:
    """Random plan with random dependencies, or `plan`, and its steps."""
    end = "\n" if glue else ""
    if plan is None:
        plan = {n: sorted(rng.sample(range(1, n), min(n - 1, rng.randrange(3)))) for n in range(1, steps + 1)}
    outlines = "".join(
        f"<Outline> Transient Step {n}: A -> {n}; Dependency: {needed} </Outline>{end}" for n, needed in plan.items()
    )
    bodies = "".join(f"<Step> Transient Step {n}: A -> {n}\n{words(rng)}</Step>{end}" for n in plan)
    return (
        f"<Think>{end}{words(rng)}<Plan>{end}{outlines}</Plan>{end}<Execution>{end}{bodies}</Execution>{end}"
        f"<Conclusion>{end}{words(rng)}</Conclusion>"
    )


def reachability(topology: Topology) -> list[set[int]]:
    """Segments that each segment can reach over its parents, itself among them, by depth-first search."""
    reached = []
    for segment in range(len(topology.parents)):
        seen, pending = {segment}, [segment]
        while pending:
            for parent in topology.parents[pending.pop()]:
                if parent not in seen:
                    seen.add(parent)
                    pending.append(parent)
        reached.append(seen)
    return reached


def brute_force_mask(topology: Topology) -> np.ndarray:
    reached, segments = reachability(topology), topology.segment_ids.tolist()
    mask = np.zeros((len(segments), len(segments)), dtype=bool)
    for i, own in enumerate(segments):
        if own >= 0:
            sees = reached[own]
            mask[i, : i + 1] = [other in sees for other in segments[: i + 1]]
    return mask


def position_formula(topology: Topology) -> np.ndarray:
    """Positions from the definition: 1 + the greatest end of the parents, and one more for each token."""
    starts: list[int] = []
    ends: list[int] = []
    found = np.zeros(len(topology.segment_ids), dtype=np.int64)
    for segment, parents in enumerate(topology.parents):
        mine = np.flatnonzero(topology.segment_ids == segment)
        starts.append(max((ends[parent] + 1 for parent in parents), default=0))
        ends.append(starts[-1] + len(mine) - 1)
        found[mine] = starts[-1] + np.arange(len(mine))
    return found


@pytest.fixture(scope="session")
def toy() -> Callable[[str], ToyVocabulary]:
    """The toy vocabulary of a grammar."""
    return ToyVocabulary


@pytest.fixture(scope="session")
def random_text() -> Callable[..., str]:
    """A random text of a grammar, from a seed; `glue` puts separators between the tags."""

    def make(grammar: str, seed: int, glue: bool, size: int = 3) -> str:
        rng = random.Random(seed)
        if grammar == "medverse":
            return medverse_text(rng, glue, rng.randint(1, 2 * size))
        return multiverse_text(rng, glue, most_paths=size)

    return make


@pytest.fixture(scope="session")
def plan_text() -> Callable[..., str]:
    """The MedVerse text of a plan {N: dependencies}."""
    return lambda plan, glue=True: medverse_text(random.Random(0), glue, 0, plan)


@pytest.fixture(scope="session")
def by_hand() -> Callable[[Topology], np.ndarray]:
    """Visibility in a topology, pair by pair, by a search over the parents."""
    return brute_force_mask


@pytest.fixture(scope="session")
def positions_by_hand() -> Callable[[Topology], np.ndarray]:
    """Positions of a topology from their definition."""
    return position_formula


@pytest.fixture(scope="session")
def branching() -> tuple[Topology, Tensor]:
    """A row with a trunk, a path that forks again, its sibling, their join, and ids for it."""
    spec = [(5, []), (3, [0]), (2, [1]), (4, [1]), (2, [2, 3]), (4, [0]), (3, [4, 5])]
    topology = Topology.from_spec(spec)
    return topology, torch.randint(3, 90, (1, len(topology)), generator=torch.Generator().manual_seed(3))


class ToyTokenizer:
    """The toy vocabulary with the interface of a tokenizer."""

    def __init__(self, grammar: str) -> None:
        self.vocabulary = ToyVocabulary(grammar)
        self.token_ids = self.vocabulary.token_ids

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.vocabulary.encode(text)

    def decode(self, ids: Sequence[int], **_: object) -> str:
        # Ids without a character are EOS and padding.
        return "".join("" if i < 3 or i == 15 else self.vocabulary.decode([i]) for i in map(int, ids))


@pytest.fixture(scope="session")
def toy_tokenizer() -> Callable[[str], ToyTokenizer]:
    """The toy vocabulary of a grammar, as a tokenizer."""
    return ToyTokenizer


@pytest.fixture(scope="session")
def small_shape() -> dict[str, Any]:
    """A small model over the toy vocabulary, with wide random weights; token 1 ends a text."""
    return {
        "vocab_size": 150,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }


@pytest.fixture(scope="session")
def model_of(toy: Callable, small_shape: dict[str, Any]) -> Callable[..., Any]:
    """Makes a small model of a grammar."""

    def make(grammar: str, dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
        config, model = {
            "multiverse": (MultiverseConfig, MultiverseForCausalLM),
            "medverse": (MedVerseConfig, MedVerseForCausalLM),
        }[grammar]
        topology = {"token_ids": toy(grammar).token_ids} | fields.pop("topology", {})
        torch.manual_seed(0)
        return model(config(**small_shape, **fields, topology=topology)).to(dtype).eval()

    return make


@pytest.fixture(scope="module")
def tokenizer(toy_tokenizer: Callable) -> Any:
    """The toy vocabulary of Multiverse as a tokenizer."""
    return toy_tokenizer("multiverse")


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """A small Multiverse model over the toy vocabulary; test modules with a `model` of their own override it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 150, "num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.2}
    fields = TINY | sizes | {"bos_token_id": None, "eos_token_id": EOS}
    config = MultiverseConfig(**fields, topology={"token_ids": tokenizer.token_ids})
    return MultiverseForCausalLM(config).eval()


@pytest.fixture
def generate(model: Any, tokenizer: Any) -> Callable[..., Any]:
    """Runs parallel generation of `model` on a text or on ids."""

    def run(text: str | Tensor = f"Q{BLOCK}", **options: Any) -> Any:
        ids = torch.tensor([tokenizer.encode(text)]) if isinstance(text, str) else text
        settings = {"parallel": True, "max_new_tokens": 60, "do_sample": False, "return_dict_in_generate": True}
        return model.generate(ids, tokenizer=tokenizer, **(settings | options))

    return run


@pytest.fixture
def nested(tokenizer: Any) -> Callable[[], ScriptedSampler]:
    """A sampler that replays two paths, the second with a nested block."""
    texts = {
        (): f"t{BLOCK}so</Conclusion></Parallel>end",
        PATHS["1"]: " first</Path>",
        PATHS["2"]: f" v{INNER}inner</Conclusion></Parallel>y</Path>",
        PATHS["2.1"]: "p</Path>",
        ((0, "2"), (0, "2.2")): "qqqqqq</Path>",
    }
    return lambda: ScriptedSampler({(0, path): tokenizer.encode(text) for path, text in texts.items()}, after=EOS)


@dataclass
class Run:
    """A finished sequence.

    Attributes:
        text: in the order of the text, with `<eos>` for the end.
        passes: forward passes.
        slots: cache slots in the order of the text.
        computed: cache slots that each pass computed.
    """

    row: SequenceScheduler
    text: str
    passes: int
    slots: list[int]
    computed: list[list[int]]

    def branch(self, *labels: str) -> Branch:
        return next(b for b in all_branches(self.row.trunk) if tuple(label for _, label in b.path) == labels)

    def first_pass(self, *labels: str) -> int:
        """The pass that computed the branch's first token."""
        slot = next(item for item in self.branch(*labels).contents if isinstance(item, int))
        return next(i for i, slots in enumerate(self.computed) if slot in slots)


Choose = Callable[[Branch], int]


@pytest.fixture(scope="session")
def course(toy: Callable) -> Callable[..., Run]:
    """Runs a scheduler: `scripts` gives what each branch samples, by its labels; past its script a branch samples x."""

    def run(
        grammar: str,
        scripts: dict[tuple[str, ...], str] | Choose,
        prompt: str = "Q\n",
        mode: str = "dag",
        end: bool = True,
        **limits: Any,
    ) -> Run:
        vocabulary = toy(grammar)

        def scripted(branch: Branch) -> int:
            script = vocabulary.encode(scripts.get(tuple(label for _, label in branch.path), ""))  # type: ignore
            if branch.parent is None and end:
                script.append(EOS)
            return (
                script[branch.num_sampled_tokens]
                if branch.num_sampled_tokens < len(script)
                else vocabulary.encode("x")[0]
            )

        choose = scripts if callable(scripts) else scripted
        builder = TopologyBuilder(
            grammar, vocabulary.token_ids, mode=mode, strict=False, decode=lambda ids: decode_with_eos(vocabulary, ids)
        )
        row = SequenceScheduler(
            0,
            vocabulary.encode(prompt),
            builder,
            ForcedText(grammar, vocabulary.token_ids, vocabulary.encode),
            Limits(**({"max_new_tokens": 500, "eos_ids": {EOS}} | limits)),
        )
        computed: list[list[int]] = []
        row.schedule()
        while not row.finish_reason:
            computed.append(list(range(row.num_computed_tokens, len(row.tokens))))
            assert computed[-1], "every pass computes something"
            assert all(branch.last_slot in computed[-1] for branch in row.active_branches), "logits are of this pass"
            row.num_computed_tokens = len(row.tokens)
            row.accept([choose(branch) for branch in row.active_branches])
            row.schedule()
            assert len(computed) < 5000
        slots = list(row.slots_in_text_order())
        found = Run(row, decode_with_eos(vocabulary, [row.tokens[c] for c in slots]), len(computed), slots, computed)
        check_run(found, vocabulary, mode)
        return found

    return run


def decode_with_eos(vocabulary: Any, ids: Sequence[int]) -> str:
    return "".join("<eos>" if i == EOS else vocabulary.decode([i]) for i in ids)


def check_run(run: Run, vocabulary: Any, mode: str) -> None:
    """Invariants of every sequence: reading its text gives the topology it was generated with, within limits."""
    row = run.row
    assert sorted(run.slots) == list(range(len(row.tokens))), "each slot occurs once in the text"
    read = Topology.from_token_ids(
        [row.tokens[c] for c in run.slots],
        vocabulary.grammar,
        vocabulary.token_ids,
        mode=mode,
        strict=False,
        decode=lambda ids: decode_with_eos(vocabulary, ids),
        allow_truncated=True,
    )
    number: dict[int, int] = {}
    for slot in run.slots:
        number.setdefault(row.segments[slot], len(number))
    assert [number[row.segments[c]] for c in run.slots] == read.segment_ids.tolist()
    assert [row.positions[c] for c in run.slots] == read.position_ids.tolist()
    closures = read.closure()
    for segment, new in number.items():
        seen = sum(1 << number[s] for s in range(len(row.graph)) if row.graph.closure[segment] >> s & 1 and s in number)
        assert seen == closures[new]
    # All that a token sees was computed before it.
    last: dict[int, int] = {}
    for slot, segment in enumerate(row.segments):
        last[segment] = slot
    first: dict[int, int] = {}
    for slot, segment in enumerate(row.segments):
        first.setdefault(segment, slot)
    for segment in number:
        for other in range(len(row.graph)):
            if other != segment and row.graph.closure[segment] >> other & 1 and other in last:
                assert last[other] < first[segment]
    limits = row.limits
    if limits.budget == "positions":
        assert row.critical_path <= limits.max_new_tokens
    else:
        assert row.num_generated_tokens <= limits.max_new_tokens
    for branch in all_branches(row.trunk):
        assert (
            limits.branch_max_new_tokens is None
            or branch.parent is None
            or (branch.num_sampled_tokens <= limits.branch_max_new_tokens)
        )
