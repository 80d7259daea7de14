"""Shows the progress of a conversion by stage: as a bar on a terminal, as a few lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, TextIO

from tqdm import tqdm

# Called with (done, total), in any unit, to report the progress of the current stage.
Advance = Callable[[int, int], None]

# A log file gets a line for each stage, and another one when both this much progress and this much time have passed.
_LINE_PERCENT = 10
_LINE_SECONDS = 10.0


class _Display(Protocol):
    """What shows the progress: a bar or lines."""

    def begin(self, stage: str, percent: float) -> None:
        """Show the start of a stage, and the percentage of the conversion that is done."""

    def update(self, percent: float, step: str | None = None) -> None:
        """Show the percentage of the conversion that is done, and the name of the current step if given."""

    def close(self) -> None:
        """End the output."""


class _Bar:
    """A `_Display` by a tqdm bar."""

    def __init__(self, file: TextIO) -> None:
        layout = "{desc:<14} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self._bar = tqdm(total=100.0, bar_format=layout, file=file)

    def begin(self, stage: str, percent: float) -> None:
        """See `_Display.begin`."""
        self._bar.set_description_str(stage)
        self.update(percent)

    def update(self, percent: float, step: str | None = None) -> None:
        """See `_Display.update`."""
        if step is not None:
            self._bar.set_description_str(step, refresh=False)
        self._bar.update(percent - self._bar.n)

    def close(self) -> None:
        """See `_Display.close`."""
        self._bar.close()


class _Lines:
    """A `_Display` by lines of text, few enough for a log file."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._started = self._written_at = time.monotonic()
        self._percent = self._written_percent = 0.0
        self._step = ""

    def begin(self, stage: str, percent: float) -> None:
        """Print a line for the stage."""
        self._percent, self._step = percent, stage
        self._write()

    def update(self, percent: float, step: str | None = None) -> None:
        """Print a line if enough time has passed and enough progress was made since the last one."""
        self._percent, self._step = percent, step or self._step
        late = time.monotonic() - self._written_at >= _LINE_SECONDS
        if late and percent - self._written_percent >= _LINE_PERCENT:
            self._write()

    def close(self) -> None:
        """Print a last line if the percentage increased since the last one."""
        if self._percent > self._written_percent:
            self._write()

    def _write(self) -> None:
        """Print percentage, elapsed time and step as a line."""
        self._written_at, self._written_percent = time.monotonic(), self._percent
        minutes, seconds = divmod(int(self._written_at - self._started), 60)
        print(f"{self._percent:3.0f}%  {minutes}:{seconds:02d}  {self._step}", file=self._file, flush=True)


class Progress:
    """Progress of several stages, from 0 to 100 %, on standard error. Used as a context, it ends the output.

    Args:
        shares: stage -> expected time, in any unit.
        show: False for no output.
    """

    def __init__(self, shares: Mapping[str, float], *, show: bool = True) -> None:
        scale = 100 / sum(shares.values())
        self._shares = {stage: share * scale for stage, share in shares.items()}
        self._finished = 0.0
        self._share = 0.0
        self._display: _Display | None = None
        if show:
            self._display = _Bar(sys.stderr) if sys.stderr.isatty() else _Lines(sys.stderr)

    @contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """Context of the stage `name`: yields `advance`; when it ends without an error, the stage counts as done."""
        self._share = self._shares[name]
        if self._display is not None:
            self._display.begin(name, min(self._finished, 100.0))
        yield self.advance
        self._finished += self._share
        self._share = 0.0
        self.advance(0, 1)

    def advance(self, done: int, total: int, step: str | None = None) -> None:
        """Set the progress of the current stage to `done` of `total`; `step` names what is being done."""
        if self._display is not None:
            # Rounding errors must not make the progress exceed 100 %.
            self._display.update(min(self._finished + self._share * min(done / max(total, 1), 1.0), 100.0), step)

    def step(self, name: str, done: int, total: int) -> None:
        """`advance(done, total, name)`, as the callback of `Calibration.progress`."""
        self.advance(done, total, name)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.close()
