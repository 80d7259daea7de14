"""Texts of the two grammars from worked problems, and validation of such texts. No model is involved.

The grammars, Multiverse and MedVerse, divide a text by control tokens, tags such as `<Path>`, into parallel paths or
steps; `control_tokens.py` shows both. An element is the text from an opening tag to its closing tag, and a block is a
`<Parallel>` element. A sample is `{"question", "answer"?, "steps": [{"id", "title", "text"?, "deps"?}], "conclusion"?,
"preamble"?}`. Its texts may contain anything: control tokens in them are escaped.
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
# Places in a title at which the parser of a plan would end it.
_PLAN_WORDS = re.compile(r"(?<=;)(?=\s*Dependency\b)|(?<=Dependency)(?=\s*:\s*\[)", re.IGNORECASE)
# Allowed parents of each element. The released MedVerse data does not mark where the thinking ends, hence two parents.
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

# Called as report(offset, tag, problem) for each problem; offset is a character index in the text.
Report = Callable[[int, str, str], None]


def escape(text: str) -> str:
    """Return `text` with a zero-width space after the `<` of each control token, of either grammar.

    A tokenizer then encodes these tags as ordinary text.
    """
    return _ANY_TAG.sub(lambda match: f"<{_ZERO_WIDTH_SPACE}{match[0][1:]}", text)


def to_medverse(sample: Sample | Mapping[str, Any]) -> str:
    """Return a sample as a MedVerse text: a plan with the dependencies, the steps and the conclusion.

    Steps are numbered from 1 in topological order. A title without an arrow (` -> `) is preceded by one, with the
    results of the steps that it depends on, or `Question`, on its left.

    Args:
        sample: a `Sample`, or a mapping as described above.

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
    # The conclusion must not be empty, even if the sample has neither conclusion nor answer.
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
    """Return a sample as a Multiverse text: one block for each level, with the chains of the level as its paths.

    See `Sample.levels` for levels and chains. A level with one chain is plain text. If the last level is a block, its
    conclusion is that of the sample, unless empty; other blocks conclude with the titles of their steps. If the last
    level is plain text, the sample's conclusion follows it. The answer, if any, is the last line, after `</Think>`.
    Each block waits for the whole level before it: if this lengthens the longest path, a warning states the factor of
    `Sample.lost_parallelism`.

    Args:
        sample: a `Sample`, or a mapping as described above.

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
    """Return a structured text as sequential text: without goals, plans, tags and path labels.

    The conclusion of a block repeats its paths, so it is removed as well; a conclusion outside blocks stays. A text
    with `<Execution>` or `<Plan>` is read as MedVerse, others as Multiverse. Malformed texts raise no error.

    Raises:
        UsageError: `text` is not a str.
    """
    _check_text(text)
    grammar = "medverse" if "<Execution>" in text or "<Plan>" in text else "multiverse"
    parts: list[str] = []
    stack: list[str] = []
    dropped = 0  # how many elements, from the top of the stack, are removed with their contents
    start = 0
    for match in tag_pattern(grammar).finditer(text):
        if not dropped:
            parts.append(text[start : match.start()])
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
    parts.append("" if dropped else text[start:])
    lines = [line.strip() for line in "".join(parts).splitlines()]
    return "\n".join(line for line, before in zip(lines, ["", *lines], strict=False) if line or before).strip()


def entity_chains_to_steps(chains: Iterable[str]) -> list[dict[str, Any]]:
    """Return the steps of a MedVerse sample for chains of entities such as `"fever -> infection -> antibiotics"`.

    Every entity that follows others is one step, `p1, p2 -> entity`, which depends on the steps that lead to p1 and p2.

    Args:
        chains: entities separated by `->` or `→`.

    Returns:
        The value of a sample's field `steps`, in topological order, with empty texts; an empty list without chains.

    Raises:
        HFEError: a chain has fewer than two entities or an empty one, or the chains form a cycle.
        UsageError: `chains` is a single str, or one of them is not a str.
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
    """Return all problems of a text of the grammar, in the order of the text; an empty list for a valid text.

    Args:
        text: the text.
        grammar: `multiverse` or `medverse`.

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
    """Raise `UsageError` unless `value` is a str."""
    if not isinstance(value, str):
        raise UsageError(f"{value!r} is a {type(value).__name__}, not a text", "pass a str")


def _block(chains: list[list[Step]], conclusion: str) -> str:
    """Return a Multiverse block with one outline and one path for each chain, labelled from 1.

    Args:
        chains: the steps of each path.
        conclusion: text of the block's conclusion, already escaped.
    """
    labelled = list(enumerate(chains, start=1))
    outlines = [f"<Outline>\n{label}: {_joined_titles(chain)}\n</Outline>" for label, chain in labelled]
    paths = [_lines(f"<Path>\n{label}: {_chain_text(chain)}", "</Path>") for label, chain in labelled]
    return _lines(
        *("<Parallel>", "<Goal>", *outlines, "</Goal>", *paths),
        *("<Conclusion>", conclusion, "</Conclusion>", "</Parallel>"),
    )


def _chain_text(chain: list[Step]) -> str:
    """Return the texts of the steps, one a line."""
    return "\n".join(_step_text(step) for step in chain)


def _step_text(step: Step) -> str:
    """Return the escaped text of a step, or its title if the text is empty."""
    return escape(step.text).strip() or _title(step.title)


def _joined_titles(steps: Iterable[Step]) -> str:
    """Return the escaped titles of the steps, separated by semicolons."""
    return "; ".join(_title(step.title) for step in steps)


def _title(title: str) -> str:
    """Return a title on one line, with control tokens escaped.

    Zero-width spaces are inserted where the parser of a plan would end the title.
    """
    return _PLAN_WORDS.sub(_ZERO_WIDTH_SPACE, escape(" ".join(title.split())))


def _lines(*parts: str) -> str:
    """Return the parts that are not empty, one a line."""
    return "\n".join(part for part in parts if part)


def _check_block(block: Element, text: str, report: Report) -> None:
    """Report problems of the goal, paths and conclusion of one `<Parallel>` element, but not of blocks in its paths.

    Args:
        block: the element.
        text: the whole text.
        report: called for each problem.
    """
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
    outline_labels = _labels([o for goal in block.named("Goal") for o in goal.named("Outline")], text, report)
    path_labels = _labels(block.named("Path"), text, report)
    for goal in block.named("Goal"):
        if not goal.named("Outline"):
            report(goal.start, "<Goal>", "has no <Outline>")
        _check_no_loose_text(goal, text, report)
    # With a label missing (reported above), only a different number of labels is a further problem.
    comparable = "?" not in outline_labels + path_labels or len(outline_labels) != len(path_labels)
    if outline_labels and path_labels and outline_labels != path_labels and comparable:
        report(
            block.start,
            "<Parallel>",
            f"has outlines {', '.join(outline_labels)} but paths {', '.join(path_labels)}",
        )
    _check_no_loose_text(block, text, report)


def _labels(elements: list[Element], text: str, report: Report) -> list[str]:
    """Return the labels of outlines or paths, `?` for a missing one; report missing and repeated labels.

    Args:
        elements: the `<Outline>` or `<Path>` elements.
        text: the whole text.
        report: called for each problem.
    """
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
    for offset, part in element.own_text(text):
        if part.strip():
            start = offset + len(part) - len(part.lstrip())
            report(start, f"<{element.name}>", f"contains text outside its elements: {part.strip()[:30]!r}")


def _check_medverse(tree: Element, text: str, report: Report) -> None:
    """Report problems of the plan, the execution and the conclusion of a MedVerse text.

    Args:
        tree: the root of its elements.
        text: the whole text.
        report: called for each problem.
    """
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
    """Return number of each planned step -> (title, numbers that it depends on); report problems of the plan.

    Args:
        plan: the `<Plan>` element.
        text: the whole text.
        report: called for each problem.
    """
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
    """Report steps that do not match the plan.

    Args:
        execution: the `<Execution>` element.
        plan: result of `_read_plan`.
        text: the whole text.
        report: called for each problem.
    """
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
