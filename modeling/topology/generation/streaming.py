"""Tokens as they come, with the branch that each belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_efficient.errors import UsageError
from hf_efficient.modeling.topology.generation.branches import BranchPath, TextOrderReader
from hf_efficient.modeling.topology.generation.scheduler import SequenceScheduler


class BranchStreamer:
    """A streamer that is told each token's row and branch. Subclass it, or read `events` afterwards.

    Attributes:
        events: (row, path of the branch, token id), in the order in which the tokens were written; the prompt is not
            among them.
    """

    def __init__(self) -> None:
        self.events: list[tuple[int, BranchPath, int]] = []

    def put(self, value: Tensor) -> None:
        """The prompt's ids [B, S], before all else."""

    def put_token(self, row: int, path: BranchPath, token_id: int) -> None:
        """One token that was sampled or forced."""
        self.events.append((row, path, token_id))

    def end(self) -> None:
        """After the last token."""


class StreamWriter:
    """Hands the tokens of rows to a streamer: to a `BranchStreamer` as they come, to any other in the text's order.

    Args:
        streamer: has `put` and `end`, as in transformers.
        rows: one row where the streamer knows no branches.
    """

    def __init__(self, streamer: Any, rows: Sequence[SequenceScheduler]) -> None:
        self.streamer = streamer
        self.rows = rows
        self._handed = [row.prompt_length for row in rows]
        self._reader = TextOrderReader(rows[0].trunk)
        self._knows_branches = hasattr(streamer, "put_token")
        if not self._knows_branches and len(rows) > 1:
            raise UsageError(
                f"a {type(streamer).__name__} takes one row, and there are {len(rows)}",
                "pass one prompt, or a BranchStreamer",
            )

    def flush(self) -> None:
        """Hand over what has been written since the last call."""
        if not self._knows_branches:
            for column in self._reader.read():
                self.streamer.put(torch.tensor([self.rows[0].tokens[column]]))
            return
        for i, row in enumerate(self.rows):
            for column in range(self._handed[i], len(row.tokens)):
                path = row.token_branches[column - row.prompt_length].path
                self.streamer.put_token(row.row, path, row.tokens[column])
            self._handed[i] = len(row.tokens)

    def end(self) -> None:
        """Hand over the rest."""
        self.flush()
        self.streamer.end()
