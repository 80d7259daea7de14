"""The table rows of one call of the model: each distinct token once, whichever memory the tables are in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _RowsOfTable(torch.autograd.Function):
    """`rows` [u, F], which are ``table[ids]`` for distinct and sorted ids [u]; the table's gradient is sparse.

    Only the rows that were looked up have a gradient, in the dtype and on the device of the table.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.device = table.shape, table.device
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        ids, values = ids[None].to(ctx.device), drows.to(ctx.device)
        # Sorted and distinct by construction, so nothing needs checking.
        gradient = torch.sparse_coo_tensor(ids, values, ctx.shape, check_invariants=False, is_coalesced=True)
        return None, gradient, None


class TokenRows:
    """Rows of the STEM tables that one call looks up: layers get this in place of the token ids.

    Attributes:
        ids: token ids of the call [B, S].
        distinct: ids whose rows are fetched [u]; sorted, where they are distinct.
        slots: place of each token's row among them [B, S], so that ``rows(table)[slots]`` is ``table[ids]``.
    """

    def __init__(self, ids: Tensor, merge: bool = True) -> None:
        """
        Args:
            ids: token ids [B, S].
            merge: look each distinct token up once, which waits for the device; otherwise every position has a row.
        """
        self.ids = ids
        self.merged = merge
        if merge:
            self.distinct, self.slots = torch.unique(ids, return_inverse=True)
        else:
            self.distinct = ids.reshape(-1)
            self.slots = torch.arange(ids.numel(), device=ids.device).view(ids.shape)

    def rows(self, table: nn.Embedding) -> Tensor:
        """Rows of `table` [u, F], on the device of the ids. Where they are differentiated, its gradient is sparse."""
        rows = self.fetch(table)
        if torch.is_grad_enabled() and table.weight.requires_grad:
            return _RowsOfTable.apply(rows, table.weight, self.distinct)
        return rows

    def look_up(self, table: nn.Module) -> Tensor:
        """Rows [B, S, F] by calling the table's module, around which anything may stand."""
        return table(self.ids)

    def fetch(self, table: nn.Embedding) -> Tensor:
        """The rows as plain data [u, F]."""
        return table.weight.detach().index_select(0, self.distinct)
