"""Texts of the two grammars from worked problems, and validation of such texts. No model is involved.

A sample is `{"question", "answer"?, "steps": [{"id", "title", "text"?, "deps"?}], "conclusion"?, "preamble"?}`. Its
texts may contain anything: control tokens in them are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

from hf_efficient.data.structure_tree import ROOT, Element, Issue, read_tree, tag_pattern
from hf_efficient.data.structured_sample import ARROW, Sample, Step
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.logging import get_logger
from hf_efficient.modeling.topology.grammar.control_tokens import (
    CONTROL_TOKENS,
    DEPENDENCIES,
    PATH_LABEL,
    STEP_NUMBER,
    STEP_TITLE,
    check_grammar,
)

_ZERO_WIDTH_SPACE = "\u200b"
_ANY_TAG = re.compile("|".join(re.escape(tag) for tag in sorted({t for tags in CONTROL_TOKENS.values() for t in tags})))
# What ends a title when a plan is parsed.
_PLAN_WORDS = re.compile(r"(?<=;)(?=\s*Dependency\b)|(?<=Dependency)(?=\s*:\s*\[)", re.IGNORECASE)
# Allowed parents of each element. In the released MedVerse data it is not marked where the thinking ends.
_PARENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "multiverse": {
        "Think": (ROOT,),
        "Parallel": ("Think", "Path"),
        "Goal": ("Parallel",),
        "Outline": ("Goal",),
        "Path": ("Parallel",),
        "Conclusion": ("Parallel",),
    },
    "medverse": {
        "Think": (ROOT,),
        "Plan": ("Think", ROOT),
        "Outline": ("Plan",),
        "Execution": ("Think", ROOT),
        "Step": ("Execution",),
        "Conclusion": ("Think", ROOT),
    },
}

Report = Callable[[int, str, str], None]


def escape(text: str) -> str:
    """`text` with a zero-width space after the `<` of each control token of either grammar, which makes it plain."""
    return _ANY_TAG.sub(lambda match: f"<{_ZERO_WIDTH_SPACE}{match[0][1:]}", text)


def to_medverse(sample: Sample | Mapping[str, Any]) -> str:
    """The sample as a MedVerse text: a plan with the dependencies, the steps and the conclusion.

    Steps are numbered from 1 in topological order. A title without an arrow gets one: from the titles of the steps that
    it depends on, or from `Question`.

    Raises:
        HFEError: the sample is malformed, or the dependencies of its steps form a cycle.
    """
    sample = Sample.of(sample)
    numbers = {step.id: number for number, step in enumerate(sample.steps, start=1)}
    results = {step.id: _title(step.title).rpartition(ARROW)[2] for step in sample.steps}
    outlines, steps = [], []
    for step in sample.steps:
        title = _title(step.title)
        if ARROW not in title:
            title = f"{', '.join(results[dep] for dep in step.deps) or 'Question'}{ARROW}{title}"
        header = f"Transient Step {numbers[step.id]}: {title}"
        needed = sorted(numbers[dep] for dep in step.deps)
        outlines.append(f"<Outline> {header}; Dependency: {needed} </Outline>")
        steps.append(_lines(f"<Step> {header}", escape(step.text).strip(), "</Step>"))
    # A sample may have neither conclusion nor answer, but the element must not be empty.
    explanation = escape(sample.conclusion).strip() or ("" if sample.answer else _joined_titles(sample.steps))
    return _lines(
        *("<Think>", escape(sample.preamble).strip()),
        *("<Plan>", *outlines, "</Plan>"),
        *("<Execution>", *steps, "</Execution>"),
        "<Conclusion>",
        f"Explanation: {explanation}" if explanation else "",
        f"Answer: {escape(sample.answer).strip()}" if sample.answer else "",
        *("</Conclusion>", "</Think>"),
    )


def to_multiverse(sample: Sample | Mapping[str, Any]) -> str:
    """The sample as a Multiverse text: one block for each level, with the chains of the level as its paths.

    A level with one chain is plain text. The last block concludes with the sample's conclusion if no text follows it;
    other blocks conclude with the titles of their steps. A warning states what waiting for whole levels costs: see
    `Sample.lost_parallelism`.

    Raises:
        HFEError: the sample is malformed, or the dependencies of its steps form a cycle.
    """
    sample = Sample.of(sample)
    lost = sample.lost_parallelism()
    if lost > 1:
        get_logger().warning("as blocks, the longest path is %.2f times that of the dependencies", lost)
    levels = sample.levels()
    conclusion = escape(sample.conclusion).strip()
    parts = ["<Think>", escape(sample.preamble).strip()]
    for chains in levels:
        if len(chains) == 1:
            parts += [_step_text(step) for step in chains[0]]
            continue
        given = conclusion if chains is levels[-1] else ""
        parts.append(_block(chains, given or _joined_titles(step for chain in chains for step in chain)))
        if given:
            conclusion = ""
    text = _lines(*parts, conclusion, "</Think>")
    return f"{text}\n\nAnswer: {escape(sample.answer).strip()}" if sample.answer else text


def flatten(text: str) -> str:
    """A structured text as sequential text: without goals, plans, tags and path labels.

    The conclusion of a block repeats its paths, so it is removed as well; a conclusion outside blocks stays.
    """
    _check_text(text)
    grammar = "medverse" if "<Execution>" in text or "<Plan>" in text else "multiverse"
    pieces: list[str] = []
    stack: list[str] = []
    dropped = 0  # how many elements, from the top of the stack, are removed with their contents
    start = 0
    for match in tag_pattern(grammar).finditer(text):
        if not dropped:
            pieces.append(text[start : match.start()])
        start, name = match.end(), match[2]
        if not match[1]:
            stack.append(name)
            if dropped or name in ("Goal", "Plan") or stack[-2:] == ["Parallel", "Conclusion"]:
                dropped += 1
            elif name == "Path" and (label := PATH_LABEL.match(text, start)):
                start = label.end()
        elif name in stack:
            while stack.pop() != name:
                dropped = max(dropped - 1, 0)
            dropped = max(dropped - 1, 0)
    pieces.append("" if dropped else text[start:])
    lines = [line.strip() for line in "".join(pieces).splitlines()]
    return "\n".join(line for line, before in zip(lines, ["", *lines], strict=False) if line or before).strip()


def entity_chains_to_steps(chains: Iterable[str]) -> list[dict[str, Any]]:
    """Steps of a MedVerse sample from chains of entities such as `"fever -> infection -> antibiotics"`.

    Every entity that follows others is one step, `p1, p2 -> entity`, which depends on the steps that lead to p1 and p2.
    The texts of the steps are left empty.

    Raises:
        HFEError: a chain has fewer than two entities or an empty one, or the chains form a cycle.
        UsageError: `chains` is one text.
    """
    if isinstance(chains, str):
        raise UsageError(f"chains={chains!r} is one text", "pass a list of chains")
    before: dict[str, list[str]] = {}
    for chain in chains:
        _check_text(chain)
        entities = [" ".join(entity.split()) for entity in re.split("->|→", chain)]
        if len(entities) < 2 or not all(entities):
            raise HFEError(f"the chain {chain!r} is not of the form A -> B -> C", "give at least two entities")
        for left, right in pairwise(entities):
            before.setdefault(left, [])
            if left not in before.setdefault(right, []):
                before[right].append(left)
    steps = [
        {
            "id": entity,
            "title": f"{', '.join(lefts)}{ARROW}{entity}",
            "text": "",
            "deps": [left for left in lefts if before[left]],
        }
        for entity, lefts in before.items()
        if lefts
    ]
    if not steps:
        return []
    by_id = {step["id"]: step for step in steps}
    return [by_id[step.id] for step in Sample.of({"question": "", "steps": steps}).steps]


def validate(text: str, grammar: str) -> list[Issue]:
    """All problems of a text of the grammar, in the order of the text; an empty list for a valid one.

    Raises:
        UsageError: the grammar is unknown, or `text` is not a str.
    """
    check_grammar(grammar, "dag")
    _check_text(text)
    issues: list[Issue] = []

    def report(offset: int, tag: str, problem: str) -> None:
        issues.append(Issue(text.count("\n", 0, offset) + 1, offset, tag, problem))

    tree = read_tree(text, grammar, report)
    parents = _PARENTS[grammar]
    for parent in (tree, *tree.walk()):
        for child in parent.children:
            if parent.name not in parents[child.name]:
                allowed = " or ".join(f"<{name}>" if name else "the text itself" for name in parents[child.name])
                inside = f"<{parent.name}>" if parent.name else "any element"
                place = f"is inside {inside}" if parent.name else f"is not inside {inside}"
                report(child.start, f"<{child.name}>", f"{place}, but belongs in {allowed}")
    if grammar == "multiverse":
        for element in tree.walk():
            if element.name == "Parallel":
                _check_block(element, text, report)
    else:
        _check_medverse(tree, text, report)
    return sorted(issues, key=lambda issue: issue.offset)


def _check_text(value: Any) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{value!r} is a {type(value).__name__}, not a text", "pass a str")


def _block(chains: list[list[Step]], conclusion: str) -> str:
    """A Multiverse block with one path for each chain."""
    labelled = list(enumerate(chains, start=1))
    outlines = [f"<Outline>\n{label}: {_joined_titles(chain)}\n</Outline>" for label, chain in labelled]
    paths = [_lines(f"<Path>\n{label}: {_chain_text(chain)}", "</Path>") for label, chain in labelled]
    return _lines(
        *("<Parallel>", "<Goal>", *outlines, "</Goal>", *paths),
        *("<Conclusion>", conclusion, "</Conclusion>", "</Parallel>"),
    )


def _chain_text(chain: list[Step]) -> str:
    return "\n".join(_step_text(step) for step in chain)


def _step_text(step: Step) -> str:
    return escape(step.text).strip() or _title(step.title)


def _joined_titles(steps: Iterable[Step]) -> str:
    return "; ".join(_title(step.title) for step in steps)


def _title(title: str) -> str:
    """A title on one line, with control tokens escaped and nothing in it that a parser takes for its end."""
    return _PLAN_WORDS.sub(_ZERO_WIDTH_SPACE, escape(" ".join(title.split())))


def _lines(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def _check_block(block: Element, text: str, report: Report) -> None:
    """Report problems of the goal, paths and conclusion of one `<Parallel>`, without the blocks in its paths."""
    names = [child.name for child in block.children]
    for name, rule in (("Goal", "first"), ("Conclusion", "last")):
        found = block.named(name)
        if not found:
            report(block.start, "<Parallel>", f"has no <{name}>")
        elif len(found) > 1:
            report(found[1].start, f"<{name}>", "is the second of its block")
        elif names[0 if name == "Goal" else -1] != name:
            report(found[0].start, f"<{name}>", f"must come {rule} in its block")
    if "Path" not in names:
        report(block.start, "<Parallel>", "has no <Path>")
    planned = _labels([o for goal in block.named("Goal") for o in goal.named("Outline")], text, report)
    walked = _labels(block.named("Path"), text, report)
    for goal in block.named("Goal"):
        if not goal.named("Outline"):
            report(goal.start, "<Goal>", "has no <Outline>")
        _check_no_loose_text(goal, text, report)
    known = "?" not in planned + walked or len(planned) != len(walked)
    if planned and walked and planned != walked and known:
        report(block.start, "<Parallel>", f"has outlines {', '.join(planned)} but paths {', '.join(walked)}")
    _check_no_loose_text(block, text, report)


def _labels(elements: list[Element], text: str, report: Report) -> list[str]:
    """Labels of outlines or paths, `?` where one is missing; reports missing and repeated ones."""
    labels: list[str] = []
    for element in elements:
        match = PATH_LABEL.match(text, *element.inner)
        if match is None:
            report(element.start, f"<{element.name}>", "must begin with a label such as `1:` or `2.1:`")
        elif match[1] in labels:
            report(element.start, f"<{element.name}>", f"repeats the label {match[1]}")
        labels.append(match[1] if match else "?")
    return labels


def _check_no_loose_text(element: Element, text: str, report: Report) -> None:
    """Report text directly inside an element that may only contain other elements."""
    for offset, piece in element.own_text(text):
        if piece.strip():
            place = offset + len(piece) - len(piece.lstrip())
            report(place, f"<{element.name}>", f"contains text outside its elements: {piece.strip()[:30]!r}")


def _check_medverse(tree: Element, text: str, report: Report) -> None:
    """Report problems of the plan, the execution and the conclusion of a MedVerse text."""
    elements = list(tree.walk())
    found = {name: [e for e in elements if e.name == name] for name in ("Plan", "Execution", "Conclusion")}
    for name, those in found.items():
        if not those:
            report(len(text), f"<{name}>", "is missing")
        for other in those[1:]:
            report(other.start, f"<{name}>", "is the second of the text")
    present = [those[0] for those in found.values() if those]
    for former, latter in pairwise(present):
        if former.start > latter.start:
            report(latter.start, f"<{latter.name}>", f"comes before <{former.name}>")
    plan: dict[int, tuple[str, list[int]]] = {}
    for element in found["Plan"][:1]:
        _check_no_loose_text(element, text, report)
        plan = _read_plan(element, text, report)
    for element in found["Execution"][:1]:
        _check_no_loose_text(element, text, report)
        _check_steps(element, plan, text, report)


def _read_plan(plan: Element, text: str, report: Report) -> dict[int, tuple[str, list[int]]]:
    """Number of each planned step -> its title and dependencies; reports problems of the plan."""
    steps: dict[int, tuple[str, list[int]]] = {}
    places: dict[int, int] = {}
    for outline in plan.named("Outline"):
        content = text[slice(*outline.inner)]
        number, title, needed = STEP_NUMBER.search(content), STEP_TITLE.search(content), DEPENDENCIES.search(content)
        if number is None or title is None:
            report(outline.start, "<Outline>", "has no `Transient Step N: X -> Y`")
            continue
        n = int(number[1])
        if n in steps:
            report(outline.start, "<Outline>", f"repeats the number {n}")
            continue
        if needed is None:
            report(outline.start, "<Outline>", f"of step {n} has no `Dependency: […]`")
        if ARROW not in title[1]:
            report(outline.start, "<Outline>", f"of step {n} has a title without ` -> `: {title[1]!r}")
        steps[n] = title[1], [int(d) for d in needed[1].replace(",", " ").split()] if needed else []
        places[n] = outline.start
    if not steps:
        report(plan.start, "<Plan>", "has no step")
    for n, (_, dependencies) in steps.items():
        for other in dependencies:
            if other not in steps:
                report(places[n], "<Outline>", f"of step {n} depends on step {other}, which is not planned")
            elif other >= n:
                which = "itself" if other == n else f"the later step {other}"
                report(places[n], "<Outline>", f"of step {n} depends on {which}")
    return steps


def _check_steps(execution: Element, plan: Mapping[int, tuple[str, list[int]]], text: str, report: Report) -> None:
    """Report steps that do not match the plan; `plan` as of `_read_plan`."""
    done: set[int] = set()
    for step in execution.named("Step"):
        first = text[slice(*step.inner)].lstrip().partition("\n")[0]
        number, title = STEP_NUMBER.match(first), STEP_TITLE.match(first)
        if number is None or title is None:
            report(step.start, "<Step>", "must begin with `Transient Step N: X -> Y`")
            continue
        n = int(number[1])
        if n not in plan:
            report(step.start, "<Step>", f"{n} is not in the plan")
        elif title[1] != plan[n][0]:
            report(step.start, "<Step>", f"{n} has the title {title[1]!r}; the plan says {plan[n][0]!r}")
        if n in done:
            report(step.start, "<Step>", f"repeats the number {n}")
        for other in plan.get(n, ("", []))[1]:
            if other in plan and other not in done:
                report(step.start, "<Step>", f"{n} comes before step {other}, on which it depends")
        done.add(n)
    missing = sorted(set(plan) - done)
    if missing:
        report(execution.start, "<Execution>", f"lacks the planned step {missing[0]}")
