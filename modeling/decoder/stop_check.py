"""Checks whether all sequences have finished without waiting for the device after every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Tokens between two checks. A check costs 1-2 ms of CPU time; up to twice as many tokens are computed past the end and
# discarded.
STOP_CHECK_INTERVAL = 8


class AsyncStopCheck:
    """Copies finished flags and tokens to the host asynchronously, and passes the tokens to a streamer.

    For each generated token, `count_step` is called with the flags before it, `send` with those after it, and
    `all_finished` after the next decoding step has been launched, so that the device does not idle while the host
    waits.

    Args:
        ids: int64 [B, length]; only its dtype and device are used.
        streamer: its `put` gets the tokens [B] of each check, on the CPU, so `every_token` must be True; None for no
            streamer.
        every_token: check after every token. Otherwise every `STOP_CHECK_INTERVAL` tokens, and `all_finished` reads a
            check only when the next one has been sent.
    """

    def __init__(self, ids: Tensor, streamer: Any, every_token: bool) -> None:
        self.streamer = streamer
        self.every_token = every_token
        self._steps = ids.new_zeros(())
        self._in_flight: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._tokens = 0

    def count_step(self, unfinished: Tensor) -> None:
        """Count a token if any sequence was unfinished before it; `unfinished` is int64 [B], 1 or 0."""
        self._steps += unfinished.max()

    def send(self, unfinished: Tensor, token: Tensor) -> None:
        """Start to copy the state after a token to the host, if a check is due.

        Args:
            unfinished: int64 [B], 1 for each sequence that has not finished, else 0.
            token: int64 [B], the token.
        """
        self._tokens += 1
        if not self.every_token and self._tokens % STOP_CHECK_INTERVAL:
            return
        state = torch.cat((unfinished.max()[None], token))
        if not state.is_cuda:
            self._in_flight.append((state, None))
            return
        event = torch.cuda.Event()
        host = torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
        host.copy_(state, non_blocking=True)
        event.record()
        self._in_flight.append((host, event))

    def all_finished(self) -> bool:
        """Read the oldest copied state and pass its tokens to the streamer; True if every sequence had finished in it.

        Waits for that copy, not for later steps. Reads nothing and returns False with fewer copied states than one
        (`every_token`) or two (otherwise).
        """
        if len(self._in_flight) < (1 if self.every_token else 2):
            return False
        return self._read(*self._in_flight.pop(0))

    def _read(self, state: Tensor, event: torch.cuda.Event | None) -> bool:
        """Wait for a copied state, int64 [1 + B]: pass its tokens to the streamer; True if all had finished."""
        if event is not None:
            event.synchronize()
        if self.streamer is not None:
            self.streamer.put(state[1:].clone().cpu())
        return not bool(state[0])

    def finish(self) -> int:
        """Return the number of tokens until every sequence had finished, those of `count_step`; waits for the device.

        Before that, passes the tokens of the remaining states to the streamer and ends it.
        """
        if self.streamer is not None:
            for state in self._in_flight:
                self._read(*state)
            self.streamer.end()
        return int(self._steps)
