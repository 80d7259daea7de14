"""The releases that this one was tested with, and the only place that reads environment variables.

All of ours begin with ``HFE_``.

| variable | values | effect |
|---|---|---|
| ``HFE_BACKEND`` | ``reference``, ``triton`` | backend of every kernel whose call names none |
| ``HFE_CHECK`` | ``1`` | run checks of data that force a device synchronisation |
| ``HFE_OVERLAP`` | ``0``, ``1`` | programmatic dependent launch of decoding kernels; unset: with one batch row |
| ``HFE_LOG`` | a logging level | verbosity of the ``hf_efficient`` logger |
"""

from __future__ import annotations

import os

# Oldest and newest, both included.
TESTED_TRANSFORMERS = ("5.17", "5.24")
TESTED_TORCH = ("2.11", "2.14")
TESTED_PYTHON = ("3.10", "3.13")


def backend_override() -> str | None:
    """Value of ``HFE_BACKEND``, or None if it is unset or empty."""
    return os.environ.get("HFE_BACKEND") or None


def check_data() -> bool:
    """True if ``HFE_CHECK=1``: checks that synchronise the device run."""
    return os.environ.get("HFE_CHECK") == "1"


def overlap_launches() -> bool | None:
    """True if ``HFE_OVERLAP=1`` enables programmatic dependent launch, False if ``0`` disables it, else None."""
    return {"0": False, "1": True}.get(os.environ.get("HFE_OVERLAP", ""))


def log_level() -> str:
    """Value of ``HFE_LOG``, by default ``WARNING``."""
    return os.environ.get("HFE_LOG", "WARNING").upper()


def triton_interpreted() -> bool:
    """True when Triton kernels run in its CPU interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
