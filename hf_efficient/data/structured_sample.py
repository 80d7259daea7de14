"""A worked problem as steps with dependencies, from which `structured_text` generates a text of a grammar."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from heapq import heapify, heappop, heappush
from typing import Any

from hf_efficient.errors import HFEError
from hf_efficient.modeling.topology.grammar.plan import find_cycle

ARROW = " -> "


@dataclass(frozen=True)
class Step:
    """One step of a worked problem.

    Attributes:
        id: identifies the step in its sample.
        title: short title, not empty.
        text: what the step says; may be empty.
        deps: ids of the steps that it depends on.
    """

    id: str
    title: str
    text: str
    deps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A worked problem with its steps in topological order: each step comes after those that it depends on.

    Create it with `Sample.of`, which checks the fields and sorts the steps.

    Attributes:
        question: the problem.
        steps: the steps in topological order.
        answer, conclusion: short answer, and text after the steps; empty strings if there are none.
        preamble: text before the steps; an empty string if there is none.
    """

    question: str
    steps: tuple[Step, ...]
    answer: str = ""
    conclusion: str = ""
    preamble: str = ""

    @classmethod
    def of(cls, value: Sample | Mapping[str, Any]) -> Sample:
        """Create a sample from a mapping and sort its steps topologically; a `Sample` is returned unchanged.

        Of the steps whose dependencies are all before them, the one that was given first comes next.

        Args:
            value: `{"question", "answer"?, "steps": [{"id", "title", "text"?, "deps"?}], "conclusion"?, "preamble"?}`.
                Fields with `?` may be missing; other fields are ignored.

        Raises:
            HFEError: a field is missing or has another type, there is no step, an id or title is empty, an id is
                repeated or unknown, or the dependencies form a cycle.
        """
        if isinstance(value, Sample):
            return value
        if not isinstance(value, Mapping):
            raise HFEError(
                f"a sample must be a JSON object, not {type(value).__name__}", 'give {"question": …, "steps": […]}'
            )
        entries = value.get("steps")
        if not _is_list(entries) or not entries:
            raise HFEError("the sample's field steps must be a list of at least one step", 'give [{"id": …}, …]')
        steps = [_step(entry, place) for place, entry in enumerate(entries)]
        texts = {name: _text(value, name, "the sample") for name in ("question", "answer", "conclusion", "preamble")}
        return cls(steps=tuple(_in_order(steps)), **texts)

    def chains(self) -> list[list[Step]]:
        """Return the steps as maximal chains, ordered by their first steps.

        Each step of a chain after the first depends only on the step before it, and no other step depends on that
        earlier step.
        """
        users = {step.id: [other for other in self.steps if step.id in other.deps] for step in self.steps}
        chains: dict[str, list[Step]] = {}  # id of the last step -> chain
        for step in self.steps:
            before = step.deps[0] if len(step.deps) == 1 and len(users[step.deps[0]]) == 1 else None
            chains[step.id] = [*(chains.pop(before) if before is not None else []), step]
        return sorted(chains.values(), key=lambda chain: self.steps.index(chain[0]))

    def levels(self) -> list[list[list[Step]]]:
        """Return for each level, from 0, the chains of that level.

        The level of a chain is one more than the highest level of the chains that it depends on, or 0.
        """
        level_of: dict[str, int] = {}
        levels: list[list[list[Step]]] = []
        for chain in self.chains():
            level = max((level_of[dep] + 1 for dep in chain[0].deps), default=0)
            level_of |= {step.id: level for step in chain}
            levels += [[] for _ in range(level + 1 - len(levels))]
            levels[level].append(chain)
        return levels

    def lost_parallelism(self, length: Callable[[str], int] = len) -> float:
        """Return how much longer the longest path becomes if each level waits for the whole level before it.

        Args:
            length: length of a step's text (of its title if the text is empty), by default in characters; below 1 it
                counts as 1.

        Returns:
            ``longest path by levels / longest path of dependencies``, at least 1.
        """
        sizes = {step.id: max(length(step.text or step.title), 1) for step in self.steps}
        ends: dict[str, int] = {}
        for step in self.steps:
            ends[step.id] = sizes[step.id] + max((ends[dep] for dep in step.deps), default=0)
        by_levels = sum(max(sum(sizes[step.id] for step in chain) for chain in level) for level in self.levels())
        return by_levels / max(ends.values())


def _step(entry: Any, place: int) -> Step:
    """Create a step from a mapping; raises `HFEError` for a missing or invalid field.

    Args:
        entry: `{"id", "title", "text"?, "deps"?}`.
        place: index of the step in its sample, for messages.
    """
    if not isinstance(entry, Mapping):
        raise HFEError(f"step {place} of the sample must be a JSON object, not {type(entry).__name__}", "correct it")
    where = f"step {place} of the sample"
    texts = {name: _text(entry, name, where) for name in ("id", "title", "text")}
    if not texts["id"] or not texts["title"].strip():
        raise HFEError(f"{where} needs an id and a title that are not empty", "add what is missing")
    deps = entry.get("deps", [])
    if not _is_list(deps) or not all(isinstance(dep, str) for dep in deps):
        raise HFEError(f"deps of step {texts['id']!r} must be a list of ids, not {deps!r}", "correct it")
    return Step(deps=tuple(dict.fromkeys(deps)), **texts)


def _in_order(steps: list[Step]) -> list[Step]:
    """Return the steps in topological order; of those that could come next, the one given first does.

    Raises:
        HFEError: an id is repeated, a dependency is no step, or the dependencies form a cycle.
    """
    ids = {step.id for step in steps}
    if len(ids) < len(steps):
        repeated = next(step.id for place, step in enumerate(steps) if step.id in {s.id for s in steps[:place]})
        raise HFEError(f"two steps of the sample have the id {repeated!r}", "give each step an id of its own")
    for step in steps:
        unknown = [dep for dep in step.deps if dep not in ids]
        if unknown:
            raise HFEError(f"step {step.id!r} depends on {unknown[0]!r}, which is not a step", "correct its deps")
    dependencies = {step.id: step.deps for step in steps}
    cycle = find_cycle(dependencies)
    if cycle:
        raise HFEError(
            f"the dependencies of the sample's steps form a cycle: {' -> '.join(cycle)}", "remove one of these deps"
        )
    index = {step.id: place for place, step in enumerate(steps)}
    sorter = TopologicalSorter(dependencies)
    sorter.prepare()
    ready = [index[step_id] for step_id in sorter.get_ready()]
    heapify(ready)
    ordered: list[Step] = []
    while ready:
        step = steps[heappop(ready)]
        ordered.append(step)
        sorter.done(step.id)
        for step_id in sorter.get_ready():
            heappush(ready, index[step_id])
    return ordered


def _text(value: Mapping[str, Any], name: str, where: str) -> str:
    """Return a string field of a sample or step; an empty string if an optional field is missing or None.

    Args:
        value: the sample or step.
        name: name of the field; `question`, `id` and `title` are required.
        where: names the sample or step in messages.

    Raises:
        HFEError: a required field is missing, or a field is not a str.
    """
    needed = name in ("question", "id", "title")
    if name not in value and needed:
        raise HFEError(f"{where} has no field {name}", "add it")
    text = value.get(name)
    if text is None and not needed:
        return ""
    if not isinstance(text, str):
        raise HFEError(f"field {name} of {where} must be a string, not {text!r}", "correct it")
    return text


def _is_list(value: Any) -> bool:
    """True for sequences other than str and bytes."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
