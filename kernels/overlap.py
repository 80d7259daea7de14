"""Programmatic dependent launch: a kernel's programs start while the kernel before it is still finishing.

What comes before its `gdc_wait()` then runs early: address arithmetic, and loads of what no kernel of a decoding step
writes, the weights. Everything else a kernel reads or writes comes after the wait. Needs compute capability 9.0; off
unless `HFE_OVERLAP=1`.
"""

from __future__ import annotations

import functools

import torch

from hf_efficient.environment import overlap_launches, triton_interpreted

OLDEST_CAPABILITY = (9, 0)


@functools.cache
def overlap_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of a launch on `device`: the kernel's constant `OVERLAP`, and Triton's own switch with it."""
    overlap = (
        overlap_launches()
        and not triton_interpreted()
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
    )
    # Versions of Triton that do not know the switch still launch without it.
    return {"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False}
