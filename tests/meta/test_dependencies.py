"""What the package imports is what it declares: a fresh environment has the base dependencies and nothing else."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [p for folder in ("hf_efficient", "kernels", "modeling", "conversion") for p in (ROOT / folder).rglob("*.py")]
# Imported inside a `try` whose `except ImportError` says what to install: only one feature needs them.
OPTIONAL = {"datasets", "diffusers", "matplotlib"}


def _base_dependencies() -> set[str]:
    """Import names of `project.dependencies`. The file is read as text: Python 3.10 has no TOML parser."""
    listed = re.search(
        r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S
    )
    assert listed
    return {name.replace("-", "_") for name in re.findall(r'^\s*"([A-Za-z0-9_-]+)', listed[1], re.M)}


def _third_party_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"hf_efficient"}


def test_every_import_of_the_package_is_a_base_dependency() -> None:
    declared = _base_dependencies()
    assert {"torch", "transformers", "accelerate", "peft", "gguf"} <= declared
    undeclared = {
        str(path.relative_to(ROOT)): missing
        for path in SHIPPED
        if (missing := _third_party_imports(path) - declared - OPTIONAL)
    }
    assert not undeclared, undeclared


def test_no_release_below_the_next_major_is_excluded() -> None:
    """A cap on a minor release makes pip downgrade what the user has."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    caps = re.findall(r'"(torch|transformers|accelerate|peft|huggingface_hub)[^"]*<(\d+(?:\.\d+)*)', text)
    assert caps and all("." not in cap for _, cap in caps), caps
