"""What is said of a transformers release outside of the tested ones, and where those are written."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
import transformers

from hf_efficient import environment
from hf_efficient.errors import HFEError
from hf_efficient.modeling.base.tested_releases import check_transformers

OLDEST, NEWEST = environment.TESTED_TRANSFORMERS


def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str) -> list[str]:
    caplog.clear()
    monkeypatch.setattr(transformers, "__version__", version)
    with caplog.at_level(logging.WARNING, "hf_efficient"):
        check_transformers()
    return [record.message for record in caplog.records]


@pytest.mark.parametrize("version", [f"{OLDEST}.0", "5.20.3", f"{NEWEST}.0", f"{NEWEST}.9", f"{NEWEST}.1.dev0"])
def test_tested_releases_pass_in_silence(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert said(monkeypatch, caplog, version) == []


@pytest.mark.parametrize("version", ["5.25.0", "5.100.0.dev0", "6.0.0rc1"])
def test_a_newer_release_is_told_of_once(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (message,) = said(monkeypatch, caplog, version)
    assert version in message and f"{OLDEST} to {NEWEST}" in message
    assert said(monkeypatch, caplog, version) == []


@pytest.mark.parametrize("version", ["5.16.4", "5.2.0", "4.57.1"])
def test_an_older_release_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(HFEError, match=rf"{re.escape(version)} is installed, and this code needs {OLDEST} or newer"):
        check_transformers()


def test_the_tests_themselves_run_on_a_tested_release() -> None:
    for version, (oldest, newest) in (
        (transformers.__version__, environment.TESTED_TRANSFORMERS),
        (torch.__version__, environment.TESTED_TORCH),
    ):
        release, first, last = (
            tuple(int(number) for number in re.findall(r"\d+", text)[:2]) for text in (version, oldest, newest)
        )
        assert first <= release <= last, f"{version} is outside of {oldest} to {newest}: test it, then widen the range"


def test_the_package_needs_what_the_oldest_tested_releases_have(repository_root: Path) -> None:
    """And has no cap below the next major release, which would have pip downgrade a user's transformers."""
    text = (repository_root / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"transformers>={OLDEST},<6"' in text
    assert f'"torch>={environment.TESTED_TORCH[0]},<3"' in text
    assert f'requires-python = ">={environment.TESTED_PYTHON[0]}"' in text
