"""The package's logger."""

from __future__ import annotations

import functools
import logging

from hf_efficient.environment import log_level

# Attribute of the records of warnings that the report of the work holds too.
IN_REPORT = "in_report"


@functools.cache
def get_logger() -> logging.Logger:
    """The ``hf_efficient`` logger, at the level that ``HFE_LOG`` names."""
    logger = logging.getLogger("hf_efficient")
    if logger.level == logging.NOTSET:
        logger.setLevel(log_level())
    return logger


def log_no_reported_warning() -> None:
    """From now on, leave the warnings that a report holds to those who show the report."""
    get_logger().addFilter(_not_in_report)


def _not_in_report(record: logging.LogRecord) -> bool:
    return not getattr(record, IN_REPORT, False)


@functools.cache
def warn_once(message: str) -> None:
    """Log ``message`` as a warning, the first time only."""
    get_logger().warning(message)
