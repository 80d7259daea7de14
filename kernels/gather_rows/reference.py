"""gather_rows in plain PyTorch: the definition of the operation."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(
    table: Tensor,
    ids: Tensor,
    *,
    cache: Tensor | None = None,
    cache_slots: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rows [u, F] of `table`, cached ones from `cache`; zeros for ids outside the table."""
    inside = (ids >= 0) & (ids < table.shape[0])
    safe = torch.where(inside, ids, 0)
    found = table.index_select(0, safe.to(table.device)).to(ids.device)
    if cache is not None and cache_slots is not None and cache.shape[0] > 0:
        slots = cache_slots.index_select(0, safe)
        cached = (slots >= 0) & (slots < cache.shape[0])
        found = torch.where(cached[:, None], cache.index_select(0, torch.where(cached, slots, 0)), found)
    found = found.masked_fill(~inside[:, None], 0)
    return found if out is None else out.copy_(found)
