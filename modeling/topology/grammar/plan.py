"""The plan of a MedVerse text: steps and their dependencies, and the order in which the steps are executed.

A plan consists of outlines such as ``<Outline> Transient Step 2: A -> B; Dependency: [1] </Outline>``, where 2 is the
step's number. The steps are then executed as segments (runs of consecutive tokens) whose parents depend on the plan: a
step's tokens may attend to the tokens of its ancestors, and to all text before the steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import TypeVar

from hf_efficient.modeling.topology.grammar.control_tokens import DEPENDENCIES, STEP_NUMBER, STEP_TITLE

Node = TypeVar("Node", bound=Hashable)


def find_cycle(dependencies: Mapping[Node, Sequence[Node]]) -> list[Node]:
    """Return a cycle of dependencies, in which each node is followed by one that it depends on; [] without a cycle.

    The cycle begins and ends with the same node, the one of the cycle that comes first in `dependencies`.

    Args:
        dependencies: node -> nodes that it depends on.
    """
    try:
        TopologicalSorter(dependencies).prepare()
    except CycleError as error:
        # graphlib lists dependencies before dependents, and repeats the first node at the end.
        cycle = error.args[1][:0:-1]
        start = cycle.index(next(node for node in dependencies if node in cycle))
        return [*cycle[start:], *cycle[: start + 1]]
    return []


@dataclass
class Plan:
    """Planned steps in the order of their outlines.

    Attributes:
        dependencies: number of a step -> numbers of the steps that it depends on.
        titles: number of a step -> its title in the outline.
        repeated: numbers that occur in more than one outline.
        unparsed: numbers of the outlines without a list of dependencies (an empty list `[]` is one).
    """

    dependencies: dict[int, list[int]] = field(default_factory=dict)
    titles: dict[int, str] = field(default_factory=dict)
    repeated: set[int] = field(default_factory=set)
    unparsed: set[int] = field(default_factory=set)

    def add(self, outline: str) -> int | None:
        """Add the step that an outline describes; return its number, or None if the text has no number.

        A number that the plan has already is only added to `repeated`.

        Args:
            outline: text between `<Outline>` and `</Outline>`.
        """
        match = STEP_NUMBER.search(outline)
        if match is None:
            return None
        number = int(match[1])
        if number in self.dependencies:
            self.repeated.add(number)
            return number
        listed = DEPENDENCIES.search(outline)
        if listed is None:
            self.unparsed.add(number)
        numbers = listed[1].replace(",", " ").split() if listed else []
        # STEP_NUMBER matches at most nine digits, so a longer number is never that of a step: it becomes -1.
        self.dependencies[number] = list(dict.fromkeys(int(text) if len(text) < 10 else -1 for text in numbers))
        title = STEP_TITLE.search(outline)
        self.titles[number] = title[1] if title else ""
        return number

    def problem(self) -> str:
        """Return why the plan cannot be executed as it is written, or an empty string if it can."""
        if self.repeated:
            return f"the plan has step {min(self.repeated)} more than once"
        if self.unparsed:
            return f"step {min(self.unparsed)} lists no numbers as `Dependency: [...]`"
        for number, needed in self.dependencies.items():
            for other in needed:
                if other == number:
                    return f"step {number} depends on itself"
                if other not in self.dependencies:
                    return f"step {number} depends on step {other}, which the plan does not have"
        cycle = find_cycle(self.dependencies)
        if cycle:
            return f"the dependencies of the steps form a cycle: {' -> '.join(map(str, cycle))}"
        for number, needed in self.dependencies.items():
            later = [other for other in needed if other > number]
            if later:
                return f"step {number} depends on the later step {later[0]}"
        return ""


class StepOrder:
    """Determines the parents of each step's segment, for steps that are added in the order of the text.

    Steps have indices from 0 in the order in which they are added.

    | mode | steps that a step may attend to |
    |---|---|
    | `dag` | those that it depends on, and those that these may attend to |
    | `layers` | every step of earlier layers; a new layer starts at a step that depends on one of the current layer |
    | `flat` | none |

    Without a plan each step follows the one before, except in `flat`. In `dag` and `layers`, a step that does not match
    the plan (see `problem`) may attend to all steps before it.

    Args:
        plan: the plan; without steps if the text has none.
        mode: `dag`, `layers` or `flat`.

    Attributes:
        count: steps added so far.
        index: number of a step -> index of the last step added with that number.
    """

    def __init__(self, plan: Plan, mode: str) -> None:
        self.plan = plan
        self.mode = mode
        self.count = 0
        self.index: dict[int, int] = {}
        self._layer: list[int] = []
        self._previous_layer: list[int] = []

    def problem(self, number: int | None) -> str:
        """Return why a step of this number does not match the plan if it is added next; an empty string if it does.

        Args:
            number: number of the step; None if its header has none.
        """
        if number is None:
            return "the step's first line has no `Transient Step N`"
        if not self.plan.dependencies:
            return "there is no plan that has this step"
        if number not in self.plan.dependencies:
            return f"step {number} is not in the plan"
        if number in self.plan.repeated:
            return f"the plan has step {number} more than once"
        if number in self.plan.unparsed:
            return f"step {number} lists no numbers as `Dependency: [...]`"
        if number in self.index:
            return f"step {number} occurs twice"
        for other in self.plan.dependencies[number]:
            if other not in self.index:
                return f"step {number} depends on step {other}, which does not come before it"
        return ""

    def add(self, number: int | None) -> list[int]:
        """Add a step; return the indices of its parents, empty if its parent is the text before the steps.

        In mode `layers` steps of one layer share the returned list, so do not change it.

        Args:
            number: number of the step; None if its header has none. Any number is accepted.
        """
        problem, index = self.problem(number), self.count
        needed = [] if problem else [self.index[other] for other in self.plan.dependencies[number or 0]]
        self.count += 1
        if number is not None:
            self.index[number] = index
        if self.mode == "flat":
            return []
        if not self.plan.dependencies:
            return [index - 1] if index else []
        if self.mode == "dag":
            return list(range(index)) if problem else needed
        if self._layer and (problem or not set(needed).isdisjoint(self._layer)):
            self._previous_layer, self._layer = self._layer, []
        self._layer.append(index)
        return self._previous_layer


def step_schedule(plan: Plan, mode: str, numbers: Iterable[int] | None = None) -> dict[int, list[int]]:
    """Return the number of each step -> numbers of the steps that must be done before it starts.

    A step whose dependencies are invalid waits for all steps before it, except in mode `flat`; `TopologyBuilder` reads
    the generated text in the same way.

    Args:
        plan: the plan.
        mode: `dag`, `layers` or `flat`; see `StepOrder`.
        numbers: the steps in their order, without repetition; by default those of the plan.
    """
    order = StepOrder(plan, mode)
    listed = list(plan.dependencies if numbers is None else numbers)
    return {number: [listed[index] for index in order.add(number)] for number in listed}
