"""Worked problems as structured texts: what is written is what is read back, whatever the texts hold."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_efficient.data.structure_tree import tag_pattern
from hf_efficient.data.structured_sample import Sample
from hf_efficient.data.structured_text import (
    entity_chains_to_steps,
    escape,
    flatten,
    to_medverse,
    to_multiverse,
    validate,
)
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.modeling.topology.grammar.control_tokens import CONTROL_TOKENS
from hf_efficient.modeling.topology.grammar.topology import Topology

TAGS = sorted({tag for tags in CONTROL_TOKENS.values() for tag in tags})


class Characters:
    """A tokenizer with one token for each control token and each other character."""

    def __init__(self, grammar: str) -> None:
        self.pattern = tag_pattern(grammar)
        self.token_ids = {tag: number for number, tag in enumerate(CONTROL_TOKENS[grammar])}
        self.names = dict(zip(self.token_ids.values(), self.token_ids, strict=True))

    def encode(self, text: str) -> list[int]:
        ids, start = [], 0
        for match in self.pattern.finditer(text):
            ids += [100 + ord(c) for c in text[start : match.start()]] + [self.token_ids[match[0]]]
            start = match.end()
        return ids + [100 + ord(c) for c in text[start:]]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.names[i] if i < 100 else chr(i - 100) for i in ids)


def parse(text: str, grammar: str, mode: str = "dag") -> Topology:
    tokenizer = Characters(grammar)
    ids = tokenizer.encode(text)
    return Topology.from_token_ids(ids, grammar, tokenizer.token_ids, mode=mode, decode=tokenizer.decode)


def sample(*steps: tuple[str, Sequence[str]], **fields: str) -> dict[str, Any]:
    """Steps given as (id, deps); title and text are made from the id."""
    named = [{"id": i, "title": f"Title {i}", "text": f"Text of {i}.", "deps": list(deps)} for i, deps in steps]
    return {"question": "Why?", "steps": named, **fields}


DIAMOND = sample(("a", ""), ("b", "a"), ("c", "a"), ("d", "bc"), answer="42", conclusion="So it is.", preamble="Hm.")

# Anything that a text may hold, and much of what could be taken for structure.
words = st.sampled_from([*TAGS, "<", ">", "\n", "; Dependency: [9]", "Dependency:[1]", "Transient Step 7", "1: ", "->"])
texts = st.lists(st.one_of(st.text(max_size=5), words, st.just(" ")), max_size=6).map("".join)
titles = texts.filter(lambda text: bool(text.strip()))


@st.composite
def samples(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(1, 7))
    ids = [f"s{number}" for number in range(count)]
    steps = [
        {
            "id": name,
            "title": draw(titles),
            "text": draw(texts),
            "deps": draw(st.lists(st.sampled_from(ids[:place]), unique=True, max_size=3)) if place else [],
        }
        for place, name in enumerate(ids)
    ]
    fields = {name: draw(texts) for name in ("answer", "conclusion", "preamble")}
    return {"question": draw(texts), "steps": draw(st.permutations(steps)), **fields}


def ancestors(steps: Sequence[Any]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for step in steps:
        found[step.id] = {step.id}.union(*(found[dep] for dep in step.deps))
    return found


# Written and read back


def test_a_medverse_text_in_full() -> None:
    assert to_medverse(DIAMOND) == (
        "<Think>\nHm.\n<Plan>\n"
        "<Outline> Transient Step 1: Question -> Title a; Dependency: [] </Outline>\n"
        "<Outline> Transient Step 2: Title a -> Title b; Dependency: [1] </Outline>\n"
        "<Outline> Transient Step 3: Title a -> Title c; Dependency: [1] </Outline>\n"
        "<Outline> Transient Step 4: Title b, Title c -> Title d; Dependency: [2, 3] </Outline>\n"
        "</Plan>\n<Execution>\n"
        "<Step> Transient Step 1: Question -> Title a\nText of a.\n</Step>\n"
        "<Step> Transient Step 2: Title a -> Title b\nText of b.\n</Step>\n"
        "<Step> Transient Step 3: Title a -> Title c\nText of c.\n</Step>\n"
        "<Step> Transient Step 4: Title b, Title c -> Title d\nText of d.\n</Step>\n"
        "</Execution>\n<Conclusion>\nExplanation: So it is.\nAnswer: 42\n</Conclusion>\n</Think>"
    )


def test_a_multiverse_text_in_full() -> None:
    assert to_multiverse(DIAMOND) == (
        "<Think>\nHm.\nText of a.\n<Parallel>\n<Goal>\n"
        "<Outline>\n1: Title b\n</Outline>\n<Outline>\n2: Title c\n</Outline>\n</Goal>\n"
        "<Path>\n1: Text of b.\n</Path>\n<Path>\n2: Text of c.\n</Path>\n"
        "<Conclusion>\nTitle b; Title c\n</Conclusion>\n</Parallel>\n"
        "Text of d.\nSo it is.\n</Think>\n\nAnswer: 42"
    )


def test_the_conclusion_concludes_the_last_block() -> None:
    text = to_multiverse(sample(("a", ""), ("b", ""), conclusion="Both."))
    assert text.endswith("<Conclusion>\nBoth.\n</Conclusion>\n</Parallel>\n</Think>")
    assert text.count("Both.") == 1


@given(samples())
@settings(max_examples=150, deadline=None)
def test_medverse_round_trip_gives_the_same_graph(given_sample: dict[str, Any]) -> None:
    text = to_medverse(given_sample)
    assert validate(text, "medverse") == []
    steps = Sample.of(given_sample).steps
    # Segments: the text before the steps, the steps, the join.
    topology = parse(text, "medverse")
    assert topology.n_segments == len(steps) + 2
    seen = ancestors(steps)
    for number, step in enumerate(steps, start=1):
        found = {other.id for n, other in enumerate(steps, start=1) if topology.reachable(number, n)}
        assert found == seen[step.id]
    assert all(topology.reachable(len(steps) + 1, segment) for segment in range(len(steps) + 2))


@given(samples())
@settings(max_examples=150, deadline=None)
def test_multiverse_round_trip_gives_the_graph_of_levels(given_sample: dict[str, Any]) -> None:
    text = to_multiverse(given_sample)
    assert validate(text, "multiverse") == []
    levels = Sample.of(given_sample).levels()
    blocks = [level for level in levels if len(level) > 1]
    topology = parse(text, "multiverse")
    # Each block has a segment for each path, and one for its end.
    assert topology.n_segments == 1 + sum(len(block) + 1 for block in blocks)
    first = 1
    for block in blocks:
        paths = range(first, first + len(block))
        assert not any(topology.reachable(path, other) for path in paths for other in paths if path != other)
        join = first + len(block)
        assert all(topology.reachable(join, segment) for segment in range(join))
        first = join + 1
    order = [step.id for level in levels for chain in level for step in chain]
    assert sorted(order) == sorted(step.id for step in Sample.of(given_sample).steps)
    for step in Sample.of(given_sample).steps:
        assert all(order.index(dep) < order.index(step.id) for dep in step.deps)


@given(samples())
@settings(max_examples=100, deadline=None)
def test_no_text_of_a_sample_can_add_a_control_token(given_sample: dict[str, Any]) -> None:
    bare = {
        "question": "",
        "steps": [{**step, "title": "t", "text": "x"} for step in given_sample["steps"]],
        **{name: "x" if given_sample[name] else "" for name in ("answer", "conclusion", "preamble")},
    }
    for grammar, write in (("medverse", to_medverse), ("multiverse", to_multiverse)):
        pattern = tag_pattern(grammar)
        assert [m[0] for m in pattern.finditer(write(given_sample))] == [m[0] for m in pattern.finditer(write(bare))]


@given(texts)
def test_escaping_leaves_no_control_token_and_keeps_every_other_text(text: str) -> None:
    escaped = escape(text)
    assert not any(tag in escaped for tag in TAGS)
    assert escape(escaped) == escaped
    assert escaped.replace("<\u200b", "<") == text.replace("<\u200b", "<")
    if not any(tag in text for tag in TAGS):
        assert escaped == text


# Orders and levels


def test_steps_are_numbered_in_their_order_where_dependencies_leave_a_choice() -> None:
    given_sample = Sample.of(sample(("d", "c"), ("b", ""), ("a", ""), ("c", "a")))
    assert [step.id for step in given_sample.steps] == ["b", "a", "c", "d"]


def test_chains_become_one_path() -> None:
    levels = Sample.of(sample(("a", ""), ("b", "a"), ("c", "b"), ("x", ""), ("end", "cx"))).levels()
    assert [[[step.id for step in chain] for chain in level] for level in levels] == [
        [["a", "b", "c"], ["x"]],
        [["end"]],
    ]


def test_lost_parallelism_of_the_n_shaped_graph(caplog: pytest.LogCaptureFixture) -> None:
    """a -> c, a -> d, b -> d: c needs only a, but by levels it waits for b too."""
    n = sample(("a", ""), ("b", ""), ("c", "a"), ("d", "ab"))
    for step, length in zip(n["steps"], (1, 10, 10, 2), strict=True):
        step["text"] = "x" * length
    # Dependencies: b then d is 12, a then c 11. Levels: 10 for a and b, 10 for c and d.
    assert Sample.of(n).lost_parallelism() == pytest.approx(20 / 12)
    assert Sample.of(n).lost_parallelism(lambda text: 1) == 1
    with caplog.at_level(logging.WARNING, logger="hf_efficient"):
        logging.getLogger("hf_efficient").addHandler(caplog.handler)
        try:
            to_multiverse(n)
        finally:
            logging.getLogger("hf_efficient").removeHandler(caplog.handler)
    assert "1.67 times" in caplog.text


def test_a_graph_of_levels_loses_nothing() -> None:
    assert Sample.of(DIAMOND).lost_parallelism() == 1


# Bad samples


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (sample(("a", "c"), ("b", "a"), ("c", "b")), "cycle: a -> c -> b -> a"),
        (sample(("a", "a")), "cycle: a -> a"),
        (sample(("a", "z")), "'a' depends on 'z', which is not a step"),
        (sample(("a", ""), ("a", "")), "two steps of the sample have the id 'a'"),
        ({"question": "?", "steps": []}, "at least one step"),
        ({"steps": [{"id": "a", "title": "t"}]}, "has no field question"),
        ({"question": "?", "steps": [{"id": "a"}]}, "step 0 of the sample has no field title"),
        ({"question": "?", "steps": [{"id": "a", "title": " "}]}, "title that are not empty"),
        (
            {"question": "?", "steps": [{"id": 1, "title": "t"}]},
            "field id of step 0 of the sample must be a string, not 1",
        ),
        ({"question": "?", "steps": [{"id": "a", "title": "t", "deps": "b"}]}, "deps of step 'a' must be a list"),
        ({"question": "?", "steps": ["a"]}, "step 0 of the sample must be a JSON object, not str"),
        ([], "must be a JSON object, not list"),
    ],
)
def test_a_malformed_sample_is_one_clear_error(bad: Any, words: str) -> None:
    for write in (to_medverse, to_multiverse):
        with pytest.raises(HFEError, match=words) as error:
            write(bad)
        assert "\n" not in str(error.value)


# Flattening


def test_flattened_texts_keep_what_was_thought() -> None:
    assert flatten(to_multiverse(DIAMOND)).split("\n") == [
        *("Hm.", "Text of a.", "", "Text of b.", "", "Text of c.", "", "Text of d.", "So it is.", "", "Answer: 42")
    ]
    text = flatten(to_medverse(DIAMOND))
    assert [line for line in text.split("\n") if line][:3] == [
        "Hm.",
        "Transient Step 1: Question -> Title a",
        "Text of a.",
    ]
    assert text.endswith("Explanation: So it is.\nAnswer: 42") and "Dependency" not in text


@given(samples())
@settings(max_examples=60, deadline=None)
def test_a_flattened_text_has_no_tags(given_sample: dict[str, Any]) -> None:
    for write in (to_medverse, to_multiverse):
        flat = flatten(write(given_sample))
        assert not any(tag in flat for tag in TAGS)
        assert flatten(flat) == flat


def test_nested_blocks_are_flattened_too() -> None:
    nested = (
        "<Think>a<Parallel><Goal><Outline>1: x</Outline></Goal><Path>1: b<Parallel><Goal>g</Goal><Path>1.1: c</Path>"
        "<Conclusion>no</Conclusion></Parallel>d</Path><Conclusion>no</Conclusion></Parallel>e</Think>"
    )
    assert flatten(nested) == "a b cde"
    assert flatten("plain text, <b>bold</b>") == "plain text, <b>bold</b>"
    assert flatten("<Goal>never closed") == ""


# Entity chains


def test_entity_chains_become_steps_that_need_each_other() -> None:
    steps = entity_chains_to_steps(["fever ->  infection -> drug", "cough -> infection", "age→ drug"])
    assert [(step["title"], step["deps"]) for step in steps] == [
        ("fever, cough -> infection", []),
        ("infection, age -> drug", ["infection"]),
    ]
    text = to_medverse({"question": "?", "steps": steps})
    assert "Transient Step 2: infection, age -> drug; Dependency: [1]" in text
    assert validate(text, "medverse") == []


@pytest.mark.parametrize(
    ("chains", "words"),
    [(["a"], "not of the form"), (["a -> -> b"], "not of the form"), (["a -> b -> a"], "cycle: a -> b -> a")],
)
def test_bad_entity_chains(chains: list[str], words: str) -> None:
    with pytest.raises(HFEError, match=words):
        entity_chains_to_steps(chains)
    assert entity_chains_to_steps([]) == []


# Validation


BLOCK = (
    "<Think>\n<Parallel>\n<Goal>\n<Outline>\n1: a\n</Outline>\n<Outline>\n2: b\n</Outline>\n</Goal>\n"
    "<Path>\n1: x\n</Path>\n<Path>\n2: y\n</Path>\n<Conclusion>\nc\n</Conclusion>\n</Parallel>\n</Think>"
)
STEPS = to_medverse(sample(("a", ""), ("b", "a")))


@pytest.mark.parametrize(
    ("grammar", "old", "new", "line", "words"),
    [
        ("multiverse", "</Think>", "", 1, "<Think>: is never closed"),
        ("multiverse", "x\n</Path>", "x", 11, "<Path>: is not closed before </Parallel>"),
        ("multiverse", "<Path>\n1", "1", 12, "</Path>: closes nothing"),
        ("multiverse", "<Think>", "", 2, "<Parallel>: is not inside any element, but belongs in <Think> or <Path>"),
        ("multiverse", "2: y", "3: y", 2, "has outlines 1, 2 but paths 1, 3"),
        ("multiverse", "2: y", "1: y", 14, "<Path>: repeats the label 1"),
        ("multiverse", "2: b", "b", 7, "<Outline>: must begin with a label"),
        ("multiverse", "<Conclusion>\nc\n</Conclusion>\n", "", 2, "<Parallel>: has no <Conclusion>"),
        ("multiverse", "<Path>\n2", "so\n<Path>\n2", 14, "<Parallel>: contains text outside its elements: 'so'"),
        ("multiverse", "\n</Parallel>", "<Path>3: z</Path>\n</Parallel>", 17, "<Conclusion>: must come last"),
        ("multiverse", "<Goal>\n", "<Goal>and\n", 3, "<Goal>: contains text outside its elements: 'and'"),
        ("medverse", "Dependency: [1]", "Dependency: [2]", 4, "<Outline>: of step 2 depends on itself"),
        ("medverse", "Dependency: [1]", "Dependency: [7]", 4, "depends on step 7, which is not planned"),
        ("medverse", "Dependency: []", "Dependency: [2]", 3, "of step 1 depends on the later step 2"),
        ("medverse", "; Dependency: [1]", "", 4, "of step 2 has no `Dependency: […]`"),
        ("medverse", "<Outline> Transient Step 2", "<Outline> Transient Step 1", 4, "repeats the number 1"),
        ("medverse", "<Step> Transient Step 2", "<Step> Transient Step 1", 10, "repeats the number 1"),
        ("medverse", "<Step> Transient Step 2", "<Step> Transient Step 3", 10, "<Step>: 3 is not in the plan"),
        ("medverse", "<Step> Transient Step 2", "<Step> Transient Step 3", 6, "lacks the planned step 2"),
        ("medverse", "a -> Title b\nT", "a -> Title z\nT", 10, "<Step>: 2 has the title"),
        ("medverse", "<Step> Transient Step 2", "<Step> Step 2", 10, "<Step>: must begin with"),
        ("medverse", "Text of a.", "<Outline>x</Outline>", 8, "<Outline>: is inside <Step>, but belongs in <Plan>"),
        ("medverse", "<Conclusion>", "<Plan></Plan><Conclusion>", 14, "<Plan>: is the second of the text"),
    ],
)
def test_each_fault_is_found_at_its_line(grammar: str, old: str, new: str, line: int, words: str) -> None:
    sound = BLOCK if grammar == "multiverse" else STEPS
    assert validate(sound, grammar) == [] and old in sound
    text = sound.replace(old, new, 1)
    issues = validate(text, grammar)
    found = [issue for issue in issues if words in str(issue)]
    assert found, [str(issue) for issue in issues]
    assert found[0].line == line == text.count("\n", 0, found[0].offset) + 1
    assert [issue.offset for issue in issues] == sorted(issue.offset for issue in issues)


@pytest.mark.parametrize(
    "read",
    [
        lambda: validate(3, "medverse"),  # type: ignore[arg-type]
        lambda: flatten(None),  # type: ignore[arg-type]
        lambda: entity_chains_to_steps([3]),  # type: ignore[list-item]
        lambda: entity_chains_to_steps("a -> b"),
    ],
)
def test_what_is_no_text_or_one_text_too_few_is_a_usage_error(read: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match="pass a str|pass a list of chains"):
        read()


def test_an_unknown_grammar_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="grammar='xml' is unknown"):
        validate("", "xml")


@given(samples(), st.data())
@settings(max_examples=200, deadline=None)
def test_the_validator_passes_nothing_that_the_reader_refuses(
    given_sample: dict[str, Any], data: st.DataObject
) -> None:
    """Tags of a sound text are removed, repeated and exchanged."""
    grammar, write = data.draw(st.sampled_from([("medverse", to_medverse), ("multiverse", to_multiverse)]))
    text = write(given_sample)
    pieces = re.split(f"({tag_pattern(grammar).pattern.replace('(', '(?:')})", text)
    places = range(1, len(pieces), 2)
    change = data.draw(st.sampled_from(["remove", "repeat", "exchange"]))
    one, other = data.draw(st.sampled_from(places)), data.draw(st.sampled_from(places))
    if change == "exchange":
        pieces[one], pieces[other] = pieces[other], pieces[one]
    else:
        pieces[one] = "" if change == "remove" else 2 * pieces[one]
    changed = "".join(pieces)
    issues = validate(changed, grammar)
    assert all(0 <= issue.offset <= len(changed) and issue.line >= 1 for issue in issues)
    if change == "exchange" and changed == text:
        assert not issues
    elif change != "exchange":
        assert issues
    if not issues:
        parse(changed, grammar)


@given(st.lists(st.one_of(words, st.text(max_size=3)), max_size=25).map("".join))
def test_the_validator_answers_whatever_the_text(text: str) -> None:
    for grammar in CONTROL_TOKENS:
        if not validate(text, grammar):
            parse(text, grammar)
