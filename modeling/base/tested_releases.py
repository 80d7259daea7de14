"""Checks the release of transformers, before anything is imported that other releases lack."""

from __future__ import annotations

import re
from typing import Any

from hf_efficient.environment import TESTED_TRANSFORMERS
from hf_efficient.errors import HFEError
from hf_efficient.logging import get_logger


def check_transformers() -> None:
    """Check that the installed transformers can run this code; warn once if it is newer than the tested releases.

    Raises:
        HFEError: it is older than the oldest supported release.
    """
    from transformers import __version__ as installed

    oldest, newest = TESTED_TRANSFORMERS
    if _release(installed) < _release(oldest):
        raise HFEError(
            f"transformers {installed} is installed, and this code needs {oldest} or newer",
            f"pip install 'transformers>={oldest}'",
        )
    if _release(installed) > _release(newest):
        # transformers' `warning_once` caches messages in the process, so the package and the copies of this file in
        # checkpoints warn once together.
        logger: Any = get_logger()
        logger.warning_once(
            f"transformers {installed} is newer than what this code was tested with, {oldest} to {newest}; "
            "generate some text with and without use_cache=False and compare before relying on it"
        )


def _release(version: str) -> tuple[int, ...]:
    """Return major and minor number: (5, 24) for 5.24.1 and for 5.24.0.dev0."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
