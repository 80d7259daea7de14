"""Progress: a bar on a terminal, a few plain lines in a log file."""

from __future__ import annotations

import io
import sys

import pytest

from hf_efficient.conversion import progress as module
from hf_efficient.conversion.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A fake clock in seconds, by which lines are spaced."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def work(clock: list[float], seconds_a_step: float, steps: int = 1000) -> None:
    with Progress({"one": 3, "two": 7}) as bar:
        for name in ("one", "two"):
            with bar.stage(name) as advance:
                for done in range(steps):
                    clock[0] += seconds_a_step
                    advance(done + 1, steps)


@pytest.mark.parametrize(("seconds_a_step", "most"), [(0.001, 3), (0.1, 13), (30, 13)])
def test_a_file_gets_a_line_for_each_stage_and_at_most_one_for_each_tenth(
    seconds_a_step: float, most: int, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    work(clock, seconds_a_step)
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    assert 3 <= len(lines) <= most
    assert lines[0].split() == ["0%", "0:00", "one"]
    assert lines[-1].split()[0] == "100%"
    shares = [int(line.split("%")[0]) for line in lines]
    assert shares == sorted(shares)


def test_lines_of_slow_work_are_ten_seconds_apart(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    work(clock, 0.02)  # forty seconds in all
    assert len(log.getvalue().splitlines()) <= 2 + 4


def test_a_step_within_a_stage_is_named_in_the_next_line(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress({"computing": 1}) as bar, bar.stage("computing"):
        for done in range(101):
            clock[0] += 1
            bar.step("calibrating", done, 100)
    assert [line.split()[-1] for line in log.getvalue().splitlines()] == ["computing", *["calibrating"] * 10]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress({"copying": 1}) as bar, bar.stage("copying") as advance:
        advance(1, 1)
    assert "\r" in screen.getvalue() and "copying" in screen.getvalue() and "100%" in screen.getvalue()


def test_nothing_is_shown_with_show_false(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress({"copying": 1}, show=False) as bar, bar.stage("copying") as advance:
            advance(1, 1)
        assert stream.getvalue() == ""
