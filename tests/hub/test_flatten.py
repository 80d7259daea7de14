"""The rules that keep the package exportable, and what flattening does to a file."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hf_efficient.modeling
from hf_efficient.errors import HFEError
from hf_efficient.hub.export import render_code
from hf_efficient.hub.flatten import FlatCode, flatten, package_imports
from hf_efficient.registry import ARCHITECTURES, ArchitectureSpec

EXPORTABLE = ("kernels", "modeling", "hf_efficient/errors.py", "hf_efficient/environment.py", "hf_efficient/logging.py")

Probe = Callable[..., FlatCode]


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Probe]:
    """Flatten `modeling_entry.py` of a folder of made-up modules under `hf_efficient.modeling.probe`."""
    monkeypatch.setattr(hf_efficient.modeling, "__path__", [*hf_efficient.modeling.__path__, str(tmp_path)])

    def flatten_modules(**modules: str) -> FlatCode:
        for name, text in modules.items():
            path = tmp_path / "probe" / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        return flatten("hf_efficient.modeling.probe.modeling_entry", "9.9")

    yield flatten_modules
    for name in [name for name in sys.modules if name.startswith("hf_efficient.modeling.probe")]:
        del sys.modules[name]


def body(text: str) -> str:
    """A flat file without its header."""
    return text.split("\n\n", 1)[1]


def source_files(repository_root: Path) -> list[Path]:
    named = [repository_root / name for name in EXPORTABLE]
    return sorted(path for name in named for path in (name.rglob("*.py") if name.is_dir() else [name]))


def test_every_module_below_the_face_has_exportable_imports(repository_root: Path) -> None:
    paths = source_files(repository_root)
    assert len(paths) > 8
    for path in paths:
        list(package_imports(str(path), ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.model_type)
def test_every_architecture_can_be_exported(architecture: ArchitectureSpec) -> None:
    exported = render_code(architecture)
    assert exported.auto_map["AutoConfig"] == exported.code.entry.replace(
        ".py", f".{architecture.config_class.__name__}"
    )
    for name, text in exported.code.files.items():
        imported = [node.module or "" for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
        assert not [module for module in imported if module.startswith("hf_efficient")], name


@pytest.mark.parametrize("patch", ["stem", "bhyt"])
def test_a_patch_carries_no_foreign_patch(patch: str) -> None:
    """Only the export of the decoder that takes any combination may hold every architecture."""
    architecture = next(a for a in ARCHITECTURES if a.patch == patch)
    files = set(render_code(architecture).code.files)
    entries = {name for name in files if name.startswith("modeling_")}
    assert entries == {f"modeling_{patch}.py", "modeling_decoder.py"}
    foreign = {"stem", "bhyt"} - {patch}
    assert not [name for name in files if any(f"_{other}" in name for other in foreign)]
    assert [name for name in files if name.startswith(f"hfe_kernels_{patch}")]


def test_only_import_lines_and_the_namespace_change(probe: Probe) -> None:
    entry = (
        '"""Entry, with odd characters: Δ \u2028 \x0c."""\n'
        "from hf_efficient.modeling.probe.parts import (  # why\n    one,\n    two as zwei,\n)  # noqa: F401\n"
        "def late():\n\tfrom hf_efficient.kernels.namespace import NS\n\treturn NS, zwei(one)\n"
    )
    code = probe(modeling_entry=entry, parts="import math\none, two = 1, math.sqrt\n")
    assert sorted(code.files) == ["hfe_kernels_namespace.py", "hfe_modeling_probe_parts.py", "modeling_entry.py"]
    assert body(code.files["modeling_entry.py"]) == (
        '"""Entry, with odd characters: Δ \u2028 \x0c."""\n'
        "from .hfe_modeling_probe_parts import one, two as zwei  # noqa: F401\n"
        "def late():\n\tfrom .hfe_kernels_namespace import NS\n\treturn NS, zwei(one)\n"
    )
    assert body(code.files["hfe_modeling_probe_parts.py"]) == "import math\none, two = 1, math.sqrt\n"
    namespace = body(code.files["hfe_kernels_namespace.py"])
    assert f'NS = "{code.namespace}"' in namespace
    assert namespace.replace(code.namespace, "hf_efficient") == installed_source("hf_efficient.kernels.namespace")


def installed_source(module: str) -> str:
    __import__(module)
    return Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8")


def test_the_namespace_follows_every_source(probe: Probe) -> None:
    entry = "from hf_efficient.modeling.probe.parts import one\n"
    first = probe(modeling_entry=entry, parts="one = 1\n")
    assert probe(modeling_entry=entry, parts="one = 1\n") == first
    assert probe(modeling_entry=entry, parts="one = 2\n").namespace != first.namespace


def test_circular_imports_travel(probe: Probe) -> None:
    code = probe(
        modeling_entry="from hf_efficient.modeling.probe.parts import one\n",
        parts="one = 1\ndef back():\n    from hf_efficient.modeling.probe.modeling_entry import one\n    return one\n",
    )
    assert len(code.files) == 2


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("import hf_efficient.errors\n", ["line 1", "imports a module", "import symbols"]),
        ("from .parts import one\n", ["relative import"]),
        ("from hf_efficient.modeling.probe.parts import *\n", ["star import"]),
        ("from hf_efficient.modeling import stem\n", ["package hf_efficient.modeling"]),
        ("from hf_efficient import errors\n", ["package hf_efficient"]),
        ("def f():\n    from hf_efficient.modeling.stem import modeling_stem\n", ["line 2", "package"]),
        ("x = 1; from hf_efficient.errors import HFEError\n", ["shares its line"]),
        ("from hf_efficient.errors import HFEError; x = 1\n", ["shares its line"]),
        ("from hf_efficient.registry import ARCHITECTURES\n", ["hf_efficient.registry", "is not exported"]),
        ("from hf_efficient.conversion.patch import Patch\n", ["hf_efficient.conversion.patch", "is not exported"]),
        ("from hf_efficient.modeling.probe.nowhere import x\n", ["hf_efficient.modeling.probe.nowhere"]),
        ("from importlib import import_module\nimport_module('x')\n", ["import_module"]),
        ("data = open(__file__)\n", ["__file__", "data files"]),
        ("import triton\n", ["triton", "unguarded", "try/except"]),
        ("if HAVE_TRITON:\n    import triton\n", ["triton", "unguarded"]),
        ("import kernels\n", ["kernels", "unguarded"]),
        ('"""Example:\n    from .zz import y\n"""\n', ["zz.py", "docstring"]),
    ],
)
def test_code_that_would_not_load_is_refused(probe: Probe, entry: str, words: list[str]) -> None:
    with pytest.raises(HFEError) as caught:
        probe(modeling_entry=entry, parts="one = 1\n")
    for word in words:
        assert word in str(caught.value)


def test_two_modules_of_one_flat_name_are_refused(probe: Probe) -> None:
    with pytest.raises(HFEError, match=r"both be modeling_part\.py"):
        probe(
            modeling_entry=(
                "from hf_efficient.modeling.probe.a.modeling_part import x\n"
                "from hf_efficient.modeling.probe.b.modeling_part import x as y\n"
            ),
            a__modeling_part="x = 1\n",
            b__modeling_part="x = 2\n",
        )


def test_a_guarded_import_of_triton_travels(probe: Probe) -> None:
    guarded = "try:\n    import triton\nexcept ImportError:\n    triton = None\n"
    assert body(probe(modeling_entry=guarded).files["modeling_entry.py"]) == guarded
