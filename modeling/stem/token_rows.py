"""The table rows of one call of the model: each distinct token once, whichever memory the tables are in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _DistinctRows(torch.autograd.Function):
    """``table[ids]`` for distinct, sorted ids [u], on their device [u, F]; the table's gradient is sparse.

    Only the rows that were looked up have a gradient, in the dtype and on the device of the table.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        there = ids.to(table.device)
        ctx.save_for_backward(there)
        ctx.shape = table.shape
        return table.index_select(0, there).to(ids.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        values = drows.to(ids.device)
        # Sorted and distinct by construction, so nothing needs checking.
        return torch.sparse_coo_tensor(ids[None], values, ctx.shape, check_invariants=False, is_coalesced=True), None


class TokenRows:
    """Rows of the STEM tables that one call looks up: layers get this in place of the token ids.

    Attributes:
        ids: token ids of the call [B, S].
        distinct: ids whose rows are fetched [u], sorted where they are distinct.
        slots: place of each token's row among them [B, S], so that ``rows(table)[slots]`` is ``table[ids]``.
    """

    def __init__(self, ids: Tensor, merge: bool = True) -> None:
        """
        Args:
            ids: token ids [B, S].
            merge: look each distinct token up once, which waits for the device; otherwise every position has a row.
        """
        self.ids = ids
        if merge:
            self.distinct, self.slots = torch.unique(ids, return_inverse=True)
        else:
            self.distinct = ids.reshape(-1)
            self.slots = torch.arange(ids.numel(), device=ids.device).view(ids.shape)

    def rows(self, table: nn.Embedding) -> Tensor:
        """Rows of `table` [u, F], on the device of the ids. Where they are differentiated, its gradient is sparse."""
        return _DistinctRows.apply(table.weight, self.distinct)
