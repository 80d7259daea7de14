"""The package's logger."""

from __future__ import annotations

import functools
import logging

from hf_efficient.environment import log_level

# Attribute of log records whose warning is also in the report of the command.
IN_REPORT = "in_report"


@functools.cache
def get_logger() -> logging.Logger:
    """The ``hf_efficient`` logger, at the level that ``HFE_LOG`` names."""
    logger = logging.getLogger("hf_efficient")
    if logger.level == logging.NOTSET:
        logger.setLevel(log_level())
    return logger


def hide_reported_warnings() -> None:
    """Do not log warnings that a report holds too: for commands that print the report."""
    get_logger().addFilter(_not_in_report)


def _not_in_report(record: logging.LogRecord) -> bool:
    return not getattr(record, IN_REPORT, False)


@functools.cache
def warn_once(message: str) -> None:
    """Log ``message`` as a warning, the first time only."""
    get_logger().warning(message)
