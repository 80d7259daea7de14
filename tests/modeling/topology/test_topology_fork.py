"""Cursors of a fork: tokens fed in parallel get the segments and positions that reading the text gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder
from hf_efficient.modeling.topology.grammar.control_tokens import (
    CONTROL_TOKENS,
    MODES,
)
from hf_efficient.modeling.topology.grammar.plan import step_schedule

GRAMMARS = list(CONTROL_TOKENS)
TEXTS = 500


def decode_in_parallel(builder: TopologyBuilder, ids: list[int], tags: dict[str, int]) -> Iterator[tuple[int, Any]]:
    """Feed a text as a generator does: every branch a cursor, all of them in turn. Yields (index, placement)."""
    names = {token: tag for tag, token in tags.items()}
    steps = "<Step>" in tags
    opener, joiner = ("<Step>", "</Execution>") if steps else ("<Path>", "<Conclusion>")
    i = 0
    while i < len(ids):
        if names.get(ids[i]) != opener:
            yield i, builder.feed(ids[i])
            i += 1
            continue
        branches, depth, last = [], 0, None
        while True:  # the span of each branch, with the separator behind it
            tag = names.get(ids[i])
            if tag in ("<Parallel>", "</Parallel>"):
                depth += 1 if tag == "<Parallel>" else -1
            if depth == 0 and tag == opener:
                if last is not None:
                    branches.append((last, i))
                last = i
            if depth == 0 and tag == joiner:
                branches.append((last, i))
                break
            i += 1
        children = builder.fork(list(builder.plan) if steps else len(branches))
        if steps:
            yield from _frontier(builder, children, branches, ids)
        else:
            spans = zip(children, branches, strict=True)
            yield from _in_turns([_feed_branch(child, first, ids[first:stop], tags) for child, (first, stop) in spans])
        builder.join(children)


def _feed_branch(child: TopologyBuilder, first: int, ids: list[int], tags: dict[str, int]) -> Iterator[tuple[int, Any]]:
    yield first, child.feed(ids[0])
    for k, placed in decode_in_parallel(child, ids[1:], tags):
        yield first + 1 + k, placed


def _in_turns(running: list[Any]) -> Iterator[tuple[int, Any]]:
    while running:
        for one in list(running):
            step = next(one, None)
            if step is None:
                running.remove(one)
            else:
                yield step


def _frontier(
    builder: TopologyBuilder, children: list[TopologyBuilder], branches: list[tuple[int, int]], ids: list[int]
) -> Iterator[tuple[int, Any]]:
    """A step runs as soon as those that it waits for are done, the last of the plan first."""
    numbers = list(builder.plan)
    schedule = step_schedule(builder.parsed_plan, builder.mode)
    done: set[int] = set()
    fed = dict.fromkeys(numbers, 0)
    while len(done) < len(numbers):
        for number, child, (first, stop) in reversed(list(zip(numbers, children, branches, strict=True))):
            if number not in done and set(schedule[number]) <= done:
                at = first + fed[number]
                yield at, child.feed(ids[at], step=number if fed[number] == 0 else None)
                fed[number] += 1
                if first + fed[number] == stop:
                    done.add(number)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grammar", GRAMMARS)
def test_decoding_in_parallel_places_tokens_as_reading_does(
    grammar: str, mode: str, toy: Callable, random_text: Callable
) -> None:
    """Segments may be numbered otherwise; positions, and who sees whom, may not differ."""
    vocabulary, forks = toy(grammar), 0
    for seed in range(150):
        text = random_text(grammar, seed, True)
        ids = vocabulary.encode(text)
        expected = vocabulary.parse_ids(ids, mode=mode)
        builder = TopologyBuilder(grammar, vocabulary.token_ids, mode=mode, decode=vocabulary.decode)
        placed = dict(decode_in_parallel(builder, ids, vocabulary.token_ids))
        assert sorted(placed) == list(range(len(ids)))
        assert [placed[i].position for i in range(len(ids))] == expected.position_ids.tolist(), text
        same = dict(zip(expected.segment_ids.tolist(), (placed[i].segment for i in range(len(ids))), strict=True))
        assert [same[s] for s in expected.segment_ids.tolist()] == [placed[i].segment for i in range(len(ids))]
        for segment, parents in enumerate(expected.parents):
            assert {same[p] for p in parents} == set(builder.graph.parents[same[segment]]), text
            assert builder.graph.labels[same[segment]] == expected.labels[segment]
        forks += same != {s: s for s in same}
    assert forks > 20 or mode == "layers"


def test_a_broken_plan_is_scheduled_as_it_is_read(toy: Callable, plan_text: Callable) -> None:
    """A step that needs an unknown one waits for all before it in the plan, however late it starts."""
    vocabulary, plan = toy("medverse"), {1: [], 2: [9], 3: [], 4: [3], 5: [5]}
    ids = vocabulary.encode(plan_text(plan))
    for mode in MODES:
        expected = vocabulary.parse_ids(ids, mode=mode, strict=False)
        builder = TopologyBuilder("medverse", vocabulary.token_ids, mode=mode, strict=False, decode=vocabulary.decode)
        placed = dict(decode_in_parallel(builder, ids, vocabulary.token_ids))
        assert [placed[i].position for i in range(len(ids))] == expected.position_ids.tolist()
        same = dict(zip(expected.segment_ids.tolist(), (placed[i].segment for i in range(len(ids))), strict=True))
        for segment, parents in enumerate(expected.parents):
            assert {same[p] for p in parents} == set(builder.graph.parents[same[segment]])
        assert expected.warnings
    assert vocabulary.parse_ids(ids, mode="dag", strict=False).parents[1:6] == [[0], [1], [0], [3], [1, 2, 3, 4]]


def test_a_step_may_not_open_before_those_it_waits_for(toy: Callable, plan_text: Callable) -> None:
    vocabulary = toy("medverse")
    builder = TopologyBuilder("medverse", vocabulary.token_ids, decode=vocabulary.decode)
    builder.feed_many(vocabulary.encode(plan_text({1: [], 2: [1]}).split("<Step>")[0]))
    _, second = builder.fork([1, 2])
    with pytest.raises(TopologyError, match="step 2 opens before a step that it depends on"):
        second.feed(vocabulary.token_ids["<Step>"], step=2)
