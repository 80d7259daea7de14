"""One progress bar for a whole conversion, with the stage named beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from tqdm import tqdm

# What a stage calls: (done, total), in whatever unit it counts.
Advance = Callable[[int, int], None]


class Progress:
    """A bar from 0 to 100 %; each stage moves it through its share.

    Args:
        shares: stage -> its expected share of the time, in any unit, in order.
        show: False keeps silent.
    """

    def __init__(self, shares: Mapping[str, float], *, show: bool = True) -> None:
        scale = 100 / sum(shares.values())
        self._shares = {stage: share * scale for stage, share in shares.items()}
        self._finished = 0.0
        self._share = 0.0
        layout = "{desc:<14} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self._bar = tqdm(total=100.0, disable=not show, bar_format=layout)

    @contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """Name the stage and give the function that moves the bar through its share."""
        self._bar.set_description_str(name)
        self._share = self._shares[name]
        yield self.advance
        self._finished += self._share
        self._share = 0.0
        self.advance(0, 1)

    def advance(self, done: int, total: int) -> None:
        """Move the bar to `done` of `total` in the present stage."""
        # Rounding of the shares must not push the bar past its end.
        position = min(self._finished + self._share * min(done / max(total, 1), 1.0), 100.0)
        self._bar.update(position - self._bar.n)

    def step(self, name: str, done: int, total: int) -> None:
        """The same for a step that names itself within the present stage."""
        self._bar.set_description_str(name, refresh=False)
        self.advance(done, total)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
