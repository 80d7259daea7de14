"""`hf-efficient serve` passes a checkpoint and its options to `transformers serve`."""

from __future__ import annotations

from typing import Any

import pytest
import transformers.cli.transformers

from hf_efficient.cli.main import run


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        run(["serve", *arguments])
    return int(ended.value.code or 0)


def test_options_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], dict[str, Any]]] = []
    monkeypatch.setattr(transformers.cli.transformers, "app", lambda given, **options: calls.append((given, options)))
    assert call("./folder", "--port", "8001", "--continuous-batching") == 0
    assert calls == [(["serve", "./folder", "--port", "8001", "--continuous-batching"], {"standalone_mode": False})]


def test_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("Missing dependencies for serving")

    monkeypatch.setattr(transformers.cli.transformers, "app", refuse)
    assert call("./folder") == 1
    assert "pip install 'transformers[serving]'" in capsys.readouterr().err


def test_a_checkpoint_is_needed(capsys: pytest.CaptureFixture) -> None:
    assert call() == 2
    assert "CHECKPOINT" in capsys.readouterr().err.upper()
