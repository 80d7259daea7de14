"""Tests of the Triton kernels on an accelerator.

Those not marked `gpu` themselves also run on the CPU, in Triton's interpreter: with `TRITON_INTERPRET=1`, which must be
set before Triton is imported (`tests/kernels/test_interpreter.py` starts such a run). Without it all need a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_efficient.environment import triton_interpreted

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and not triton_interpreted():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if triton_interpreted() else "cuda")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that comes uninitialised holds NaN, or the largest integer: a kernel that leaves holes shows."""

    def poison(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
