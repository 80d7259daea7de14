"""Checks of an operation's arguments, with the same error texts for all operations.

Only `check_ids` reads data; shapes, dtypes and devices are known without a device synchronisation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_efficient.environment import check_data
from hf_efficient.errors import HFEError, TokenIdError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def check_tensors(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise HFEError unless every value is a tensor and all are on one device."""
    device = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise HFEError(f"{op}: `{name}` is of type {type(tensor).__name__}", "pass a torch.Tensor")
        device = device or tensor.device
        if tensor.device != device:
            first = next(iter(tensors))
            raise HFEError(f"{op}: `{first}` is on {device} and `{name}` on {tensor.device}", "move them to one device")


def check_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise HFEError unless `tensor` has one of the dtypes in `allowed`."""
    if tensor.dtype not in allowed:
        found, *names = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *allowed))
        raise HFEError(f"{op}: `{name}` has dtype {found}", f"convert it to one of {', '.join(names)}")


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], layout: str) -> None:
    """Raise HFEError unless `tensor` has the shape `expected`; `layout` describes it in the error."""
    if tensor.shape != expected:
        raise HFEError(
            f"{op}: `{name}` has shape {tuple(tensor.shape)} where {expected} is needed", f"its shape must be {layout}"
        )


def check_rank(op: str, name: str, tensor: Tensor, least: int, most: int | None, layout: str) -> None:
    """Raise HFEError unless `tensor` has between `least` and `most` dimensions (no upper bound when None)."""
    if tensor.dim() < least or (most is not None and tensor.dim() > most):
        raise HFEError(f"{op}: `{name}` has shape {tuple(tensor.shape)}", f"its shape must be {layout}")


def check_not_empty(op: str, name: str, tensor: Tensor, dimension: int) -> None:
    """Raise HFEError unless `tensor` has at least one element along `dimension`."""
    if tensor.shape[dimension] == 0:
        raise HFEError(
            f"{op}: `{name}` has shape {tuple(tensor.shape)}", f"its dimension {dimension} must not be empty"
        )


def check_rows_contiguous(op: str, name: str, tensor: Tensor) -> None:
    """Raise HFEError unless the last dimension of `tensor` is contiguous; other strides are free.

    For tensors too large to copy; the operation itself makes smaller ones contiguous.
    """
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise HFEError(
            f"{op}: the last dimension of `{name}` has stride {tensor.stride(-1)} and must have 1",
            f"call {name}.contiguous() once, before the loop",
        )


def rows_contiguous(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy of it where its last dimension is strided."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def check_no_gradient(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise HFEError if a tensor requires a gradient, for operations without a backward pass."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise HFEError(
                f"{op}: `{name}` requires a gradient, and this operation is for inference only",
                "call it under torch.no_grad(), or use the PyTorch modules instead",
            )


def check_ids(op: str, ids: Tensor, rows: int) -> None:
    """Raise TokenIdError unless every id lies in [0, rows).

    Checked on the CPU always, elsewhere only with HFE_CHECK=1, since it synchronises with the device.
    """
    if ids.device.type != "cpu" and not check_data():
        return
    if torch.compiler.is_compiling() or type(ids) is not Tensor or ids.is_meta or ids.numel() == 0:
        return  # a traced, fake or empty tensor has no values
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= rows:
        position = ((ids < 0) | (ids >= rows)).nonzero()[0].tolist()
        raise TokenIdError(
            f"{op}: `ids` holds {int(ids[tuple(position)])} at position {position}, and `table` has {rows} rows "
            f"(0..{rows - 1})",
            "pass ids of the tokenizer that belongs to this table, or enlarge the table",
        )
