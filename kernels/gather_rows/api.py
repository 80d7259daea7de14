"""Public function of the operation gather_rows."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_efficient.errors import HFEError
from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.kernels.gather_rows.reference import gather_rows as reference_gather_rows
from hf_efficient.kernels.validate import (
    FLOATS,
    INTEGERS,
    check_dtype,
    check_ids,
    check_no_gradient,
    check_not_empty,
    check_rank,
    check_rows_contiguous,
    check_shape,
    check_tensors,
)


def gather_rows(
    table: Tensor,
    ids: Tensor,
    *,
    cache: Tensor | None = None,
    cache_slots: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rows of a table, which may be in host memory: ``out[i] = cache[s] if s >= 0 else table[ids[i]]``, where
    ``s = cache_slots[ids[i]]``.

    The rows are copied bit for bit. With the table in pinned host memory and the ids on a GPU, the kernel reads the
    rows over the bus itself, without work for the CPU and without synchronisation, so a CUDA graph can capture the
    call; it uses few programs, so that it can run on a stream of its own beside other work. For inference only.

    Args:
        table: [V, F], float16, bfloat16, float32 or float64, its last dimension contiguous; on the device of `ids`, or
            in pinned host memory where `ids` is on a GPU. It must not change until the call is done.
        ids: [u], int32 or int64, each in [0, V).
        cache: [K, F], copies of table rows on the device of `ids`, in the table's dtype.
        cache_slots: [V], int32, the slot of each table row in `cache`, or -1 (any number outside [0, K)) where it has
            none. Required with `cache`.
        out: [u, F], filled and returned; a new tensor where None.
        backend: ``"reference"``, ``"triton"``, or None: what `HFE_BACKEND` names, else Triton on CUDA and the reference
            elsewhere.

    Returns:
        [u, F], in the table's dtype, on the device of `ids`.

    Raises:
        HFEError: wrong shape, dtype, device or layout, a table in host memory that is not pinned, or a tensor that
            requires a gradient.
        TokenIdError: an id outside [0, V). Checked on the CPU, and elsewhere with `HFE_CHECK=1`; without it the
            Triton kernel gives zeros there and never reads outside the table.
        BackendError: the named backend cannot run here.

    Source: the kernel is our own (`README.md` beside this file); it serves the offloaded tables of STEM,
        arXiv:2601.10639.

    Example:
        >>> import torch
        >>> gather_rows(torch.eye(3), torch.tensor([2, 0]))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    _check(table, ids, cache, cache_slots, out)
    if select_backend("gather_rows", backend, ids.device) == "reference":
        return reference_gather_rows(table, ids, cache=cache, cache_slots=cache_slots, out=out)
    from hf_efficient.kernels.gather_rows.op import gather_rows_into

    if out is None:
        out = torch.empty((ids.shape[0], table.shape[1]), dtype=table.dtype, device=ids.device)
    gather_rows_into(out, table, ids, cache, cache_slots)
    return out


def _check(table: Tensor, ids: Tensor, cache: Tensor | None, cache_slots: Tensor | None, out: Tensor | None) -> None:
    """Raise HFEError for arguments that the operation does not take."""
    op = "gather_rows"
    optional = {"cache": cache, "cache_slots": cache_slots, "out": out}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_tensors(op, {"table": table})
    check_tensors(op, {"ids": ids, **given})
    _check_table_readable(op, table, ids)
    rows_of = {"table": table, **{name: tensor for name, tensor in given.items() if name != "cache_slots"}}
    check_no_gradient(op, rows_of)
    check_dtype(op, "table", table, FLOATS)
    check_dtype(op, "ids", ids, INTEGERS)
    check_rank(op, "table", table, 2, 2, "[V, F]")
    check_rank(op, "ids", ids, 1, 1, "[u]")
    rows, width = table.shape
    for dimension in (0, 1):
        check_not_empty(op, "table", table, dimension)
    if (cache is None) != (cache_slots is None):
        lacking = "cache" if cache is None else "cache_slots"
        raise HFEError(f"{op}: `{lacking}` is missing", "pass both `cache` and `cache_slots`, or neither")
    if cache is not None and cache_slots is not None:
        check_dtype(op, "cache", cache, (table.dtype,))
        check_dtype(op, "cache_slots", cache_slots, (torch.int32,))
        check_rank(op, "cache", cache, 2, 2, "[K, F]")
        check_shape(op, "cache", cache, (cache.shape[0], width), "[K, F] for `table` [V, F]")
        check_shape(op, "cache_slots", cache_slots, (rows,), "[V] for `table` [V, F]")
    if out is not None:
        check_dtype(op, "out", out, (table.dtype,))
        check_shape(op, "out", out, (ids.shape[0], width), "[u, F] for `ids` [u] and `table` [V, F]")
    for name, tensor in rows_of.items():
        check_rows_contiguous(op, name, tensor)
    check_ids(op, ids, rows)


def _check_table_readable(op: str, table: Tensor, ids: Tensor) -> None:
    """Raise HFEError unless `table` is on the device of `ids`, or in pinned host memory and `ids` on a GPU."""
    if table.device == ids.device:
        return
    if table.device.type != "cpu" or ids.device.type != "cuda":
        raise HFEError(f"{op}: `table` is on {table.device} and `ids` on {ids.device}", "move them to one device")
    # A traced tensor does not know whether it is pinned; the launch fails for one that is not.
    if torch.compiler.is_compiling() or type(ids) is not Tensor:
        return
    if not table.is_pinned():
        raise HFEError(
            f"{op}: `table` is in host memory that is not pinned, where {ids.device} cannot read it",
            "use table.pin_memory(), or select the rows on the CPU and copy them over",
        )
