"""The error of text or segments that do not make a topology."""

from __future__ import annotations

from hf_efficient.errors import HFEError


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
