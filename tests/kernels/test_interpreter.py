"""The kernel tests of `tests/gpu` on the CPU, in Triton's interpreter.

In a process of their own: Triton decides at its import whether it interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_kernels_keep_their_contract_in_the_interpreter(repository_root: Path) -> None:
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-m", "not gpu", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        cwd=repository_root,
        env={**environment, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in summary and "failed" not in summary, summary
    assert "skipped" not in summary, f"the interpreter runs every test that is not marked gpu: {summary}"
