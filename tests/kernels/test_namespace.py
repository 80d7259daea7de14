"""Operators of two versions of the code, in one process, stay apart."""

from __future__ import annotations

import ast
import gc
import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from hf_efficient.kernels.namespace import NS


def _import(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copied(tmp_path: Path, repository_root: Path, monkeypatch: pytest.MonkeyPatch):
    """Imports a copy of `operators.py` as an export has it: beside its own `namespace.py`, which names `namespace`."""

    def copy(namespace: str, times: int = 1) -> ModuleType:
        folder = f"copy_of_{namespace}_{times}"
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
        (tmp_path / folder / "namespace.py").write_text(f'NS = "{namespace}"\n')
        source = (repository_root / "kernels" / "operators.py").read_text(encoding="utf-8")
        changed = source.replace("hf_efficient.kernels.namespace", f"{folder}.namespace")
        assert changed != source
        (tmp_path / folder / "operators.py").write_text(changed)
        monkeypatch.syspath_prepend(tmp_path)
        return _import(f"{folder}.operators", tmp_path / folder / "operators.py")

    yield copy
    for name in [n for n in sys.modules if n.startswith("copy_of_")]:
        del sys.modules[name]
    shutil.rmtree(tmp_path, ignore_errors=True)


def _plus(number: float) -> Callable[[], Callable[[Tensor], Tensor]]:
    return lambda: lambda x: x + number


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_a_custom_op_of_the_same_name_silently_replaces_the_first() -> None:
    """The behaviour of PyTorch that the rest of this file guards against."""

    @torch.library.custom_op("hfe_trap::add", mutates_args=())
    def first(x: Tensor) -> Tensor:
        return x + 1

    assert torch.ops.hfe_trap.add(torch.zeros(1)).item() == 1

    @torch.library.custom_op("hfe_trap::add", mutates_args=())
    def second(x: Tensor) -> Tensor:
        return x + 2

    assert torch.ops.hfe_trap.add(torch.zeros(1)).item() == 2, "calling the first by name now runs the second"


def test_two_name_spaces_keep_their_operators_apart(copied) -> None:
    first = copied("hfe_version_one").define_operator("add", _plus(1), _fake)
    second = copied("hfe_version_two").define_operator("add", _plus(2), _fake)
    assert first(torch.zeros(1)).item() == 1
    assert second(torch.zeros(1)).item() == 2
    assert torch.ops.hfe_version_one.add(torch.zeros(1)).item() == 1


def test_the_same_code_imported_from_two_places_shares_its_operators(copied) -> None:
    first = copied("hfe_shared", 1).define_operator("add", _plus(1), _fake)
    again = copied("hfe_shared", 2).define_operator("add", _plus(1), _fake)
    assert again is first
    assert torch.compile(again, fullgraph=True, backend="aot_eager")(torch.zeros(1)).item() == 1


def test_an_operator_outlives_the_module_that_defined_it(copied) -> None:
    operator = copied("hfe_outliving").define_operator("add", _plus(1), _fake)
    for name in [n for n in sys.modules if n.startswith("copy_of_hfe_outliving")]:
        del sys.modules[name]
    gc.collect()
    assert operator(torch.zeros(1)).item() == 1
    assert copied("hfe_outliving", 2).define_operator("add", _plus(1), _fake) is operator


def test_every_operator_is_named_through_the_name_space(repository_root: Path) -> None:
    """Only `operators.py` defines operators; no file spells the namespace out."""
    wrong = []
    for path in sorted((repository_root / "kernels").rglob("*.py")):
        if path.name in ("operators.py", "namespace.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Attribute) and node.attr in ("custom_op", "triton_op", "Library", "define")
            spelt = isinstance(node, ast.Constant) and isinstance(node.value, str) and f"{NS}::" in node.value
            if named or spelt:
                wrong.append(f"{path.relative_to(repository_root)}:{node.lineno}")
    assert not wrong, wrong


def test_operators_of_the_package_carry_its_name_space() -> None:
    from hf_efficient.kernels.stem_gate.op import stem_gate_forward

    assert stem_gate_forward.name() == f"{NS}::stem_gate"
