"""Row-sparse gradients of a matrix: from sparse tensors, their sum, and their mean over data-parallel processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hf_efficient.errors import HFEError

# In place of the number of rows: the process has no gradient for a parameter, or a dense one.
_NONE, _DENSE = -1, -2


@dataclass(frozen=True)
class RowGradient:
    """The gradient of some rows of a matrix [V, F]; that of all other rows is zero.

    Attributes:
        ids: indices of the rows [u], int64, unique.
        rows: their gradients [u, F], in the dtype of the gradient, or in `accumulation_dtype` if they were summed.
    """

    ids: Tensor
    rows: Tensor

    @classmethod
    def of(cls, parameter: Tensor, gradient: Tensor) -> RowGradient:
        """Create it from a sparse COO gradient of `parameter`, without a copy if it is coalesced, else summed by row.

        Raises:
            HFEError: `parameter` is no matrix, or the gradient is not sparse in its rows.
        """
        gradient = gradient.detach()
        if parameter.dim() != 2 or gradient.sparse_dim() != 1:
            raise HFEError(
                f"a parameter of shape {tuple(parameter.shape)} has a gradient with {gradient.sparse_dim()} sparse "
                f"and {gradient.dense_dim()} dense dimensions",
                "sparse gradients must be those of whole rows of a matrix, as nn.Embedding(sparse=True) gives them",
            )
        if not gradient.is_coalesced():
            # Rows of equal ids are summed, in float32 since half precision would lose small terms.
            ids, rows = gradient._indices(), gradient._values()
            rows = rows.to(accumulation_dtype(rows.dtype))
            gradient = torch.sparse_coo_tensor(ids, rows, gradient.shape, check_invariants=False).coalesce()
        return cls(gradient.indices()[0], gradient.values())


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def add_up(parts: Sequence[RowGradient]) -> RowGradient:
    """Sum of one or more row gradients in `accumulation_dtype`, in the order of `parts`; a single part is returned.

    Several parts need a device synchronisation, since the number of rows of the sum depends on the ids.
    """
    if len(parts) == 1:
        return parts[0]
    ids, positions = torch.unique(torch.cat([part.ids for part in parts]), return_inverse=True)
    width, dtype = parts[0].rows.shape[1], accumulation_dtype(parts[0].rows.dtype)
    rows = torch.zeros((ids.shape[0], width), dtype=dtype, device=ids.device)
    for part, position in zip(parts, positions.split([part.ids.shape[0] for part in parts]), strict=True):
        rows.index_add_(
            0, position, part.rows.to(dtype)
        )  # ids of a part are unique, so the order of additions is fixed
    return RowGradient(ids, rows)


def several_processes(group: dist.ProcessGroup | None) -> bool:
    """True if `group` (None: the default group) has more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def mean_over_processes(
    gradients: Sequence[RowGradient | None], parameters: Sequence[Tensor], group: dist.ProcessGroup | None
) -> list[RowGradient | None]:
    """Mean over the processes of each parameter's gradient, the same bits on every process.

    Every process calls this with the same parameters in the same order. A process whose batch had no row of a parameter
    passes None and still takes part; the result is None only where all pass None. Rows are sent in float32 (float64 for
    float64), the dtype of the result, padded to the largest number of rows of a process, and are added in the order of
    the ranks. A parameter with None whose `grad` is set counts as one with a dense gradient.

    Raises:
        HFEError: on all processes, if a parameter has a sparse gradient on one and a dense one on another.
    """
    processes = dist.get_world_size(group)
    counts = [
        (_NONE if parameter.grad is None else _DENSE) if gradient is None else gradient.ids.shape[0]
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]
    by_process = _gather(torch.tensor(counts), processes, group).tolist()
    means: list[RowGradient | None] = []
    for gradient, parameter, row_counts in zip(gradients, parameters, zip(*by_process, strict=True), strict=True):
        longest = max(row_counts)
        if longest < 0:
            means.append(None)
            continue
        if _DENSE in row_counts:
            raise HFEError(
                f"a parameter of shape {tuple(parameter.shape)} has a sparse gradient on rank "
                f"{row_counts.index(longest)} and a dense one on rank {row_counts.index(_DENSE)}",
                "run the same model with the same configuration on all processes",
            )
        dtype = accumulation_dtype(parameter.dtype)
        ids = torch.zeros(longest, dtype=torch.int64, device=parameter.device)
        rows = torch.zeros((longest, parameter.shape[1]), dtype=dtype, device=parameter.device)
        if gradient is not None:
            ids[: gradient.ids.shape[0]] = gradient.ids
            rows[: gradient.ids.shape[0]] = gradient.rows
        all_ids, all_rows = _gather(ids, processes, group), _gather(rows, processes, group)
        parts = [
            RowGradient(all_ids[r, : row_counts[r]], all_rows[r, : row_counts[r]])
            for r in range(processes)
            if row_counts[r] >= 0
        ]
        total = add_up(parts)
        means.append(RowGradient(total.ids, total.rows.div_(processes)))  # `total` is a local tensor
    return means


def _gather(local: Tensor, processes: int, group: dist.ProcessGroup | None) -> Tensor:
    """`local` of every process [processes, ...], on the device of `local`."""
    device = _device_of_communication(local.device, group)
    # Concatenated along the first dimension, the form that every backend supports.
    gathered = torch.empty((processes * local.shape[0], *local.shape[1:]), dtype=local.dtype, device=device)
    if local.numel() > 0:
        dist.all_gather_into_tensor(gathered, local.to(device).contiguous(), group=group)
    return gathered.to(local.device).view(processes, *local.shape)


def _device_of_communication(device: torch.device, group: dist.ProcessGroup | None) -> torch.device:
    """Device that `group` can send tensors from: `device` itself where possible, else the GPU or the CPU."""
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    backend = backends.get(device.type)
    # gloo gathers CPU tensors only and nccl GPU tensors only, whatever devices the configuration lists.
    if backend is not None and backend != ("gloo" if device.type == "cuda" else "nccl"):
        return device
    if device.type == "cuda":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
