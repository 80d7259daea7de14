"""The table of a STEM layer, stored with the model, in host memory, or in the checkpoint's file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hf_efficient.errors import HFEError


class StemTable(nn.Embedding):
    """Table [vocab_size, intermediate_size] of one STEM layer; row t replaces the up-projection's output at token t.

    Args:
        rows, width: vocab_size and intermediate_size.
        sparse: as for `nn.Embedding`, the gradient is a sparse tensor of the rows that were looked up.
        placement: ``none``: on the model's device; ``cpu``: in host memory, also after ``model.to(device)``; ``disk``:
            without a weight until `map_from` maps it from a file.
    """

    def __init__(self, rows: int, width: int, sparse: bool = False, placement: str = "none") -> None:
        self.placement = placement
        self.file: Path | None = None  # the file that the weight is mapped from
        if placement == "disk":
            with torch.device("meta"):
                super().__init__(rows, width, sparse=sparse)
            self.weight = None
        else:
            super().__init__(rows, width, sparse=sparse)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As in PyTorch for the placement ``none``; a ``cpu`` table is only cast, a ``disk`` table not even that.

        A ``cpu`` table on the meta device gets uninitialised memory on the CPU when the model gets memory. Casting
        replaces the parameter `weight` by a new one.
        """
        if self.placement == "none" or self.weight is None:
            return super()._apply(fn, recurse)
        if self.placement == "disk":
            return self
        wanted = fn(self.weight.detach()[:0])
        if wanted.is_meta:
            return super()._apply(fn, recurse)
        if self.weight.is_meta:
            return super()._apply(lambda t: torch.empty_like(t, dtype=wanted.dtype, device="cpu"), recurse)
        if wanted.dtype != self.weight.dtype or self.weight.device.type != "cpu":
            # A new parameter, because the memory of the old one may be pinned until that parameter is freed.
            rows = self.weight.detach().to("cpu", wanted.dtype)
            self.weight = nn.Parameter(rows, requires_grad=self.weight.requires_grad)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows [..., intermediate_size] of the ids `input` [...], on the device of `input`.

        Raises:
            HFEError: the weight has not been mapped from a file yet.
        """
        if self.weight is not None and self.weight.device == input.device:
            return super().forward(input)
        # For callers such as an adapter around the table; the model itself prefetches rows with a `TableFetcher`.
        return super().forward(input.to(self.resident_weight.device)).to(input.device)

    @property
    def resident_weight(self) -> Tensor:
        """The weight [vocab_size, intermediate_size].

        Raises:
            HFEError: it has not been mapped from a file yet.
        """
        if self.weight is None:
            raise HFEError(
                "a STEM table has no weight: stem_offload='disk' leaves it in the checkpoint's files",
                "load the checkpoint with from_pretrained(..., stem_offload='disk')",
            )
        return self.weight

    def map_from(self, file: Path, name: str) -> None:
        """Map the weight from tensor `name` of a safetensors file; its pages are read from disk on first use.

        Sets `weight`, without a gradient and in the dtype of the file, and `file`.

        Raises:
            HFEError: the tensor has another shape than the table.
        """
        with safe_open(file, "pt") as tensors:
            rows = tensors.get_tensor(name)
        expected = (self.num_embeddings, self.embedding_dim)
        if tuple(rows.shape) != expected:
            raise HFEError(
                f"{name} in {file.name} has shape {tuple(rows.shape)}, the configuration requires {expected}",
                "load the configuration that belongs to the checkpoint",
            )
        self.weight, self.file = nn.Parameter(rows, requires_grad=False), file.resolve()

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", placement={self.placement}" if self.placement != "none" else "")


def single_device(device_map: Any) -> torch.device | None:
    """Return the only device of a `device_map`; None without a map.

    `auto` and the other strategies of accelerate give the accelerator, or the CPU if there is none.

    Args:
        device_map: as for `from_pretrained`: a device, its index, a strategy, or a dictionary of module to device.

    Raises:
        HFEError: the map spreads the model over several devices, or names no device.
    """
    if device_map is None:
        return None
    if isinstance(device_map, dict):
        devices = {str(device) for device in device_map.values()}
        device_map = devices.pop() if len(devices) == 1 else devices
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        device_map = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        return torch.device(f"cuda:{device_map}" if str(device_map).isdecimal() else device_map)
    except (TypeError, RuntimeError) as error:
        raise HFEError(
            f"device_map={device_map} does not name one device, and stem_offload keeps tables beside one device",
            "pass device_map='cuda', or leave stem_offload out to spread the model",
        ) from error


__all__ = ["StemTable", "single_device"]
