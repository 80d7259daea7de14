"""The rules of the house, read off the source tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STOREYS = ["kernels", "modeling", "conversion"]
# What each storey may import of ours; the leaves below are open to all.
BELOW = {"kernels": set(), "modeling": {"kernels"}, "conversion": {"kernels", "modeling"}}
LEAVES = {"hf_efficient.errors", "hf_efficient.environment", "hf_efficient.json_file", "hf_efficient.logging"}
SOURCES = [p for folder in [*STOREYS, "hf_efficient"] for p in sorted((ROOT / folder).rglob("*.py"))]


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "hf_efficient" else ("hf_efficient", *parts))


def _imports(path: Path) -> list[tuple[int, str, list[str]]]:
    """(line, module, names) of every import in a file, also inside functions; names is empty for `import x`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, "." * node.level + (node.module or ""), [a.name for a in node.names]))
    return found


@pytest.mark.parametrize("storey", STOREYS)
def test_a_storey_imports_only_what_lies_below_it(storey: str) -> None:
    wrong = []
    for path in (ROOT / storey).rglob("*.py"):
        for line, module, _ in _imports(path):
            if module.startswith("hf_efficient") and module not in LEAVES:
                other = module.split(".")[1] if "." in module else "(root)"
                if other != storey and other not in BELOW[storey]:
                    wrong.append(f"{_relative(path)}:{line} imports {module}")
    assert not wrong, wrong


def test_leaves_import_only_the_standard_library_and_each_other() -> None:
    for leaf in LEAVES:
        path = ROOT / (leaf.replace(".", "/") + ".py")
        for line, module, _ in _imports(path):
            assert module in LEAVES or module.split(".")[0] not in {"torch", "transformers", "hf_efficient"}, (
                leaf,
                line,
            )


def test_kernels_know_nothing_of_transformers() -> None:
    wrong = [
        f"{_relative(p)}:{line}"
        for p in (ROOT / "kernels").rglob("*.py")
        for line, module, _ in _imports(p)
        if module.split(".")[0] == "transformers"
    ]
    assert not wrong, wrong


def test_lower_storeys_import_symbols_from_modules_by_absolute_name() -> None:
    """The exporter flattens these files; it understands `from package.module import symbol` and nothing else."""
    wrong = []
    for storey in STOREYS:
        for path in (ROOT / storey).rglob("*.py"):
            for line, module, names in _imports(path):
                if module.startswith(".") or "*" in names or (module.startswith("hf_efficient") and not names):
                    wrong.append(f"{_relative(path)}:{line}")
    assert not wrong, wrong


def test_no_import_cycles_at_module_level() -> None:
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[_module(path)] = {
            node.module
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_")
        }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_top_folders_are_no_packages_and_inner_init_files_are_empty() -> None:
    for storey in STOREYS:
        assert not (ROOT / storey / "__init__.py").exists(), f"{storey}/__init__.py would shadow other packages"
        for path in (ROOT / storey).rglob("__init__.py"):
            assert not path.read_text(encoding="utf-8").strip(), f"{_relative(path)} must be empty"
        for folder in {p.parent for p in (ROOT / storey).rglob("*.py")} - {ROOT / storey}:
            assert (folder / "__init__.py").exists(), f"{_relative(folder)} has no __init__.py"


def test_files_are_small_and_named_for_what_they_hold() -> None:
    for path in [*SOURCES, *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 500, f"{_relative(path)} has {lines} lines"
        assert path.stem not in {"utils", "helpers", "misc", "common"}, _relative(path)


def test_environment_variables_are_read_in_one_place() -> None:
    wrong = [
        _relative(p)
        for p in SOURCES
        if p.name != "environment.py" and re.search(r"os\.environ|os\.getenv|environ\[", p.read_text(encoding="utf-8"))
    ]
    assert not wrong, wrong


def test_user_input_is_never_checked_by_assert() -> None:
    wrong = [
        f"{_relative(p)}:{node.lineno}"
        for p in SOURCES
        for node in ast.walk(ast.parse(p.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert not wrong, wrong


def test_every_public_name_has_a_docstring() -> None:
    import hf_efficient

    for name in hf_efficient.__all__:
        if name != "__version__":
            assert (getattr(hf_efficient, name).__doc__ or "").strip(), name
