"""MedVerse's control tokens: a plan of numbered steps, and the steps, each seeing those that it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_efficient.errors import TopologyError
from hf_efficient.modeling.topology.grammar.cursor import Cursor, Frame, Steps
from hf_efficient.modeling.topology.grammar.plan import Plan, StepOrder


class MedVerseRules(Cursor):
    """What each tag does."""

    in_plan: bool = False
    executed: bool = False

    @property
    def plan(self) -> dict[int, list[int]]:
        """Number of each planned step -> numbers of the steps that it needs."""
        return self.plan_read.dependencies

    @property
    def titles(self) -> dict[int, str]:
        """Number of each planned step -> its title."""
        return self.plan_read.titles

    @property
    def step_segment(self) -> dict[int, int]:
        """Number of each step that was opened in the open execution -> its segment."""
        steps = self.frame.steps if self.frame else None
        if steps is None:
            return {}
        return {n: steps.segments[place] for n, place in steps.order.counted.items() if place in steps.segments}

    def open_plan(self) -> bool:
        if self.in_path:
            return self.complain("a plan opens inside a step", "<Plan>", "close the step with </Step>")
        self.plan_read = Plan()
        self.in_plan, self.executed = True, False
        return True

    def open_planned(self) -> bool:
        return self.in_plan and self.open_outline()

    def close_planned(self) -> bool:
        if self.outline_ids is None:
            return False
        if self.plan_read.add(self.take_outline()) is None:
            return self.complain("the outline has no `Transient Step N`", "</Outline>", "number it, from 1")
        return True

    def close_plan(self) -> bool:
        if not self.in_plan:
            return self.complain("no plan is open", "</Plan>", "open it with <Plan>")
        self.in_plan, self.outline_ids = False, None
        fault = self.plan_read.fault()
        if fault:
            self.complain(fault, "</Plan>", "let each step depend only on planned steps with smaller numbers")
        return True

    def open_execution(self) -> bool:
        if self.frames:
            return self.complain("an execution opens inside another", "<Execution>", "close it with </Execution>")
        frame = self.open_frame("<Execution>")
        if frame is None:
            return False
        frame.steps = Steps(StepOrder(self.plan_read, self.mode))
        self.in_plan, self.executed = False, True
        return True

    def open_step(self, number: int | None) -> bool:
        if self.frame is None:
            self.complain("a step opens outside an execution", "<Step>", "open it with <Execution>")
            self.open_execution()
        frame = self.frames[-1]
        if frame.in_path:
            self.complain("a step opens inside another", "<Step>", "close it with </Step>")
            self.close_path(frame)
        steps = frame.steps
        if steps is None or not self.may_branch("<Step>"):
            return False
        if number in steps.schedule:
            place, followed = steps.schedule[number]
        else:
            fault = steps.order.fault(number)
            if fault:
                self.complain(fault, "<Step>", "let plan and execution have the same steps, each after those it needs")
            place, followed = steps.order.count, steps.order.admit(number)
        if any(step not in steps.segments for step in followed):
            raise TopologyError(
                f"step {number} opens before a step that it waits for", "open it later", tag="<Step>", row=self.row
            )
        parents = [steps.segments[step] for step in followed] or [frame.trunk]
        self.cur = steps.segments[place] = self.graph.new(parents, "?" if number is None else str(number))
        frame.in_path = True
        return True

    def close_step(self) -> bool:
        frame = self.frame
        if frame is None or not frame.in_path:
            return self.complain("no step is open", "</Step>", "open it with <Step>")
        self.close_path(frame)
        return True

    def close_execution(self) -> bool:
        if self.frame is None:
            return self.complain("no execution is open", "</Execution>", "open it with <Execution>")
        self.end_steps(self.frame, "</Execution>")
        return True

    def conclude_execution(self) -> bool:
        if self.frame is not None:
            self.complain("the execution is still open", "<Conclusion>", "close it with </Execution>")
            self.end_steps(self.frame, "<Conclusion>")
        return True

    def end_steps(self, frame: Frame, tag: str) -> None:
        """Close what is open, check that all was executed, and join."""
        if frame.in_path:
            self.complain("a step is still open", tag, "close it with </Step>")
            self.close_path(frame)
        opened = self.step_segment
        missing = next((number for number in self.plan if number not in opened), None)
        if missing is not None:
            self.complain(
                f"step {missing} is planned but never executed", tag, "execute it, or leave it out of the plan"
            )
        if frame.tails:
            self.join_segments(frame)
        self.frames.pop()


MEDVERSE_RULES: dict[str, Callable[..., Any]] = {
    "<Plan>": MedVerseRules.open_plan,
    "</Plan>": MedVerseRules.close_plan,
    "<Outline>": MedVerseRules.open_planned,
    "</Outline>": MedVerseRules.close_planned,
    "<Execution>": MedVerseRules.open_execution,
    "<Step>": MedVerseRules.open_step,
    "</Step>": MedVerseRules.close_step,
    "</Execution>": MedVerseRules.close_execution,
    "<Conclusion>": MedVerseRules.conclude_execution,
}
