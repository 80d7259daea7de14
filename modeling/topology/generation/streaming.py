"""Streaming of generated tokens, with the branch that each belongs to.

A branch is a part of a sequence that is decoded in parallel with others. Its path (`BranchPath`) lists the forks from
the root branch to it: for each, the index of the fork in its branch and the label of the child; () for the root branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_efficient.errors import UsageError
from hf_efficient.modeling.topology.generation.branches import BranchPath, TextOrderReader
from hf_efficient.modeling.topology.generation.scheduler import SequenceScheduler


class BranchStreamer:
    """A streamer that receives each token with its batch row and branch, as soon as the token is generated.

    Subclass it, or read `events` afterwards.

    Attributes:
        events: (batch row, path of the branch, token id) of each token after the prompt, in the order in which the
            tokens were generated.
    """

    def __init__(self) -> None:
        self.events: list[tuple[int, BranchPath, int]] = []

    def put(self, value: Tensor) -> None:
        """Receive the prompts' ids, int64 [B, P], before any token; this class ignores them."""

    def put_token(self, row: int, path: BranchPath, token_id: int) -> None:
        """Receive one token and append it to `events`.

        Args:
            row: batch row.
            path: path of the branch.
            token_id: the token, sampled or forced (appended by generation without sampling).
        """
        self.events.append((row, path, token_id))

    def end(self) -> None:
        """Called after the last token; does nothing here."""


class StreamWriter:
    """Passes generated tokens on to a streamer.

    A streamer with the method `put_token` (`BranchStreamer`) receives each token as it is generated. Any other streamer
    receives int64 [1] on the CPU for each token in the order of the text, in which later branches wait for earlier
    ones.

    Args:
        streamer: has the methods `put` and `end`, as in transformers.
        sequences: the sequences of the batch, at least one; exactly one for a streamer without `put_token`.

    Raises:
        UsageError: a streamer without `put_token` is given several sequences.
    """

    def __init__(self, streamer: Any, sequences: Sequence[SequenceScheduler]) -> None:
        self.streamer = streamer
        self.sequences = sequences
        self._num_streamed_tokens = [sequence.prompt_length for sequence in sequences]
        self._reader = TextOrderReader(sequences[0].trunk)
        self._has_branches = hasattr(streamer, "put_token")
        if not self._has_branches and len(sequences) > 1:
            raise UsageError(
                f"a {type(streamer).__name__} supports one sequence, but there are {len(sequences)}",
                "pass one prompt, or a BranchStreamer",
            )

    def flush(self) -> None:
        """Pass on the tokens generated since the last call; outside a `BranchStreamer`, those whose turn has come."""
        if not self._has_branches:
            for slot in self._reader.read():
                self.streamer.put(torch.tensor([self.sequences[0].tokens[slot]]))
            return
        for i, sequence in enumerate(self.sequences):
            for slot in range(self._num_streamed_tokens[i], len(sequence.tokens)):
                path = sequence.token_branches[slot - sequence.prompt_length].path
                self.streamer.put_token(sequence.row, path, sequence.tokens[slot])
            self._num_streamed_tokens[i] = len(sequence.tokens)

    def end(self) -> None:
        """Pass on the remaining tokens and call the streamer's `end`."""
        self.flush()
        self.streamer.end()
