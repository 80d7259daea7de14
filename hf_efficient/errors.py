"""Errors a user can act on: what was given, the rule it breaks, and the remedy.

Every storey raises these, so this module imports nothing but the standard library.
"""

from __future__ import annotations


class HFEError(ValueError):
    """Something found in data or at run time. The command line exits with status 1.

    Args:
        problem: what was given and the rule it breaks, with the offending value.
        remedy: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}; {remedy}" if remedy else problem)


class UsageError(HFEError):
    """An argument or option is wrong, found before any source is read. Exits with status 2."""

    exit_code = 2


class TokenIdError(HFEError, IndexError):
    """A token id lies outside the vocabulary or table it indexes."""


class BackendError(HFEError, RuntimeError):
    """The requested kernel backend cannot run here."""


class TopologyError(HFEError):
    """Text or segments that do not make a topology.

    Attributes:
        index: index of the offending token in its row; None where no token is to blame.
        tag: the control token there.
        row: row of the batch.
    """

    def __init__(
        self,
        problem: str,
        remedy: str = "",
        *,
        index: int | None = None,
        tag: str | None = None,
        row: int | None = None,
    ) -> None:
        self.index, self.tag, self.row = index, tag, row
        named = (("row", row), ("token", index))
        where = ", ".join(f"{name} {value}" for name, value in named if value is not None)
        where = " ".join(part for part in (where, tag) if part)
        super().__init__(f"{where}: {problem}" if where else problem, remedy)
