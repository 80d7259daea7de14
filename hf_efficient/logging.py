"""The package's logger."""

from __future__ import annotations

import functools
import logging

from hf_efficient.environment import log_level


@functools.cache
def get_logger() -> logging.Logger:
    """The ``hf_efficient`` logger, at the level that ``HFE_LOG`` names."""
    logger = logging.getLogger("hf_efficient")
    if logger.level == logging.NOTSET:
        logger.setLevel(log_level())
    return logger


@functools.cache
def warn_once(message: str) -> None:
    """Log ``message`` as a warning, the first time only."""
    get_logger().warning(message)
