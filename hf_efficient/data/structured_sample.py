"""A worked problem as steps and what each step needs, before it is written in a grammar."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_efficient.errors import HFEError

ARROW = " -> "


@dataclass(frozen=True)
class Step:
    """One step: its id, a short title, its text, and the ids of the steps whose results it uses."""

    id: str
    title: str
    text: str
    deps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A worked problem, its steps in an order in which every step comes after those it needs.

    Where the dependencies leave a choice, the steps keep the order in which they were given.
    """

    question: str
    steps: tuple[Step, ...]
    answer: str = ""
    conclusion: str = ""
    preamble: str = ""

    @classmethod
    def of(cls, value: Sample | Mapping[str, Any]) -> Sample:
        """From `{"question", "answer"?, "steps": [{"id", "title", "text"?, "deps"?}], "conclusion"?, "preamble"?}`.

        Raises:
            HFEError: a field is missing or of another type, an id is repeated or unknown, or steps need each other.
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
        """Maximal runs in which each step needs the one before and no other, and is the only one that needs it."""
        users = {step.id: [other for other in self.steps if step.id in other.deps] for step in self.steps}
        chains: dict[str, list[Step]] = {}  # id of the last step -> chain
        for step in self.steps:
            before = step.deps[0] if len(step.deps) == 1 and len(users[step.deps[0]]) == 1 else None
            chains[step.id] = [*(chains.pop(before) if before is not None else []), step]
        return sorted(chains.values(), key=lambda chain: self.steps.index(chain[0]))

    def levels(self) -> list[list[list[Step]]]:
        """Chains by level; a chain's level is one above the highest level of those it needs."""
        level_of: dict[str, int] = {}
        levels: list[list[list[Step]]] = []
        for chain in self.chains():
            level = max((level_of[dep] + 1 for dep in chain[0].deps), default=0)
            level_of |= {step.id: level for step in chain}
            levels += [[] for _ in range(level + 1 - len(levels))]
            levels[level].append(chain)
        return levels

    def lost_parallelism(self, length: Callable[[str], int] = len) -> float:
        """What it costs that a level waits for all of the level before: ``longest path by levels / longest path``.

        1 where nothing is lost. `length` measures a step's text, by default in characters.
        """
        sizes = {step.id: max(length(step.text or step.title), 1) for step in self.steps}
        ends: dict[str, int] = {}
        for step in self.steps:
            ends[step.id] = sizes[step.id] + max((ends[dep] for dep in step.deps), default=0)
        by_levels = sum(max(sum(sizes[step.id] for step in chain) for chain in level) for level in self.levels())
        return by_levels / max(ends.values())


def _step(entry: Any, place: int) -> Step:
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
    """Kahn's algorithm; of the steps that could come next, the first one given does."""
    ids = {step.id for step in steps}
    if len(ids) < len(steps):
        repeated = next(step.id for place, step in enumerate(steps) if step.id in {s.id for s in steps[:place]})
        raise HFEError(f"two steps of the sample have the id {repeated!r}", "give each step an id of its own")
    for step in steps:
        unknown = [dep for dep in step.deps if dep not in ids]
        if unknown:
            raise HFEError(f"step {step.id!r} needs {unknown[0]!r}, which no step is", "correct its deps")
    ordered: list[Step] = []
    done: set[str] = set()
    left = list(steps)
    while left:
        ready = next((step for step in left if done.issuperset(step.deps)), None)
        if ready is None:
            circle = " -> ".join(_circle(left, done))
            raise HFEError(f"steps of the sample need each other in a circle: {circle}", "remove one of these deps")
        left.remove(ready)
        ordered.append(ready)
        done.add(ready.id)
    return ordered


def _circle(left: Sequence[Step], done: set[str]) -> list[str]:
    """Ids of steps that need each other, the first again at the end; every step of `left` waits for another of them."""
    waits_for = {step.id: next(dep for dep in step.deps if dep not in done) for step in left}
    trail = [left[0].id]
    while waits_for[trail[-1]] not in trail:
        trail.append(waits_for[trail[-1]])
    return [*trail[trail.index(waits_for[trail[-1]]) :], waits_for[trail[-1]]]


def _text(value: Mapping[str, Any], name: str, where: str) -> str:
    needed = name in ("question", "id", "title")
    if name not in value and needed:
        raise HFEError(f"{where} has no field {name}", "add it")
    found = value.get(name)
    if found is None and not needed:
        return ""
    if not isinstance(found, str):
        raise HFEError(f"field {name} of {where} must be a text, not {found!r}", "correct it")
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
