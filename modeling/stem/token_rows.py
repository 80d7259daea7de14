"""The table rows of one forward call: of each distinct token once, wherever the tables are stored."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_efficient.errors import HFEError
from hf_efficient.logging import warn_once


def _check_optimizer(table: Tensor) -> None:
    """Warn in the backward pass if no optimizer has registered for the sparse gradient of `table`.

    Without this the later errors do not mention tables: `clip_grad_norm_` and AdamW fail on sparse tensors; an
    optimizer whose table was replaced by a cast or a resize trains nothing; data-parallel replicas diverge, since
    `DistributedDataParallel` leaves the tables to the optimizer.

    Raises:
        HFEError: several processes train, so that replicas would diverge.
    """
    if torch.compiler.is_compiling() or table._post_accumulate_grad_hooks or table._backward_hooks:
        return
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes > 1:
        raise HFEError(
            f"the sparse gradients of the STEM tables are not averaged over the {processes} processes",
            "train the tables with hf_efficient.RowSparseAdamW, which averages them, or load without stem_sparse_grad",
        )
    warn_once(
        "the STEM tables have sparse gradients, and no optimizer takes them: AdamW and clip_grad_norm_ cannot; give "
        "the tables to hf_efficient.RowSparseAdamW, once the model has its final dtype and vocabulary, or load it "
        "without stem_sparse_grad"
    )


class _RowsOfTable(torch.autograd.Function):
    """Returns `rows` [u, F], which are ``table[ids]`` for sorted, distinct ids [u]; gives the table a sparse gradient.

    The gradient has the dtype and device of the table, and values for the rows `ids` only.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        """Return `rows` unchanged."""
        ctx.save_for_backward(ids)
        ctx.table = table  # not by save_for_backward: the optimizer may change it before a second backward pass
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor) -> tuple[None, Tensor, None]:
        """Return the gradient `drows` [u, F] as a sparse gradient of the table [V, F]; see `_check_optimizer`."""
        (ids,) = ctx.saved_tensors
        table = ctx.table
        _check_optimizer(table)
        ids, values = ids[None].to(table.device), drows.to(table.device)
        # Sorted and distinct by construction, so nothing needs checking.
        gradient = torch.sparse_coo_tensor(ids, values, table.shape, check_invariants=False, is_coalesced=True)
        return None, gradient, None


class TokenRows:
    """The rows of the STEM tables that one forward call needs; layers get this instead of the token ids.

    Attributes:
        ids: token ids of the call [B, S].
        merged: whether `distinct` has each id once.
        distinct: ids whose rows are fetched [u]; sorted if `merged`.
        slots: index into `distinct` of each position's id [B, S]: ``rows(table)[slots]`` is ``table[ids]``.
    """

    def __init__(self, ids: Tensor, merge: bool = True) -> None:
        """
        Args:
            ids: token ids [B, S].
            merge: fetch each distinct token once, which synchronises with the device; otherwise one row per position.
        """
        self.ids = ids
        self.merged = merge
        if merge:
            self.distinct, self.slots = torch.unique(ids, return_inverse=True)
        else:
            self.distinct = ids.reshape(-1)
            self.slots = torch.arange(ids.numel(), device=ids.device).view(ids.shape)

    def rows(self, table: nn.Embedding) -> Tensor:
        """Return the rows `distinct` of `table` [u, F], on the device of the ids.

        With gradients enabled and a table that requires one, the table gets a sparse gradient; this needs `merged`.

        Raises:
            HFEError: in the backward pass, see `_check_optimizer`.
        """
        rows = self.fetch(table)
        if torch.is_grad_enabled() and table.weight.requires_grad:
            return _RowsOfTable.apply(rows, table.weight, self.distinct)
        return rows

    def look_up(self, table: nn.Module) -> Tensor:
        """Return the rows [B, S, F] by calling the table's module, so that adapters and hooks around it run."""
        return table(self.ids)

    def fetch(self, table: nn.Embedding) -> Tensor:
        """Return the rows `distinct` of `table` [u, F], without a gradient."""
        return table.weight.detach().index_select(0, self.distinct)
