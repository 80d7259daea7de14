"""MedVerse's control tokens: a plan of numbered steps with dependencies, and the steps of its execution.

    <Plan> (<Outline> Transient Step 1: A -> B; Dependency: [] </Outline>)+ </Plan>
    <Execution> (<Step> Transient Step 1: A -> B\\n text </Step>)+ </Execution> <Conclusion> text </Conclusion>

A segment is a run of consecutive tokens; a token may attend to the tokens before it in its own segment and to all
tokens of the segment's ancestors. Each step is a segment that follows the steps that it depends on, or else the trunk,
which is the segment in which the execution opened. The join is the segment after the execution, which follows all
steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_efficient.modeling.topology.errors import TopologyError
from hf_efficient.modeling.topology.grammar.cursor import Cursor, Frame, Steps
from hf_efficient.modeling.topology.grammar.plan import Plan, StepOrder


class MedVerseRules(Cursor):
    """The rule of each control token, to be called before the token is appended to `segment`.

    A rule returns True if it applied its token, and False if the token has no meaning at this place and is an ordinary
    token. At a malformed token it raises `TopologyError` if `strict`; otherwise it adds to `warnings` (see
    `Cursor.report_malformed`) and goes on, or returns False.

    Attributes:
        in_plan: a plan is open.
        executed: the last plan has been followed by an execution.
    """

    in_plan: bool = False
    executed: bool = False

    @property
    def plan(self) -> dict[int, list[int]]:
        """Number of each planned step -> numbers of the steps that it depends on, in the order of the outlines."""
        return self.parsed_plan.dependencies

    @property
    def titles(self) -> dict[int, str]:
        """Number of each planned step -> its title."""
        return self.parsed_plan.titles

    @property
    def step_segment(self) -> dict[int, int]:
        """Number of each step opened so far in the open execution -> its segment; empty outside an execution."""
        steps = self.frame.steps if self.frame else None
        if steps is None:
            return {}
        return {n: steps.segments[index] for n, index in steps.order.index.items() if index in steps.segments}

    def open_plan(self) -> bool:
        """`<Plan>`: start a new plan."""
        if self.in_path:
            return self.report_malformed("a plan opens inside a step", "<Plan>", "close the step with </Step>")
        self.parsed_plan = Plan()
        self.in_plan, self.executed = True, False
        return True

    def open_planned_step(self) -> bool:
        """`<Outline>`: start to collect the token ids of a planned step; an ordinary token outside a plan."""
        return self.in_plan and self.open_outline()

    def close_planned_step(self) -> bool:
        """`</Outline>`: add the collected step to the plan; an ordinary token if no outline is open."""
        if self.outline_ids is None:
            return False
        if self.parsed_plan.add(self.pop_outline()) is None:
            return self.report_malformed("the outline has no `Transient Step N`", "</Outline>", "number it, from 1")
        return True

    def close_plan(self) -> bool:
        """`</Plan>`: end the plan and check that it can be executed; True also for a plan that cannot."""
        if not self.in_plan:
            return self.report_malformed("no plan is open", "</Plan>", "open it with <Plan>")
        self.in_plan, self.outline_ids = False, None
        problem = self.parsed_plan.problem()
        if problem:
            self.report_malformed(problem, "</Plan>", "let each step depend only on planned steps with smaller numbers")
        return True

    def open_execution(self) -> bool:
        """`<Execution>`: open the block of the steps of the last plan; marks the plan as executed."""
        if self.frames:
            return self.report_malformed(
                "an execution opens inside another", "<Execution>", "close it with </Execution>"
            )
        frame = self.open_frame("<Execution>")
        if frame is None:
            return False
        frame.steps = Steps(StepOrder(self.parsed_plan, self.mode))
        self.in_plan, self.executed = False, True
        return True

    def open_step(self, number: int | None) -> bool:
        """`<Step>`: make `segment` a new segment that follows the steps it depends on, or the trunk.

        If not `strict`, a step outside an execution opens one, and a step inside another closes that one.

        Args:
            number: the step's number; None if its header has none.

        Returns:
            False, after `report_malformed`, if the graph has no room for the step; otherwise True.

        Raises:
            TopologyError: malformed and `strict`; or, even if not `strict`, a step that it depends on has not been
                opened in an execution whose steps were forked (see `TopologyBuilder.fork`).
        """
        if self.frame is None:
            self.report_malformed("a step opens outside an execution", "<Step>", "open it with <Execution>")
            self.open_execution()
        frame = self.frames[-1]
        if frame.in_path:
            self.report_malformed("a step opens inside another", "<Step>", "close it with </Step>")
            self.close_path(frame)
        steps = frame.steps
        if steps is None or not self.can_add_path("<Step>"):
            return False
        if number in steps.schedule:
            index, parents = steps.schedule[number]
        else:
            problem = steps.order.problem(number)
            if problem:
                self.report_malformed(
                    problem, "<Step>", "let plan and execution have the same steps, each after those it depends on"
                )
            index, parents = steps.order.count, steps.order.add(number)
        if any(parent not in steps.segments for parent in parents):
            raise TopologyError(
                f"step {number} opens before a step that it depends on", "open it later", tag="<Step>", row=self.row
            )
        segments = [steps.segments[parent] for parent in parents] or [frame.trunk]
        self.segment = steps.segments[index] = self.graph.new(segments, "?" if number is None else str(number))
        frame.in_path = True
        return True

    def close_step(self) -> bool:
        """`</Step>`: close the open step, whose segment a separator may still extend."""
        frame = self.frame
        if frame is None or not frame.in_path:
            return self.report_malformed("no step is open", "</Step>", "open it with <Step>")
        self.close_path(frame)
        return True

    def close_execution(self) -> bool:
        """`</Execution>`: join the steps in a new segment and close the block."""
        if self.frame is None:
            return self.report_malformed("no execution is open", "</Execution>", "open it with <Execution>")
        self.end_steps(self.frame, "</Execution>")
        return True

    def conclude_execution(self) -> bool:
        """`<Conclusion>`: join the steps and close the block if `</Execution>` has not; that is malformed."""
        if self.frame is not None:
            self.report_malformed("the execution is still open", "<Conclusion>", "close it with </Execution>")
            self.end_steps(self.frame, "<Conclusion>")
        return True

    def end_steps(self, frame: Frame, tag: str) -> None:
        """Close the open step, check that every planned step was executed, join the steps and close the block.

        Without any step `segment` stays the same.

        Args:
            frame: the open execution.
            tag: control token that ends it, for messages.
        """
        if frame.in_path:
            self.report_malformed("a step is still open", tag, "close it with </Step>")
            self.close_path(frame)
        opened = self.step_segment
        missing = next((number for number in self.plan if number not in opened), None)
        if missing is not None:
            self.report_malformed(
                f"step {missing} is planned but never executed", tag, "execute it, or leave it out of the plan"
            )
        if frame.path_ends:
            self.join_paths(frame)
        self.frames.pop()


# Control token -> its rule. The rule of `<Step>` takes the step's number; `<Think>` and `</Think>` have none.
MEDVERSE_RULES: dict[str, Callable[..., Any]] = {
    "<Plan>": MedVerseRules.open_plan,
    "</Plan>": MedVerseRules.close_plan,
    "<Outline>": MedVerseRules.open_planned_step,
    "</Outline>": MedVerseRules.close_planned_step,
    "<Execution>": MedVerseRules.open_execution,
    "<Step>": MedVerseRules.open_step,
    "</Step>": MedVerseRules.close_step,
    "</Execution>": MedVerseRules.close_execution,
    "<Conclusion>": MedVerseRules.conclude_execution,
}
