"""A device cache of table rows: those of the tokens that were recently most frequent."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

# An occurrence this many tokens ago counts half as much as one now.
HALF_LIFE = 65_536


@dataclass(frozen=True)
class Admission:
    """The changes of a cache by one call.

    Attributes:
        ids: tokens that are added [n].
        indices: index of each among the call's distinct tokens [n].
        slots: cache slot of each [n].
        evicted: tokens that are removed [m].
    """

    ids: Tensor
    indices: Tensor
    slots: Tensor
    evicted: Tensor

    def to(self, device: torch.device) -> Admission:
        """The same on another device."""
        return Admission(*(getattr(self, field.name).to(device) for field in fields(self)))


class FrequencyPolicy:
    """LFU with ageing: caches the tokens with the highest counts, which decay with `HALF_LIFE`.

    Works on the host, on int64 ids, and decides only which tokens are cached.

    Args:
        vocab_size: number of token ids.
        capacity: number of slots.
    """

    def __init__(self, vocab_size: int, capacity: int) -> None:
        self.held = torch.full((capacity,), -1)  # token id in each slot, -1 in a free one
        self._slot_of = torch.full((vocab_size,), -1)
        self._counts = torch.zeros(vocab_size, dtype=torch.float64)

    def hits(self, ids: Tensor) -> Tensor:
        """Whether each of `ids` [u] is cached, bool [u]."""
        return self._slot_of[ids] >= 0

    def admit(self, ids: Tensor, counts: Tensor) -> Admission:
        """Count distinct, sorted `ids` [u] `counts` [u] times each, and choose which to add as now most frequent.

        The slots of added tokens count as free until `commit`.
        """
        self._counts *= 0.5 ** (int(counts.sum()) / HALF_LIFE)
        self._counts[ids] += counts
        known = torch.cat((self.held[self.held >= 0], ids[~self.hits(ids)]))
        # Sorted by id first and then stably by count, so that of equally frequent tokens the lower ids stay.
        known = known.sort().values
        order = self._counts[known].sort(descending=True, stable=True).indices
        kept = known[order[: len(self.held)]]
        stays = torch.isin(self.held, kept)
        evicted = self.held[~stays & (self.held >= 0)]
        self._slot_of[evicted] = -1
        self.held[~stays] = -1
        added = kept[~self.hits(kept)].sort().values
        slots = (self.held < 0).nonzero().flatten()[: len(added)]
        return Admission(added, torch.searchsorted(ids, added), slots, evicted)

    def commit(self, admission: Admission) -> None:
        """Record that the rows of the added tokens are in their slots."""
        self.held[admission.slots] = admission.ids
        self._slot_of[admission.ids] = admission.slots

    def drop(self, ids: Tensor) -> None:
        """Remove `ids`, whose rows have changed."""
        slots = self._slot_of[ids]
        self.held[slots[slots >= 0]] = -1
        self._slot_of[ids] = -1


class RowCache:
    """Cached rows of several tables on a device, of the same tokens in each.

    Its methods work on the current CUDA stream.

    Args:
        tables: weight of each table [V, F].
        capacity: number of rows to cache of each.
        device: of the cache.

    Attributes:
        policy: decides which tokens are cached.
        rows: the cached rows of each table [capacity, F].
        slot_of: slot of each token [V], int32; -1 if it is not cached.
    """

    def __init__(self, tables: list[Tensor], capacity: int, device: torch.device) -> None:
        vocab_size = len(tables[0])
        capacity = min(capacity, vocab_size)
        self.policy = FrequencyPolicy(vocab_size, capacity)
        with torch.inference_mode(False):  # used after the caller's inference mode ends
            self.rows = [torch.empty(capacity, t.shape[1], dtype=t.dtype, device=device) for t in tables]
            self.slot_of = torch.full((vocab_size,), -1, dtype=torch.int32, device=device)

    def forget(self, ids: Tensor) -> None:
        """Mark the tokens `ids` [n], a device tensor, as not cached."""
        self.slot_of[ids] = -1

    def fill(self, table: int, rows: Tensor, admission: Admission) -> None:
        """Copy the added tokens' rows, of the call's `rows` [u, F], into the slots of table number `table`."""
        self.rows[table].index_copy_(0, admission.slots, rows.index_select(0, admission.indices))

    def publish(self, admission: Admission) -> None:
        """Mark the added tokens as cached; call it after every table was filled."""
        self.slot_of[admission.ids] = admission.slots.to(torch.int32)


__all__ = ["HALF_LIFE", "Admission", "FrequencyPolicy", "RowCache"]
