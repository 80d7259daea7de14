"""`hf-efficient bench`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

import hf_efficient
from hf_efficient.errors import HFEError, UsageError


def command(
    name: Annotated[str | None, typer.Argument(help="Benchmark to run; without it, the list of them.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments for the benchmark, after `--`.")] = None,
) -> None:
    """Run a benchmark of the source tree; each answers one question about speed.

    Example: hf-efficient bench stem_gate -- --help
    """
    root = Path(hf_efficient.__file__).resolve().parent.parent
    folder = root / "benchmarks"
    if not folder.is_dir():
        raise HFEError("benchmarks are not part of the installed package", "run this from a checkout of the source")
    questions = sorted(p.stem for p in folder.glob("*.py") if "def main(" in p.read_text(encoding="utf-8"))
    if name is None:
        typer.echo("\n".join(questions))
        return
    if name not in questions:
        raise UsageError(f"there is no benchmark {name!r}", f"choose from {', '.join(questions)}")
    sys.path.insert(0, str(root))
    sys.argv = [name, *(arguments or [])]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
