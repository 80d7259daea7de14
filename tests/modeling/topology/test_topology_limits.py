"""Limits of a sequence: budgets in positions and tokens, limits of branches, closing in time for the joins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hf_efficient.errors import UsageError
from hf_efficient.modeling.topology.generation.branches import all_branches
from hf_efficient.modeling.topology.generation.limits import Limits
from hf_efficient.modeling.topology.generation.scheduler import SequenceScheduler
from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder
from hf_efficient.modeling.topology.grammar.forced_text import ForcedText

EOS = 1
BLOCK = "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
PATH = "<Path>1: x</Path>"
INNER = "<Parallel><Goal><Outline>2.1: c</Outline><Outline>2.2: d</Outline></Goal>"


def test_with_one_branch_at_once_the_text_comes_in_its_order(course: Callable[..., Any]) -> None:
    scripts = {(): f"{BLOCK}z", ("1",): "u</Path>", ("2",): f"v{INNER}w</Conclusion></Parallel>y</Path>"}
    scripts |= {("2", "2.1"): "p</Path>", ("2", "2.2"): "q</Path>"}
    found = course("multiverse", scripts, max_branches=1)
    assert found.slots == sorted(found.slots)


def test_plain_text_gets_exactly_its_budget(course: Callable[..., Any]) -> None:
    for budget in ("positions", "tokens"):
        found = course("multiverse", {(): "a" * 60}, max_new_tokens=25, budget=budget)
        assert found.row.num_generated_tokens == found.passes == 25
        assert found.row.finish_reason == "length"


def test_branches_that_run_on_are_closed_in_time_for_the_joins_above(course: Callable[..., Any]) -> None:
    scripts = {(): BLOCK, ("2",): INNER}
    found = course("multiverse", scripts, max_new_tokens=100, end=False)
    assert found.row.critical_path == 100
    assert found.text.endswith("x</Path>\n<Conclusion>\n</Parallel></Path>\n<Conclusion>\n")
    assert {branch.finish_reason for branch in all_branches(found.row.trunk)} == {"length"}


@pytest.mark.parametrize("budget", ["positions", "tokens"])
def test_a_block_opens_only_where_it_can_be_closed(course: Callable[..., Any], budget: str) -> None:
    """A path that opens blocks without end: whatever is left, all of them are closed within the budget."""
    for most in range(30, 70):
        scripts = {(): BLOCK, ("1",): "ab" + "<Parallel>" * 60, ("2",): "<Parallel><Path>" * 30}
        found = course("multiverse", scripts, max_new_tokens=most, budget=budget, min_fork_budget=0, end=False)
        assert found.text.count("<Parallel>") <= 1 + found.text.count("</Parallel>")


def test_a_budget_of_tokens_closes_all_branches_together(course: Callable[..., Any]) -> None:
    found = course("multiverse", {(): BLOCK}, max_new_tokens=100, budget="tokens", end=False)
    assert found.row.num_generated_tokens == 100
    assert abs(found.branch("1").num_sampled_tokens - found.branch("2").num_sampled_tokens) <= 1


def test_a_branch_has_its_own_limit(course: Callable[..., Any]) -> None:
    found = course("multiverse", {(): f"{BLOCK}so", ("1",): "u</Path>"}, branch_max_new_tokens=7)
    assert (found.branch("1").num_sampled_tokens, found.branch("1").finish_reason) == (2, "")
    assert (found.branch("2").num_sampled_tokens, found.branch("2").finish_reason) == (7, "branch_max_new_tokens")


def test_stopping_everything_closes_what_is_open(course: Callable[..., Any], toy: Callable) -> None:
    vocabulary = toy("multiverse")
    builder = TopologyBuilder("multiverse", vocabulary.token_ids, strict=False, decode=vocabulary.decode)
    forced = ForcedText("multiverse", vocabulary.token_ids, vocabulary.encode)
    row = SequenceScheduler(0, vocabulary.encode(f"Q{BLOCK}"), builder, forced, Limits(500))
    row.schedule()
    for text in (INNER, "xxxx"):
        for token in vocabulary.encode(text):
            row.accept([token] * len(row.active_branches))
            row.schedule()
    assert len(row.active_branches) == 4
    row.stop_all("max_time")
    assert row.finish_reason == "max_time" and not row.active_branches
    text = vocabulary.decode([row.tokens[c] for c in row.slots_in_text_order()])
    assert text.count("<Path>") == text.count("</Path>") == 6
    assert text.count("<Conclusion>") == 3


@pytest.mark.parametrize(
    "limits",
    [{"max_new_tokens": 0}, {"max_branches": 0}, {"max_depth": -1}, {"budget": "words"}, {"branch_max_new_tokens": 0}],
)
def test_limits_without_sense_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(limits))):
        Limits(**({"max_new_tokens": 5} | limits))
