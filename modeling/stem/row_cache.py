"""Which table rows are worth keeping on the device: those of the tokens that came most often of late."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

# A token seen this many tokens ago counts half as much as one seen now.
HALF_LIFE = 65_536


@dataclass(frozen=True)
class Admission:
    """What a cache takes in after a call.

    Attributes:
        ids: tokens that come in [n].
        places: where each of them is among the call's distinct tokens [n].
        slots: which slot each gets [n].
        evicted: tokens that leave [m].
    """

    ids: Tensor
    places: Tensor
    slots: Tensor
    evicted: Tensor

    def to(self, device: torch.device) -> Admission:
        """The same on another device."""
        return Admission(*(getattr(self, field.name).to(device) for field in fields(self)))


class FrequencyPolicy:
    """Least frequently used, with ageing: holds the tokens with the highest counts, which fade with `HALF_LIFE`.

    Works on the host, on int64 ids. It decides what is held, never what a row contains.

    Args:
        vocab_size: ids are below it.
        capacity: slots.
    """

    def __init__(self, vocab_size: int, capacity: int) -> None:
        self.held = torch.full((capacity,), -1)  # id in each slot; -1: free
        self._slot_of = torch.full((vocab_size,), -1)
        self._counts = torch.zeros(vocab_size, dtype=torch.float64)

    def hits(self, ids: Tensor) -> Tensor:
        """Which of these ids are held [u], bool."""
        return self._slot_of[ids] >= 0

    def admit(self, ids: Tensor, counts: Tensor) -> Admission:
        """Count distinct `ids` [u], each seen `counts` times, and let in those that now belong to the most frequent.

        The slots of newcomers are free until `commit`.
        """
        self._counts *= 0.5 ** (int(counts.sum()) / HALF_LIFE)
        self._counts[ids] += counts
        known = torch.cat((self.held[self.held >= 0], ids[~self.hits(ids)]))
        # Stable, and by id before: of tokens that are equally frequent the lower ids stay.
        known = known.sort().values
        order = self._counts[known].sort(descending=True, stable=True).indices
        kept = known[order[: len(self.held)]]
        stays = torch.isin(self.held, kept)
        evicted = self.held[~stays & (self.held >= 0)]
        self._slot_of[evicted] = -1
        self.held[~stays] = -1
        newcomers = kept[~self.hits(kept)].sort().values
        slots = (self.held < 0).nonzero().flatten()[: len(newcomers)]
        return Admission(newcomers, torch.searchsorted(ids, newcomers), slots, evicted)

    def commit(self, admission: Admission) -> None:
        """The newcomers' rows are in their slots."""
        self.held[admission.slots] = admission.ids
        self._slot_of[admission.ids] = admission.slots

    def drop(self, ids: Tensor) -> None:
        """Forget rows whose content has changed."""
        slots = self._slot_of[ids]
        self.held[slots[slots >= 0]] = -1
        self._slot_of[ids] = -1


class RowCache:
    """Rows of several tables on the device, the same tokens of each.

    Args:
        tables: weights [V, F] of each table.
        capacity: rows to hold of each.
        device: where.

    Attributes:
        rows: the rows of each table [capacity, F].
        slot_of: slot of each token [V], int32; -1 where it is not held.
    """

    def __init__(self, tables: list[Tensor], capacity: int, device: torch.device) -> None:
        vocab_size = len(tables[0])
        capacity = min(capacity, vocab_size)
        self.policy = FrequencyPolicy(vocab_size, capacity)
        with torch.inference_mode(False):  # these outlive the caller's inference mode
            self.rows = [torch.empty(capacity, t.shape[1], dtype=t.dtype, device=device) for t in tables]
            self.slot_of = torch.full((vocab_size,), -1, dtype=torch.int32, device=device)

    def forget(self, ids: Tensor) -> None:
        """On the current stream: nobody finds these tokens [n], of the device, here any more."""
        self.slot_of[ids] = -1

    def fill(self, table: int, rows: Tensor, admission: Admission) -> None:
        """On the current stream: put the newcomers among the call's `rows` [u, F] into the slots of one table."""
        self.rows[table].index_copy_(0, admission.slots, rows.index_select(0, admission.places))

    def publish(self, admission: Admission) -> None:
        """On the current stream, after every table was filled: from now on the newcomers are found."""
        self.slot_of[admission.ids] = admission.slots.to(torch.int32)


__all__ = ["HALF_LIFE", "Admission", "FrequencyPolicy", "RowCache"]
