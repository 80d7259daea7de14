"""Malformed texts: strict reading raises with the tag and its index, lenient reading warns and continues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.grammar.builder import TopologyBuilder
from hf_efficient.modeling.topology.grammar.cursor import MAX_DEPTH
from hf_efficient.modeling.topology.grammar.segment_graph import MAX_SEGMENTS

GOAL = "<Goal><Outline>1: x</Outline><Outline>2: y</Outline></Goal>"
TWO = f"<Parallel>{GOAL}<Path>1: a</Path><Path>2: b</Path>"
END = "<Conclusion>c</Conclusion></Parallel>"
# What two paths and their join follow.
FORK = [[], [0], [0], [1, 2]]

# Name: text, where the error is (the text before the tag), the tag, a part of the message, parents when lenient.
MULTIVERSE: dict[str, tuple[str, str, str, str, list[list[int]]]] = {
    "closing-path-alone": ("a</Path>b", "a", "</Path>", "no path is open", [[]]),
    "closing-block-alone": ("a</Parallel>b", "a", "</Parallel>", "no block is open", [[]]),
    "conclusion-alone": ("a<Conclusion>b", "a", "<Conclusion>", "no block is open", [[]]),
    "path-outside": ("a<Path>b", "a", "<Path>", "outside a block", [[]]),
    "path-closed-twice": (f"{TWO}</Path>{END}", TWO, "</Path>", "no path is open", FORK),
    "path-in-a-path": (
        f"<Parallel>{GOAL}<Path>1: a<Path>2: b</Path>{END}",
        f"<Parallel>{GOAL}<Path>1: a",
        "<Path>",
        "inside another",
        FORK,
    ),
    "conclusion-in-a-path": (
        f"<Parallel>{GOAL}<Path>1: a</Path><Path>2: b{END}",
        f"<Parallel>{GOAL}<Path>1: a</Path><Path>2: b",
        "<Conclusion>",
        "still open",
        FORK,
    ),
    "block-closed-in-a-path": (
        f"<Parallel>{GOAL}<Path>1: a</Path><Path>2: b</Parallel>d",
        f"<Parallel>{GOAL}<Path>1: a</Path><Path>2: b",
        "</Parallel>",
        "still open",
        FORK,
    ),
    "no-conclusion": (f"{TWO}</Parallel>d", TWO, "</Parallel>", "no conclusion", FORK),
    "second-conclusion": (f"{TWO}<Conclusion>c{END}", f"{TWO}<Conclusion>c", "<Conclusion>", "already", FORK),
    "path-after-the-conclusion": (
        f"{TWO}<Conclusion>c<Path>3: d</Path></Parallel>",
        f"{TWO}<Conclusion>c",
        "<Path>",
        "outside a block",
        FORK,
    ),
    "no-path": (f"a<Parallel>{GOAL}{END}", f"a<Parallel>{GOAL}", "<Conclusion>", "no path", [[]]),
    "no-path-no-conclusion": (f"<Parallel>{GOAL}</Parallel>", f"<Parallel>{GOAL}", "</Parallel>", "no path", [[]]),
    "too-few-paths": (
        f"<Parallel>{GOAL}<Path>1: a</Path>{END}",
        f"<Parallel>{GOAL}<Path>1: a</Path>",
        "<Conclusion>",
        "2 outlines and 1 paths",
        [[], [0], [1]],
    ),
    "too-many-paths": (
        f"{TWO}<Path>3: b</Path>{END}",
        f"{TWO}<Path>3: b</Path>",
        "<Conclusion>",
        "2 outlines and 3 paths",
        [[], [0], [0], [0], [1, 2, 3]],
    ),
    "no-goal": (
        f"<Parallel><Path>1: a</Path>{END}",
        "<Parallel><Path>1: a</Path>",
        "<Conclusion>",
        "0 outlines and 1 paths",
        [[], [0], [1]],
    ),
    "outlines-with-one-label": (
        f"{TWO}{END}".replace("<Outline>2:", "<Outline>1:"),
        "<Parallel><Goal><Outline>1: x</Outline><Outline>1: y</Outline>",
        "</Goal>",
        "two outlines are labelled 1",
        FORK,
    ),
    "paths-with-one-label": (
        f"<Parallel>{GOAL}<Path>1: a</Path><Path>1: b</Path>{END}",
        f"<Parallel>{GOAL}<Path>1: a</Path>",
        "<Path>",
        "two paths are labelled 1",
        FORK,
    ),
    "block-between-paths": (
        f"<Parallel>{GOAL}<Path>1: a</Path>{TWO}{END}<Path>2: b</Path>{END}",
        f"<Parallel>{GOAL}<Path>1: a</Path>",
        "<Parallel>",
        "beside the paths",
        # The inner block belongs to the path before it: 4 is its join, 5 the second path, 6 the join of 4 and 5.
        [[], [0], [1], [1], [2, 3], [0], [4, 5]],
    ),
}


def plan(**needed: str) -> str:
    outlines = "".join(
        f"<Outline>Transient Step {n[1:]}: A -> B; Dependency: [{d}]</Outline>" for n, d in needed.items()
    )
    return f"<Plan>{outlines}</Plan>"


def step(number: object) -> str:
    return f"<Step>Transient Step {number}: A -> B\nx</Step>"


def executed(planned: str, *numbers: object) -> tuple[str, str]:
    """The whole text, and the part before its last step."""
    start = f"a{planned}<Execution>"
    steps = [step(number) for number in numbers]
    return f"{start}{''.join(steps)}</Execution><Conclusion>c</Conclusion>", start + "".join(steps[:-1])


FREE = plan(_1="", _2="")
_UNPLANNED, _BEFORE_UNPLANNED = executed(FREE, 1, 2, 7)
_TWICE, _BEFORE_TWICE = executed(FREE, 1, 2, 2)
_EARLY, _BEFORE_EARLY = executed(plan(_1="", _2="1"), 2)
_UNNUMBERED, _BEFORE_UNNUMBERED = executed(FREE, 1, 2, "x")
_PLANLESS, _ = executed("", 1, 2)

_UNREAD = (
    "<Plan><Outline>Transient Step 1: x; Dependency: []</Outline>"
    "<Outline>Transient Step 2: x; Dependency: [Step 1]</Outline>"
)
MEDVERSE: dict[str, tuple[str, str, str, str, list[list[int]]]] = {
    "unknown-dependency": (
        executed(plan(_1="", _2="", _3="9"), 1, 2, 3)[0],
        "a" + plan(_1="", _2="", _3="9").removesuffix("</Plan>"),
        "</Plan>",
        "step 3 depends on step 9, which the plan does not have",
        [[], [0], [0], [1, 2], [1, 2, 3]],
    ),
    "self-dependency": (
        executed(plan(_1="", _2="2"), 1, 2)[0],
        "a" + plan(_1="", _2="2").removesuffix("</Plan>"),
        "</Plan>",
        "step 2 depends on itself",
        [[], [0], [1], [1, 2]],
    ),
    "forward-dependency": (
        executed(plan(_1="", _2="3", _3=""), 1, 2, 3)[0],
        "a" + plan(_1="", _2="3", _3="").removesuffix("</Plan>"),
        "</Plan>",
        "step 2 depends on the later step 3",
        [[], [0], [1], [0], [1, 2, 3]],
    ),
    "cycle": (
        executed(plan(_1="", _2="4", _3="2", _4="1, 3"), 1, 2, 3, 4)[0],
        "a" + plan(_1="", _2="4", _3="2", _4="1, 3").removesuffix("</Plan>"),
        "</Plan>",
        "the dependencies of the steps form a cycle: 2 -> 4 -> 3 -> 2",
        [[], [0], [1], [2], [1, 3], [1, 2, 3, 4]],
    ),
    "number-planned-twice": (
        executed(plan(_1="", _2="").replace("Step 2", "Step 1"), 1)[0],
        "a" + plan(_1="", _2="").replace("Step 2", "Step 1").removesuffix("</Plan>"),
        "</Plan>",
        "the plan has step 1 more than once",
        [[], [0], [1]],
    ),
    "number-executed-twice": (
        _TWICE,
        _BEFORE_TWICE,
        "<Step>",
        "step 2 occurs twice",
        [[], [0], [0], [1, 2], [1, 2, 3]],
    ),
    "unplanned-step": (
        _UNPLANNED,
        _BEFORE_UNPLANNED,
        "<Step>",
        "step 7 is not in the plan",
        [[], [0], [0], [1, 2], [1, 2, 3]],
    ),
    "step-before-its-dependency": (
        executed(plan(_1="", _2="1"), 2, 1)[0],
        _BEFORE_EARLY,
        "<Step>",
        "step 2 depends on step 1, which does not come before it",
        [[], [0], [0], [1, 2]],
    ),
    "no-number": (
        _UNNUMBERED,
        _BEFORE_UNNUMBERED,
        "<Step>",
        "no `Transient Step N`",
        [[], [0], [0], [1, 2], [1, 2, 3]],
    ),
    "never-executed": (
        executed(FREE, 1)[0],
        f"a{FREE}<Execution>{step(1)}",
        "</Execution>",
        "step 2 is planned but never executed",
        [[], [0], [1]],
    ),
    "no-plan": (_PLANLESS, "a<Execution>", "<Step>", "no plan", [[], [0], [1], [1, 2]]),
    "no-execution": (
        f"{FREE}{step(1)}{step(2)}</Execution>",
        FREE,
        "<Step>",
        "outside an execution",
        [[], [0], [0], [1, 2]],
    ),
    "execution-not-closed": (
        f"{FREE}<Execution>{step(1)}{step(2)}<Conclusion>c",
        f"{FREE}<Execution>{step(1)}{step(2)}",
        "<Conclusion>",
        "the execution is still open",
        [[], [0], [0], [1, 2]],
    ),
    "step-in-a-step": (
        f"{FREE}<Execution>{step(1).removesuffix('</Step>')}{step(2)}</Execution>",
        f"{FREE}<Execution>{step(1).removesuffix('</Step>')}",
        "<Step>",
        "inside another",
        [[], [0], [0], [1, 2]],
    ),
    "step-not-closed": (
        f"{FREE}<Execution>{step(1)}{step(2).removesuffix('</Step>')}</Execution>",
        f"{FREE}<Execution>{step(1)}{step(2).removesuffix('</Step>')}",
        "</Execution>",
        "a step is still open",
        [[], [0], [0], [1, 2]],
    ),
    "plan-in-a-step": (
        f"{FREE}<Execution>{step(1)}<Step>Transient Step 2: x\n<Plan></Step></Execution>",
        f"{FREE}<Execution>{step(1)}<Step>Transient Step 2: x\n",
        "<Plan>",
        "inside a step",
        [[], [0], [0], [1, 2]],
    ),
    "execution-in-an-execution": (
        f"{FREE}<Execution><Execution>{step(1)}{step(2)}</Execution>",
        f"{FREE}<Execution>",
        "<Execution>",
        "inside another",
        [[], [0], [0], [1, 2]],
    ),
    "outline-without-number": (
        f"<Plan><Outline>x</Outline></Plan><Execution>{step(1)}</Execution>",
        "<Plan><Outline>x",
        "</Outline>",
        "no `Transient Step N`",
        [[], [0], [1]],
    ),
    "dependencies-unread": (
        f"{_UNREAD}</Plan><Execution>{step(1)}{step(2)}</Execution>",
        _UNREAD,
        "</Plan>",
        "step 2 lists no numbers",
        [[], [0], [1], [1, 2]],
    ),
    "closing-step-alone": ("a</Step>b", "a", "</Step>", "no step is open", [[]]),
    "closing-plan-alone": ("a</Plan>b", "a", "</Plan>", "no plan is open", [[]]),
    "closing-execution-alone": ("a</Execution>b", "a", "</Execution>", "no execution is open", [[]]),
}
CASES = [("multiverse", *case) for case in MULTIVERSE.values()] + [("medverse", *case) for case in MEDVERSE.values()]


@pytest.mark.parametrize(
    "case", CASES, ids=[f"multiverse-{n}" for n in MULTIVERSE] + [f"medverse-{n}" for n in MEDVERSE]
)
def test_malformed_text_raises_or_is_read_leniently(case: tuple[Any, ...], toy: Callable) -> None:
    grammar, text, before, tag, message, parents = case
    vocabulary = toy(grammar)
    with pytest.raises(TopologyError) as raised:
        vocabulary.parse(text, row=5)
    error = raised.value
    assert message in str(error) and (error.index, error.tag, error.row) == (len(vocabulary.encode(before)), tag, 5)
    assert str(error).startswith(f"row 5, token {error.index} {tag}: ") and error.remedy

    topology = vocabulary.parse(text, strict=False)
    assert topology.parents == parents
    assert any(message in warning and tag in warning for warning in topology.warnings)
    # A tag that was taken for ordinary text, like all others, has its place.
    assert len(topology) == len(vocabulary.encode(text)) and (topology.segment_ids >= 0).all()


@pytest.mark.parametrize("mode", ["layers", "flat"])
def test_a_barrier_ends_a_layer_and_flat_steps_see_no_step(mode: str, toy: Callable) -> None:
    text, _ = executed(plan(_1="", _2="9", _3="", _4="1"), 1, 2, 3, 4)
    expected = {
        # 2 is broken, so it waits for 1; 3 is in its layer; 4 needs 1, of an earlier layer.
        "layers": [[], [0], [1], [1], [1], [1, 2, 3, 4]],
        "flat": [[], [0], [0], [0], [0], [1, 2, 3, 4]],
    }
    assert toy("medverse").parse(text, mode=mode, strict=False).parents == expected[mode]


@pytest.mark.parametrize(
    ("grammar", "text", "opener"),
    [
        ("multiverse", f"a<Parallel>{GOAL}<Path>1: a", "<Parallel>"),
        ("multiverse", TWO, "<Parallel>"),
        ("multiverse", f"{TWO}<Conclusion>c", "<Parallel>"),
        ("medverse", f"{FREE}<Execution>{step(1)}", "<Execution>"),
        ("medverse", f"{FREE}", "<Plan>"),
    ],
)
def test_a_text_that_was_cut_must_be_said_to_be(grammar: str, text: str, opener: str, toy: Callable) -> None:
    vocabulary = toy(grammar)
    with pytest.raises(TopologyError, match="allow_truncated|write its steps") as raised:
        vocabulary.parse(text)
    assert raised.value.tag == opener and raised.value.index == len(vocabulary.encode(text))
    whole = vocabulary.parse(text, allow_truncated=True)
    assert not whole.warnings and whole.parents == vocabulary.parse(text, strict=False).parents
    assert vocabulary.parse(text, strict=False).warnings


def test_every_beginning_of_a_text_is_read_as_in_the_whole(toy: Callable, random_text: Callable) -> None:
    """Truncation: the ids are cut first, then read. Blocks stay open; what is there has the same place and mask."""
    for grammar in ("multiverse", "medverse"):
        vocabulary = toy(grammar)
        ids = vocabulary.encode(random_text(grammar, 3, True))
        whole = vocabulary.parse_ids(ids)
        step_token = vocabulary.token_ids.get("<Step>", -1)
        for length in range(1, len(ids)):
            last_tag = max(i for i in range(-1, length) if i < 0 or ids[i] in vocabulary.token_ids.values())
            if last_tag >= 0 and ids[last_tag] == step_token:
                continue  # cut within a header, the step has no number yet
            part = vocabulary.parse_ids(ids[:length], allow_truncated=True)
            assert part.position_ids.tolist() == whole.position_ids[:length].tolist()
            assert (part.dense_mask() == whole.dense_mask()[:length, :length]).all()


def test_text_is_not_nested_without_end(toy: Callable) -> None:
    vocabulary, opened = toy("multiverse"), f"<Parallel>{GOAL}<Path>"
    text = opened * (MAX_DEPTH + 1)
    with pytest.raises(TopologyError, match=f"deeper than {MAX_DEPTH}"):
        vocabulary.parse(text, allow_truncated=True)
    topology = vocabulary.parse(text, strict=False)
    assert topology.n_segments == 1 + MAX_DEPTH + 1  # the last path is a sibling of the one before it
    # Cursors count what is open above them.
    builder = TopologyBuilder("multiverse", vocabulary.token_ids, decode=vocabulary.decode)
    for _ in range(MAX_DEPTH):
        builder.feed_many(vocabulary.encode(f"<Parallel>{GOAL}"))
        builder = builder.fork(2)[1]
        builder.feed_many(vocabulary.encode("<Path>"))
    assert builder.depth == MAX_DEPTH
    with pytest.raises(TopologyError, match=f"deeper than {MAX_DEPTH}"):
        builder.feed(vocabulary.token_ids["<Parallel>"])


def test_segments_do_not_become_too_many(toy: Callable) -> None:
    """What can no longer branch is ordinary text, and open blocks can still be joined."""
    vocabulary = toy("multiverse")
    text = "<Parallel>" + "<Path></Path>" * (MAX_SEGMENTS + 1) + "<Conclusion></Conclusion></Parallel>"
    with pytest.raises(TopologyError, match=f"nearly {MAX_SEGMENTS} segments"):
        vocabulary.parse(text)
    topology = vocabulary.parse(text, strict=False)
    assert topology.labels[-1] == "join" and len(topology.parents[-1]) == topology.n_segments - 2 < MAX_SEGMENTS


def test_numbers_of_any_length_are_no_obstacle(toy: Callable) -> None:
    """A model may write them; Python refuses to convert more than 4,300 digits."""
    long = "9" * 5000
    text = f"<Plan><Outline>Transient Step {long}: x; Dependency: []</Outline><Outline>Transient Step 1: x; "
    text += f"Dependency: [{long}]</Outline></Plan><Execution>{step(1)}{step(long)}</Execution>"
    topology = toy("medverse").parse(text, strict=False)
    assert topology.parents == [[], [0], [1], [1, 2]] and len(topology.warnings) == 4
