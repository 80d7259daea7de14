"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = "\n\n".join(f"Paragraph {i}: the quick brown fox jumps over the lazy dog, and again." for i in range(80))


def run_example(name: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_convert_then_train_the_tables(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    stem, trained = tmp_path / "tiny-stem", tmp_path / "tiny-trained"
    shown = run_example(
        "convert_and_generate.py", tiny_llama, stem, "--layers", "1,2", "--calibration", text, "--max-new-tokens", 4
    )
    assert "Δ nll" in shown and "The capital of France is" in shown

    shown = run_example(
        *("train_tables.py", stem, trained, "--text", text, "--steps", 40),
        *("--sequence-length", 64, "--learning-rate", 0.1),
    )
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", shown)]
    assert losses[-1] < losses[0] - 0.05, shown

    from hf_efficient import verify

    assert verify(str(trained)).ok
