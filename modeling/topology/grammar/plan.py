"""The plan of a MedVerse text: what its outlines say, whether it can be carried out, and what each step sees."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hf_efficient.modeling.topology.grammar.control_tokens import DEPENDENCIES, STEP_NUMBER, STEP_TITLE


@dataclass
class Plan:
    """Planned steps in the order of their outlines.

    Attributes:
        dependencies: number of a step -> numbers of the steps that it needs.
        titles: number of a step -> its title, as the outline has it.
        repeated: numbers that more than one outline has.
        unread: numbers of the outlines that list no dependencies, not even `[]`.
    """

    dependencies: dict[int, list[int]] = field(default_factory=dict)
    titles: dict[int, str] = field(default_factory=dict)
    repeated: set[int] = field(default_factory=set)
    unread: set[int] = field(default_factory=set)

    def add(self, outline: str) -> int | None:
        """Take an outline's text up; its number, or None when it has none."""
        found = STEP_NUMBER.search(outline)
        if found is None:
            return None
        number = int(found[1])
        if number in self.dependencies:
            self.repeated.add(number)
            return number
        listed = DEPENDENCIES.search(outline)
        if listed is None:
            self.unread.add(number)
        numbers = listed[1].replace(",", " ").split() if listed else []
        # A number too long to be a step's is one that no step has.
        self.dependencies[number] = list(dict.fromkeys(int(text) if len(text) < 10 else -1 for text in numbers))
        title = STEP_TITLE.search(outline)
        self.titles[number] = title[1] if title else ""
        return number

    def fault(self) -> str:
        """Why the plan cannot be carried out as it stands, or an empty text."""
        if self.repeated:
            return f"the plan has step {min(self.repeated)} more than once"
        if self.unread:
            return f"step {min(self.unread)} lists no numbers as `Dependency: [...]`"
        for number, needed in self.dependencies.items():
            for other in needed:
                if other == number:
                    return f"step {number} depends on itself"
                if other not in self.dependencies:
                    return f"step {number} depends on step {other}, which the plan does not have"
        cycle = self._cycle()
        if cycle:
            return f"the steps {' -> '.join(map(str, cycle))} depend on each other in a circle"
        for number, needed in self.dependencies.items():
            later = [other for other in needed if other > number]
            if later:
                return f"step {number} depends on the later step {later[0]}"
        return ""

    def _cycle(self) -> list[int]:
        """A circle of dependencies, its first number again at the end; empty when there is none."""
        settled: set[int] = set()
        for start in self.dependencies:
            trail: list[int] = []
            pending = [iter((start,))]
            while pending:
                number = next(pending[-1], None)
                if number is None:
                    pending.pop()
                    if trail:
                        settled.add(trail.pop())
                elif number in trail:
                    return [*trail[trail.index(number) :], number]
                elif number not in settled and number in self.dependencies:
                    trail.append(number)
                    pending.append(iter(self.dependencies[number]))
        return []


class StepOrder:
    """What each step sees of those before it, as they come in the text. Steps are counted from 0 in that order.

    | mode | a step sees |
    |---|---|
    | `dag` | the steps that the plan says it needs, and what those see |
    | `layers` | every step of the earlier layers; a layer ends before a step that needs one of its steps |
    | `flat` | no other step |

    Without a plan the steps are a chain. Except in `flat`, a step that the plan does not
    explain sees all steps before it.
    """

    def __init__(self, plan: Plan, mode: str) -> None:
        self.plan = plan
        self.mode = mode
        self.count = 0
        self.counted: dict[int, int] = {}  # number of a step -> the last step that had it
        self._layer: list[int] = []
        self._previous_layer: list[int] = []

    def fault(self, number: int | None) -> str:
        """What is wrong with a step of this number here, or an empty text."""
        if number is None:
            return "the step's first line has no `Transient Step N`"
        if not self.plan.dependencies:
            return "there is no plan that has this step"
        if number not in self.plan.dependencies:
            return f"step {number} is not in the plan"
        if number in self.plan.repeated:
            return f"the plan has step {number} more than once"
        if number in self.plan.unread:
            return f"step {number} lists no numbers as `Dependency: [...]`"
        if number in self.counted:
            return f"step {number} is there for the second time"
        for other in self.plan.dependencies[number]:
            if other not in self.counted:
                return f"step {number} needs step {other}, which does not stand before it"
        return ""

    def admit(self, number: int | None) -> list[int]:
        """Count a step and tell which steps its segment follows; none: it follows the text before the steps."""
        fault, step = self.fault(number), self.count
        needed = [] if fault else [self.counted[other] for other in self.plan.dependencies[number or 0]]
        self.count += 1
        if number is not None:
            self.counted[number] = step
        if self.mode == "flat":
            return []
        if not self.plan.dependencies:
            return [step - 1] if step else []
        if self.mode == "dag":
            return list(range(step)) if fault else needed
        if self._layer and (fault or not set(needed).isdisjoint(self._layer)):
            self._previous_layer, self._layer = self._layer, []
        self._layer.append(step)
        return self._previous_layer


def step_schedule(plan: Plan, mode: str, numbers: Iterable[int] | None = None) -> dict[int, list[int]]:
    """For each step, the numbers of the steps that must be done before it starts; in the order of the plan.

    A step whose dependencies make no sense waits for all steps before it, as the same text does when it is read.
    """
    order = StepOrder(plan, mode)
    listed = list(plan.dependencies if numbers is None else numbers)
    return {number: [listed[step] for step in order.admit(number)] for number in listed}
