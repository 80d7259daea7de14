"""Products in the dtype they are written in."""

from __future__ import annotations

import contextlib

import torch


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Products stay in the dtype they are written in, as the kernels' do."""
    if not torch.amp.is_autocast_available(device_type):  # of tensors without data, for one
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
