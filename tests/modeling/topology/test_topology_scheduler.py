"""The scheduler with scripted tokens: forks, joins, dependencies, refused forks and random tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_efficient.errors import HFEError
from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.generation.branches import Branch, all_branches
from hf_efficient.modeling.topology.grammar.forced_text import ForcedText

EOS = 1
BLOCK = "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
PATH = "<Path>1: x</Path>"
INNER = "<Parallel><Goal><Outline>2.1: c</Outline><Outline>2.2: d</Outline></Goal>"


def plan(steps: dict[int, list[int]]) -> str:
    outlines = "".join(f"<Outline> Transient Step {n}: A -> {n}; Dependency: {d} </Outline>" for n, d in steps.items())
    return f"<Plan>{outlines}</Plan>"


DIAMOND = plan({1: [], 2: [1], 3: [], 4: [2, 3]})


# Forks and joins


def test_paths_fork_and_join_with_their_headers_and_conclusion(course: Callable[..., Any]) -> None:
    found = course("multiverse", {(): f"t{BLOCK}so", ("1",): " u</Path>", ("2",): " vvv</Path>"})
    assert found.text == (f"Q\nt{BLOCK}\n<Path>\n1: u</Path>\n<Path>\n2: vvv</Path>\n<Conclusion>\nso<eos>")
    graph = found.row.graph
    assert graph.parents == [[], [0], [0], [1, 2]]
    assert graph.start[1] == graph.start[2] == graph.end[0] + 1, "both paths begin behind the trunk"
    assert graph.start[3] == max(graph.end[1], graph.end[2]) + 1


def test_a_fork_takes_one_pass_and_a_join_goes_with_the_last_closing_tag(course: Callable[..., Any]) -> None:
    found = course("multiverse", {(): f"{BLOCK}s", ("1",): "</Path>", ("2",): "</Path>"})
    header, tail = len("\n") + 2 * (2 + len("1:")), 2 * len(["</Path>", "\n"]) + len(["<Conclusion>", "\n"])
    fork = next(i for i, slots in enumerate(found.computed) if i > 0 and len(slots) > 1)
    assert len(found.computed[fork]) == 1 + header
    assert len(found.computed[fork + 1]) == tail


def test_nested_blocks_join_inside_out(course: Callable[..., Any]) -> None:
    scripts = {
        (): f"{BLOCK}z</Conclusion></Parallel>end",
        ("1",): "uuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuu</Path>",
        ("2",): f"v{INNER}w</Conclusion></Parallel>y</Path>",
        ("2", "2.1"): "p</Path>",
        ("2", "2.2"): "qqqq</Path>",
    }
    found = course("multiverse", scripts)
    assert [found.row.graph.labels[s] for s in range(len(found.row.graph))] == [
        *("root", "1", "2", "2.1", "2.2", "2.join", "join")
    ]
    assert found.row.graph.parents[5:] == [[3, 4], [1, 5]]
    assert not found.row.trunk.builder.warnings


def test_the_second_block_of_a_branch_has_another_path(course: Callable[..., Any]) -> None:
    text = f"{BLOCK}</Conclusion></Parallel>{BLOCK}</Conclusion></Parallel>"
    found = course("multiverse", {(): text, ("1",): "u</Path>", ("2",): "v</Path>"})
    assert [branch.path for branch in all_branches(found.row.trunk)] == [
        *((), ((0, "1"),), ((0, "2"),), ((1, "1"),), ((1, "2"),))
    ]


def test_one_outline_makes_a_chain(course: Callable[..., Any]) -> None:
    found = course(
        "multiverse", {(): "<Parallel><Goal><Outline>1: a</Outline></Goal>s</Conclusion>", ("1",): " u</Path>"}
    )
    assert found.row.critical_path == found.row.num_generated_tokens


def test_a_step_begins_when_its_own_needs_are_done(course: Callable[..., Any]) -> None:
    """Step 2 needs step 1 alone, so it does not wait for the long step 3."""
    scripts = {(): f"{DIAMOND}so", ("1",): "a</Step>", ("2",): "b</Step>", ("3",): "c" * 60 + "</Step>"}
    found = course("medverse", scripts | {("4",): "d</Step>"})
    end_of_3 = next(i for i, c in enumerate(found.computed) if found.branch("3").last_slot in c)
    assert found.first_pass("1") == found.first_pass("3") < found.first_pass("2") < end_of_3
    assert found.first_pass("4") == end_of_3, "it begins in the pass that takes the last closing tag"
    assert found.text.endswith("</Step>\n</Execution>\n<Conclusion>\nso<eos>")
    assert "<Execution>\n<Step> Transient Step 1: A -> 1\na</Step>\n<Step> Transient Step 2: A -> 2\nb" in found.text


@pytest.mark.parametrize(("mode", "levels"), [("dag", [0, 1, 0, 2]), ("layers", [0, 1, 1, 2]), ("flat", [0, 0, 0, 0])])
def test_modes_decide_what_a_step_waits_for(course: Callable[..., Any], mode: str, levels: list[int]) -> None:
    scripts = {(str(n),): "a</Step>" for n in range(1, 5)} | {(): f"{DIAMOND}so"}
    found = course("medverse", scripts, mode=mode)
    begins = [found.first_pass(str(n)) for n in range(1, 5)]
    assert [sorted(set(begins)).index(begin) for begin in begins] == levels


@pytest.mark.parametrize("prompt", [f"Q{DIAMOND}", f"Q{DIAMOND}\n", f"Q{DIAMOND}\n<Execution>\n"])
def test_a_prompt_that_ends_with_a_plan_begins_its_steps(course: Callable[..., Any], prompt: str) -> None:
    found = course("medverse", {(str(n),): "a</Step>" for n in range(1, 5)} | {(): "so"}, prompt=prompt)
    assert found.text.startswith(f"Q{DIAMOND}\n<Execution>\n<Step> Transient Step 1: A -> 1\na</Step>\n<Step>")
    assert found.passes < 2 + 3 * 3 + 3


@pytest.mark.parametrize("prompt", [f"Q{BLOCK}", f"Q{BLOCK}\n"])
def test_a_prompt_that_ends_with_a_goal_begins_its_paths(course: Callable[..., Any], prompt: str) -> None:
    found = course("multiverse", {("1",): "u</Path>", ("2",): "v</Path>", (): "so"}, prompt=prompt)
    assert found.text == f"Q{BLOCK}\n<Path>\n1:u</Path>\n<Path>\n2:v</Path>\n<Conclusion>\nso<eos>"


def test_a_prompt_with_finished_blocks_goes_on_behind_them(course: Callable[..., Any]) -> None:
    block = f"{BLOCK}\n<Path>\n1: uuu</Path>\n<Path>\n2: v</Path>\n<Conclusion>\nz</Conclusion></Parallel>"
    found = course("multiverse", {(): f"t{BLOCK}so", ("1",): "u</Path>", ("2",): "v</Path>"}, prompt=f"Q{block}R\n")
    assert len(found.row.graph) == 7
    # A second execution in one row, with the same numbers again.
    done = course("medverse", {(str(n),): "a</Step>" for n in range(1, 5)} | {(): f"{DIAMOND}so"}).text[:-5]
    again = course("medverse", {(str(n),): "b</Step>" for n in range(1, 5)} | {(): f"{DIAMOND}so"}, prompt=f"{done}R")
    assert again.text.count("<Step>") == 8


def test_a_prompt_inside_an_open_path_goes_on_in_it(course: Callable[..., Any]) -> None:
    found = course("multiverse", {(): "uu</Path>\n<Path>\n2: v</Path><Conclusion>"}, prompt=f"Q{BLOCK}\n<Path>\n1: ")
    assert found.row.graph.parents == [[], [0], [0], [1, 2]]


@pytest.mark.parametrize(
    ("end", "warned"),
    [
        (BLOCK, False),
        (f"{BLOCK}<Path>1: x", True),
        (f"{BLOCK}{PATH}", True),
        (f"{BLOCK}{PATH}<Path>2: y</Path>", True),
        (f"{BLOCK}{PATH}<Path>2: y</Path><Conclusion>c", False),
        (f"{BLOCK}{PATH}<Path>2: {INNER}", True),
    ],
)
def test_a_prompt_that_ends_among_branches_gives_a_warning(course: Callable[..., Any], end: str, warned: bool) -> None:
    """Nothing is forced in the rest of such a block, although a trained model needs the forced tokens."""
    warnings = course("multiverse", {}, prompt=f"Q{end}", max_new_tokens=60).row.trunk.builder.warnings
    assert any("ends inside the branches" in warning for warning in warnings) is warned


@pytest.mark.parametrize("between", ["", "\n"])
def test_a_prompt_may_end_where_steps_begin_and_not_where_they_are_joined(
    course: Callable[..., Any], between: str
) -> None:
    scripts: dict[Any, str] = {(str(n),): "a</Step>" for n in range(1, 5)} | {(): "so"}
    whole = course("medverse", scripts | {(): f"{DIAMOND}so"}).text
    begun = whole[whole.index(DIAMOND) :].split("<Execution>")[0] + "<Execution>"
    found = course("medverse", scripts, prompt=f"Q{begun}{between}")
    assert found.text == f"Q{whole[whole.index(DIAMOND) :]}" and not found.row.trunk.builder.warnings
    ended = whole[: whole.index("</Execution>")] + "</Execution>"
    warnings = course("medverse", {}, prompt=f"{ended}{between}", max_new_tokens=60).row.trunk.builder.warnings
    assert any("ends inside the branches" in warning for warning in warnings)


# Refused forks and unexpected tokens


@pytest.mark.parametrize(
    ("outlines", "limits", "reason"),
    [
        ("<Outline>1: a</Outline><Outline>1: b</Outline>", {}, "labelled"),
        ("<Outline>a</Outline><Outline>2: b</Outline>", {}, "labelled"),
        ("", {}, "labelled"),
        ("<Outline>1: a</Outline>", {"max_depth": 0}, "deep"),
        ("<Outline>1: a</Outline>", {"max_new_tokens": 35}, "left"),
        ("<Outline>1: a</Outline>", {"max_new_tokens": 35, "budget": "tokens"}, "left"),
    ],
)
def test_a_refused_fork_goes_on_as_text(
    course: Callable[..., Any], outlines: str, limits: dict[str, Any], reason: str
) -> None:
    text = f"<Parallel><Goal>{outlines}</Goal><Path>1: u</Path><Path>2: v</Path><Conclusion>"
    found = course("multiverse", {(): text}, **limits)
    assert found.passes == found.row.num_generated_tokens, "one token a pass"
    assert any("fork rejected" in warning and reason in warning for warning in found.row.trunk.builder.warnings)
    assert len(found.row.graph) > 2, "the paths are segments all the same"


def test_a_deep_block_is_refused_and_its_path_still_closed(course: Callable[..., Any]) -> None:
    scripts = {(): f"{BLOCK}z", ("1",): "u</Path>", ("2",): f"v{INNER}<Path>2.1: p</Path>"}
    found = course("multiverse", scripts, max_depth=1, max_new_tokens=90)
    assert found.branch("2").finish_reason == "length"
    assert "2.1: p</Path>" in found.text
    assert found.text.count("<Parallel>") == 2 and found.text.count("</Parallel>") == 1


@pytest.mark.parametrize("stranger", ["<Path>", "<Conclusion>", "</Parallel>", "<eos>"])
def test_a_token_that_cannot_stand_in_a_path_ends_it(course: Callable[..., Any], toy: Callable, stranger: str) -> None:
    token = EOS if stranger == "<eos>" else toy("multiverse").token_ids[stranger]

    def choose(branch: Branch) -> int:
        vocabulary = toy("multiverse")
        if branch.parent is None:
            return [*vocabulary.encode(BLOCK), EOS][branch.num_sampled_tokens]
        return token if branch.path[-1][1] == "1" else vocabulary.token_ids["</Path>"]

    found = course("multiverse", choose)
    assert found.branch("1").finish_reason == ("eos" if token == EOS else stranger)
    assert found.branch("2").finish_reason == ""
    assert found.text == f"Q\n{BLOCK}\n<Path>\n1:</Path>\n<Path>\n2:</Path>\n<Conclusion>\n<eos>"


@pytest.mark.parametrize("stranger", ["<Step>", "<Conclusion>", "</Execution>"])
def test_a_token_that_cannot_stand_in_a_step_ends_it(course: Callable[..., Any], stranger: str) -> None:
    found = course("medverse", {(): f"{DIAMOND}so"} | {(str(n),): f"a{stranger}" for n in range(1, 5)})
    assert [found.branch(str(n)).finish_reason for n in range(1, 5)] == [stranger] * 4
    assert found.text.count("</Step>") == 4


def test_a_plan_with_a_repeated_step_is_not_run(course: Callable[..., Any]) -> None:
    repeated = "<Plan>" + 2 * "<Outline> Transient Step 1: A -> B; Dependency: [] </Outline>" + "</Plan>"
    found = course("medverse", {(): f"{repeated}<Execution><Step> Transient Step 1: a\nx</Step></Execution>"})
    assert any("fork rejected, step 1" in warning for warning in found.row.trunk.builder.warnings)


@pytest.mark.parametrize("steps", [{1: [7], 2: []}, {1: [2], 2: [1]}, {1: [1], 2: []}, {2: [], 1: [2]}])
def test_steps_of_a_broken_plan_wait_for_those_before_them(course: Callable[..., Any], steps: dict) -> None:
    found = course("medverse", {(): f"{plan(steps)}so"} | {(str(n),): "a</Step>" for n in steps})
    assert found.text.count("</Step>") == 2


def test_a_plan_with_little_budget_runs_one_step_at_a_time(course: Callable[..., Any]) -> None:
    scripts = {(str(n),): "a</Step>" for n in (1, 2)} | {(): f"{plan({1: [], 2: []})}so"}
    found = course("medverse", scripts, min_fork_budget=10**6)
    assert found.first_pass("2") > found.first_pass("1")
    assert found.text == course("medverse", scripts).text


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_fewer_branches_at_once_give_the_same_text(course: Callable[..., Any], limit: int) -> None:
    scripts = {
        (): f"{BLOCK}z</Conclusion></Parallel>",
        ("1",): "uuu</Path>",
        ("2",): f"v{INNER}w</Conclusion></Parallel>y</Path>",
        ("2", "2.1"): "p</Path>",
        ("2", "2.2"): "qqqq</Path>",
    }
    wide, narrow = course("multiverse", scripts), course("multiverse", scripts, max_branches=limit)
    assert wide.text == narrow.text
    assert [wide.row.positions[c] for c in wide.slots] == [narrow.row.positions[c] for c in narrow.slots]
    assert max(len(narrow.computed[i]) for i in range(narrow.passes)) <= max(map(len, wide.computed))
    steps = {(str(n),): "a" * n + "</Step>" for n in range(1, 5)} | {(): f"{DIAMOND}so"}
    assert course("medverse", steps).text == course("medverse", steps, max_branches=limit).text


def test_steps_without_budget_are_left_out_with_those_that_need_them(course: Callable[..., Any]) -> None:
    chain = plan({1: [], 2: [1], 3: [2], 4: []})
    found = course("medverse", {(): chain, ("4",): "a</Step>"}, max_new_tokens=len(chain) + 10, end=False)
    assert [found.branch(str(n)).state.value for n in range(1, 5)] == ["done", "skipped", "skipped", "done"]
    assert any("was not started" in warning for warning in found.row.trunk.builder.warnings)


def test_a_tokenizer_of_another_model_is_refused(toy: Callable) -> None:
    vocabulary = toy("multiverse")
    with pytest.raises(TopologyError, match="encodes"):
        ForcedText("multiverse", vocabulary.token_ids, lambda text: [99, *vocabulary.encode(text)])


def test_headers_hold_no_tag_but_their_own(toy: Callable) -> None:
    vocabulary = toy("medverse")
    forced = ForcedText("medverse", vocabulary.token_ids, vocabulary.encode)
    header = forced.step_header(3, "A <Step>\n-> B")
    assert vocabulary.decode(header) == "<Step> Transient Step 3: A  -> B\n"


def test_bitmaps_of_many_segments(course: Callable[..., Any]) -> None:
    outlines = "".join(f"<Outline>{n}: a</Outline>" for n in range(1, 151))
    scripts = {(str(n),): "u</Path>" for n in range(1, 151)}
    found = course("multiverse", scripts | {(): f"<Parallel><Goal>{outlines}</Goal>so"}, max_new_tokens=5000)
    row = found.row
    words = np.frombuffer(row.bitmaps(range(len(row.graph)), 3), dtype="<i8").reshape(-1, 3)
    seen = np.array([[words[s, t // 64] >> (t % 64) & 1 for t in range(152)] for s in range(152)]).astype(bool)
    expected = np.eye(152, dtype=bool)
    expected[:, 0] = expected[151] = True
    assert np.array_equal(seen, expected)


# Random tokens


@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    grammar=st.sampled_from(["multiverse", "medverse"]),
    mode=st.sampled_from(["dag", "layers", "flat"]),
    budget=st.sampled_from(["positions", "tokens"]),
    max_new_tokens=st.integers(1, 160),
    max_branches=st.integers(1, 5),
    max_depth=st.integers(0, 3),
    min_fork_budget=st.integers(0, 30),
    branch_max_new_tokens=st.one_of(st.none(), st.integers(1, 20)),
)
def test_random_tokens_keep_the_invariants(
    course: Callable[..., Any], toy: Callable, seed: int, grammar: str, mode: str, **limits: Any
) -> None:
    """Tags in any order, forks among them: what `check_run` of conftest.py tests holds."""
    rng = random.Random(seed)
    vocabulary = toy(grammar)
    if grammar == "multiverse":
        pieces = [BLOCK, INNER, "</Path>", "</Conclusion></Parallel>", *vocabulary.token_ids]
    else:
        pieces = [DIAMOND, plan({1: [2], 2: [], 3: [9]}), "</Step>", "</Step>", *vocabulary.token_ids]
    pieces += ["x", "1: y\n"] * 5
    waiting: dict[int, list[int]] = {}

    def choose(branch: Branch) -> int:
        ids = waiting.setdefault(id(branch), [])
        if not ids:
            ids += [EOS] if rng.random() < 0.02 else vocabulary.encode(rng.choice(pieces))
        return ids.pop(0)

    course(grammar, choose, mode=mode, prompt=rng.choice(["Q", f"Q{pieces[0]}", f"Q{rng.choice(pieces)}"]), **limits)


def test_errors_are_ours() -> None:
    assert issubclass(TopologyError, HFEError)
