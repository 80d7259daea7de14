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
        ids: token ids that are added, int64 [n].
        indices: index of each among the call's distinct tokens, int64 [n].
        slots: cache slot of each, int64 [n].
        evicted: token ids that are removed, int64 [m].
    """

    ids: Tensor
    indices: Tensor
    slots: Tensor
    evicted: Tensor

    def to(self, device: torch.device) -> Admission:
        """Return the same changes on another device."""
        return Admission(*(getattr(self, field.name).to(device) for field in fields(self)))


class FrequencyPolicy:
    """Decides which tokens are cached: those with the highest counts, which decay with `HALF_LIFE` (LFU with ageing).

    Works on the host, on int64 ids; it holds no rows.

    Args:
        vocab_size: number of token ids.
        capacity: number of slots.

    Attributes:
        held: int64 [capacity], token id in each slot, -1 in a free one.
    """

    def __init__(self, vocab_size: int, capacity: int) -> None:
        self.held = torch.full((capacity,), -1)
        self._slot_of = torch.full((vocab_size,), -1)
        self._counts = torch.zeros(vocab_size, dtype=torch.float64)

    def hits(self, ids: Tensor) -> Tensor:
        """Return whether each of `ids` [u] is cached, bool [u]."""
        return self._slot_of[ids] >= 0

    def admit(self, ids: Tensor, counts: Tensor) -> Admission:
        """Count distinct, sorted `ids` [u] `counts` [u] times each, and return which tokens to add and to evict.

        Evicted tokens are no longer cached on return. Added ones are cached from `commit` on; until then their slots
        count as free, so call `commit` before the next `admit`, or drop this result.
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
        """Record that the rows of the added tokens are in their slots; `admission` must be the last one of `admit`."""
        self.held[admission.slots] = admission.ids
        self._slot_of[admission.ids] = admission.slots

    def drop(self, ids: Tensor) -> None:
        """Mark `ids` [n], whose rows have changed, as not cached; their counts stay."""
        slots = self._slot_of[ids]
        self.held[slots[slots >= 0]] = -1
        self._slot_of[ids] = -1


class RowCache:
    """Cached rows of several tables on a device, of the same tokens in each.

    Its methods work on the current CUDA stream.

    Args:
        tables: weight of each table [V, F].
        capacity: number of rows to cache of each; at most V are.
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
        """Mark the tokens `ids` [n], a device tensor, as not cached in `slot_of`; `policy` is not changed."""
        self.slot_of[ids] = -1

    def fill(self, table: int, rows: Tensor, admission: Admission) -> None:
        """Copy the added tokens' rows, of the call's `rows` [u, F], into their slots, in place.

        Args:
            table: number of the table.
            rows: rows of the call's distinct tokens [u, F], on the device.
            admission: result of `FrequencyPolicy.admit` for these tokens, on the device.
        """
        self.rows[table].index_copy_(0, admission.slots, rows.index_select(0, admission.indices))

    def publish(self, admission: Admission) -> None:
        """Mark the added tokens as cached in `slot_of`; call it after every table was filled.

        `admission` is on the device. `policy` records it by `commit`.
        """
        self.slot_of[admission.ids] = admission.slots.to(torch.int32)


__all__ = ["HALF_LIFE", "Admission", "FrequencyPolicy", "RowCache"]
