"""Limits of a sequence in parallel generation.

A branch is a part of the sequence that is decoded in parallel with others (a Multiverse path or a MedVerse step);
blocks are the groups of such parts in the text.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from hf_efficient.errors import UsageError

BUDGETS = ("positions", "tokens")


def is_integer(value: Any) -> bool:
    """True if `value` is an integer, of Python or numpy; False for booleans."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class Limits:
    """Limits of one sequence, checked when the object is created.

    Attributes:
        max_new_tokens: the budget, at least 1.
        budget: unit of the budget: `positions`, rotary positions after the prompt, which parallel branches share, so
            that it limits the longest dependency path of tokens, as in the published engine; or `tokens`, the tokens of
            all branches together.
        branch_max_new_tokens: maximum number of sampled tokens in one branch, at least 1; None for no limit besides the
            budget.
        max_branches: maximum number of active branches, at least 1; further ones are queued and start as soon as one
            ends.
        max_depth: maximum depth of nested parallel blocks, at least 0; the paths of deeper blocks are decoded
            sequentially.
        min_fork_budget: with a smaller remaining budget, branches are decoded sequentially; at least 0.
        eos_ids: ids of the tokens that end a branch or, in the trunk, the sequence.

    Raises:
        UsageError: a number is not an integer or is below its minimum, or `budget` is unknown.
    """

    max_new_tokens: int
    budget: str = "positions"
    branch_max_new_tokens: int | None = None
    max_branches: int = 32
    max_depth: int = 5
    min_fork_budget: int = 30
    eos_ids: Collection[int] = ()

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise UsageError(f"budget={self.budget!r} is unknown", f"choose one of {', '.join(BUDGETS)}")
        minimums = {"max_new_tokens": 1, "max_branches": 1, "max_depth": 0, "min_fork_budget": 0}
        if self.branch_max_new_tokens is not None:
            minimums["branch_max_new_tokens"] = 1
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if not is_integer(value):
                raise UsageError(f"{name}={value!r} is not an integer", f"pass one of at least {minimum}")
            if value < minimum:
                raise UsageError(f"{name}={value} is too small", f"pass at least {minimum}")
