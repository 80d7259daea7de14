"""Limits of a sequence in parallel generation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from hf_efficient.errors import UsageError

BUDGETS = ("positions", "tokens")


def is_integer(value: Any) -> bool:
    """True for integers, including those of numpy; False for booleans."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class Limits:
    """Limits of one sequence.

    Attributes:
        max_new_tokens: the budget.
        budget: unit of the budget: `positions`, the longest chain of tokens, as in the published engine; or `tokens`,
            the tokens of all branches.
        branch_max_new_tokens: limit of sampled tokens in one branch; None for no limit besides the budget.
        max_branches: limit of active branches; further ones are queued and start as soon as one ends.
        max_depth: limit of nested parallel blocks; the paths of deeper blocks are decoded sequentially.
        min_fork_budget: with a smaller remaining budget, branches are decoded sequentially.
        eos_ids: tokens that end a branch.

    Raises:
        UsageError: a value is not an integer, is too small, or names no budget.
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
