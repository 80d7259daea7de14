"""Streaming of generated tokens, with the branch that each belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_efficient.errors import UsageError
from hf_efficient.modeling.topology.generation.branches import BranchPath, TextOrderReader
from hf_efficient.modeling.topology.generation.scheduler import SequenceScheduler


class BranchStreamer:
    """A streamer that also receives each token's batch row and branch. Subclass it, or read `events` afterwards.

    Attributes:
        events: (batch row, path of the branch, token id), in the order in which the tokens were generated, without the
            prompt.
    """

    def __init__(self) -> None:
        self.events: list[tuple[int, BranchPath, int]] = []

    def put(self, value: Tensor) -> None:
        """Receive the prompt's ids [B, S], before any token."""

    def put_token(self, row: int, path: BranchPath, token_id: int) -> None:
        """Receive one sampled or forced token."""
        self.events.append((row, path, token_id))

    def end(self) -> None:
        """Called after the last token."""


class StreamWriter:
    """Writes generated tokens to a streamer.

    A `BranchStreamer` receives them as they are generated, any other streamer in the order of the text.

    Args:
        streamer: has `put` and `end`, as in transformers.
        sequences: the sequences of the batch; only one for a streamer without `put_token`.

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
                f"a {type(streamer).__name__} takes one sequence, and there are {len(sequences)}",
                "pass one prompt, or a BranchStreamer",
            )

    def flush(self) -> None:
        """Write the tokens generated since the last call."""
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
        """Write the rest and end the stream."""
        self.flush()
        self.streamer.end()
