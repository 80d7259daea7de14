"""Matrix products in the dtype of their operands."""

from __future__ import annotations

import contextlib

import torch


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A context in which autocast does not change the dtype of matrix products, as in the kernels."""
    # Not `torch.amp.is_autocast_available`, which torch.compile cannot trace with torch 2.11.
    if device_type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
