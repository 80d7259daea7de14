"""The error for text or segments that do not form a topology (a graph of segments; see `grammar/topology.py`)."""

from __future__ import annotations

from hf_efficient.errors import HFEError


class TopologyError(HFEError):
    """Text or segments do not form a valid topology, or a tokenizer lacks the control tokens.

    The message is prefixed with `row`, `index` and `tag` where they are given; all three are also attributes.

    Args:
        problem: what is wrong.
        remedy: how to correct it.
        index: index of the malformed token in its row; None if the error is not at one token.
        tag: the control token there, or None.
        row: batch row, or None.
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
