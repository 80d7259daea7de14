"""The table rows of one call of the model: each distinct token once, whichever memory the tables are in."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_efficient.errors import HFEError
from hf_efficient.logging import warn_once


def _check_taken(table: Tensor) -> None:
    """Say so, in the backward pass, where no optimiser has asked for the sparse gradient of a table that now comes.

    What goes wrong later says nothing of tables: `clip_grad_norm_` and AdamW fail over sparse tensors, an optimiser
    that was given a table which a cast or a resize has replaced since trains nothing, and data-parallel replicas drift
    apart, since `DistributedDataParallel` leaves the tables to the optimiser.
    """
    if torch.compiler.is_compiling() or table._post_accumulate_grad_hooks or table._backward_hooks:
        return
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes > 1:
        raise HFEError(
            f"nobody averages the sparse gradients of the STEM tables over the {processes} processes",
            "train the tables with hf_efficient.RowSparseAdamW, which does, or load without stem_sparse_grad",
        )
    warn_once(
        "the STEM tables have sparse gradients, and no optimiser takes them: AdamW and clip_grad_norm_ cannot; give "
        "the tables to hf_efficient.RowSparseAdamW, once the model has its final dtype and vocabulary, or load it "
        "without stem_sparse_grad"
    )


class _RowsOfTable(torch.autograd.Function):
    """`rows` [u, F], which are ``table[ids]`` for distinct and sorted ids [u]; the table's gradient is sparse.

    Only the rows that were looked up have a gradient, in the dtype and on the device of the table.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table = table  # not saved as the others are: the optimiser may change it before a second backward pass
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        table = ctx.table
        _check_taken(table)
        ids, values = ids[None].to(table.device), drows.to(table.device)
        # Sorted and distinct by construction, so nothing needs checking.
        gradient = torch.sparse_coo_tensor(ids, values, table.shape, check_invariants=False, is_coalesced=True)
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
