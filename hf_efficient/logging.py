"""The package's logger."""

from __future__ import annotations

import functools
import logging

from hf_efficient.environment import log_level
from hf_efficient.errors import UsageError

# Attribute of log records whose warning is also part of a command's report.
IN_REPORT = "in_report"


@functools.cache
def get_logger() -> logging.Logger:
    """The ``hf_efficient`` logger; unless it has a level, it gets the one that ``HFE_LOG`` names.

    Raises:
        UsageError: this is not a level of `logging`.
    """
    logger = logging.getLogger("hf_efficient")
    if logger.level == logging.NOTSET:
        try:
            logger.setLevel(log_level())
        except ValueError:
            raise UsageError(
                f"HFE_LOG={log_level()!r} is not a logging level", "use DEBUG, INFO, WARNING or ERROR"
            ) from None
    return logger


def hide_reported_warnings() -> None:
    """Stop logging warnings that are also part of a report, for commands that print the report."""
    get_logger().addFilter(_not_in_report)


def _not_in_report(record: logging.LogRecord) -> bool:
    """Filter: False for records whose warning is also part of a report."""
    return not getattr(record, IN_REPORT, False)


@functools.cache
def warn_once(message: str) -> None:
    """Log ``message`` as a warning, the first time only."""
    get_logger().warning(message)
