"""A little text to fit to."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs, so that none have to be parsed out of Python's library."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    sentences = [f"{number} times {number} is {number * number}, and no more." for number in range(400)]
    path.write_text("\n\n".join(" ".join(sentences[i : i + 8]) for i in range(0, 400, 8)))
    return path
