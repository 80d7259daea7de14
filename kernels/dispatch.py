"""Which backend an operation runs on, and why.

Order: the `backend` argument, then `HFE_BACKEND`, then Triton on a CUDA device of compute capability 8.0 or newer, then
the reference. A requested backend that cannot run is an error; without a request the reference is the fallback, with a
warning on a CUDA device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from hf_efficient.environment import backend_override, triton_interpreted
from hf_efficient.errors import BackendError
from hf_efficient.logging import warn_once

BACKENDS = ("reference", "triton")
OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it. `problem` says why Triton cannot run, or is empty."""

    backend: str
    reason: str
    problem: str = ""


@functools.cache
def triton_import_problem() -> str:
    """The error of importing Triton, as text; empty when it imports."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation can raise any exception, which the user must see
        return f"importing triton failed with {type(error).__name__}: {error}"
    return ""


@functools.cache
def triton_problem(device: torch.device) -> str:
    """Why Triton kernels cannot run on `device`, or an empty text when they can."""
    if triton_import_problem():
        return triton_import_problem()
    if triton_interpreted():
        return "" if device.type in ("cpu", "cuda") else f"the interpreter knows no {device.type} tensors"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and Triton kernels need a CUDA device"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        needed, found = (".".join(map(str, version)) for version in (OLDEST_CAPABILITY, capability))
        return f"{torch.cuda.get_device_name(device)} has compute capability {found}; {needed} is the oldest supported"
    return ""


@functools.cache
def preferred_backend(device: torch.device) -> Choice:
    """The backend for tensors on `device` when none is requested."""
    problem = triton_problem(device)
    if device.type == "cuda" and not problem:
        return Choice("triton", "the tensors are on cuda")
    # Triton's interpreter runs on the CPU only on request: it is slow, and meant for tests.
    return Choice("reference", problem or "the tensors are on cpu", problem)


def requested_backend(name: str, origin: str, device: torch.device) -> Choice:
    """The backend `name`, requested by `origin` (the argument, or an environment variable).

    Raises:
        BackendError: there is no such backend, or it cannot run on `device`.
    """
    given = f"{origin}={name!r}"
    if name not in BACKENDS:
        raise BackendError(f"{given} is no backend", f"choose from {', '.join(BACKENDS)}")
    problem = triton_problem(device) if name == "triton" else ""
    if problem:
        raise BackendError(
            f"{given} cannot run: {problem}", "leave the backend open, or ask for 'reference', which runs anywhere"
        )
    return Choice(name, f"{given} asks for it")


def choose_backend(requested: str | None, device: torch.device) -> Choice:
    """The backend for tensors on `device`, and why. Raises as `requested_backend` does."""
    if requested is not None:
        return requested_backend(requested, "backend", device)
    override = backend_override()
    return preferred_backend(device) if override is None else requested_backend(override, "HFE_BACKEND", device)


@torch.compiler.assume_constant_result  # a choice reads the environment and imports Triton, which cannot be traced
def _select(op: str, requested: str | None, device_type: str, device_index: int | None) -> str:
    choice = choose_backend(
        requested, torch.device(device_type if device_index is None else f"{device_type}:{device_index}")
    )
    if choice.problem and device_type == "cuda":
        warn_once(f"{op} runs on the reference backend, which is slower: {choice.problem}")
    return choice.backend


def select_backend(op: str, requested: str | None, device: torch.device) -> str:
    """Name of the backend that operation `op` takes for tensors on `device`; see `choose_backend`."""
    return _select(op, requested, device.type, device.index)


def explain(op: str, device: torch.device | str, backend: str | None = None) -> str:
    """One line: the backend that `op` would take for tensors on `device`, and why, or why it would fail."""
    try:
        choice = choose_backend(backend, torch.device(device))
    except BackendError as error:
        return f"error: {error}"
    return f"{choice.backend}: {choice.reason}"
