"""Turns the package's modules into flat, self-contained files: the code in a checkpoint.

transformers copies a checkpoint's code by searching the entry file, and then each file it finds, for relative imports
of one flat name. So every module that the entry module reaches becomes one file beside the others, and only its import
lines change: Triton reads the source of its kernels, and a reader can compare the file with the release line by line.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.abc import InspectLoader
from pathlib import Path

from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

from hf_efficient.errors import HFEError

PACKAGE = "hf_efficient"
NAMESPACE_MODULE = f"{PACKAGE}.kernels.namespace"
# Modules that may be exported: kernels, models, and the base modules that all packages import.
_EXPORTED_PACKAGES = (f"{PACKAGE}.kernels.", f"{PACKAGE}.modeling.")
_LEAVES = (f"{PACKAGE}.errors", f"{PACKAGE}.environment", f"{PACKAGE}.json_file", f"{PACKAGE}.logging")
# Installed wherever a checkpoint is loaded: torch, transformers and what transformers depends on.
_ALWAYS_INSTALLED = frozenset({"torch", "transformers", "huggingface_hub", "safetensors", "numpy"})
_NAMED_BY_TRANSFORMERS = ("modeling_", "configuration_", "tokenization_")


@dataclass(frozen=True)
class FlatCode:
    """A checkpoint's code.

    Attributes:
        files: file name -> text.
        entry: name of the file that transformers loads.
        source_hash: SHA-256 of the sources.
    """

    files: dict[str, str]
    entry: str
    source_hash: str

    @property
    def namespace(self) -> str:
        """Namespace of the custom ops in this code, to which each loaded copy adds its own name."""
        return f"hfe_{self.source_hash[:16]}"


class _Module:
    """One module of the package: its source, and the statements that import others of the package.

    `HFEError` if one of these has a form that cannot be flattened, see `package_imports`.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self.tree = ast.parse(text, filename=name)
        self.imports = list(package_imports(name, self.tree))

    def flat_text(self) -> str:
        """The source with each package import as a relative import of the flat file; all else byte for byte.

        `HFEError` if an import shares its line with another statement.
        """
        lines = self.text.encode().splitlines(keepends=True)  # the syntax tree counts columns in bytes
        for node in sorted(self.imports, key=lambda node: node.lineno, reverse=True):
            first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
            indent, rest = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
            if indent.strip() or rest.lstrip()[:1] not in (b"", b"#"):
                raise _rule_error(
                    self.name, node, "shares its line with another statement", "give the import its own line"
                )
            names = ", ".join(a.name if a.asname is None else f"{a.name} as {a.asname}" for a in node.names)
            statement = f"from .{flat_name(str(node.module))} import {names}"
            lines[first : last + 1] = [indent + statement.encode() + rest]
        return b"".join(lines).decode()


def flatten(entry_module: str, version: str) -> FlatCode:
    """Flatten `entry_module` and every module of the package that it imports, directly or not, into standalone files.

    The files depend on the sources and `version` alone, so that the same release always writes the same bytes. The one
    value that changes is `NS` of `kernels/namespace.py`, which becomes `hfe_<hash of all the sources>`.

    Raises:
        HFEError: a module breaks one of the rules that keep the package exportable; the message names file and line.
    """
    modules = _reach(entry_module)
    flat = {f"{flat_name(name)}.py": module for name, module in modules.items()}
    texts = {name: flat[name].flat_text() for name in sorted(flat)}
    digest = hashlib.sha256()
    for name, text in texts.items():
        digest.update(f"{name}\0{text}\0".encode())
    code = FlatCode({}, f"{flat_name(entry_module)}.py", digest.hexdigest())
    for name, text in texts.items():
        if flat[name].name == NAMESPACE_MODULE:
            text = with_value(text, "NS", f'"{code.namespace}"')
        code.files[name] = file_header(flat[name].name, version, code.source_hash) + text
    _self_check(code)
    return code


def flat_name(module: str) -> str:
    """File name, without suffix, of a module: `modeling_x`, `hfe_kernels_operation_api`."""
    path = module.removeprefix(f"{PACKAGE}.").split(".")
    return path[-1] if path[-1].startswith(_NAMED_BY_TRANSFORMERS) else "_".join(["hfe", *path])


def package_imports(name: str, tree: ast.Module) -> Iterator[ast.ImportFrom]:
    """The statements in the syntax tree of the module `name`, at any depth, that import from the package.

    Raises:
        HFEError: an import has a form that has no flat counterpart.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            if any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
                raise _rule_error(name, node, "imports a module", "import symbols: from hf_efficient.x.y import symbol")
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise _rule_error(
                    name, node, "is a relative import", "write the absolute name: from hf_efficient.x.y import …"
                )
            if node.module is None or node.module.split(".")[0] != PACKAGE:
                continue
            if any(alias.name == "*" for alias in node.names):
                raise _rule_error(name, node, "is a star import", "name the symbols")
            if _is_package(node.module):
                raise _rule_error(
                    name, node, f"imports from the package {node.module}", "import from the defining module"
                )
            yield node


def _reach(entry_module: str) -> dict[str, _Module]:
    """Module name -> module, of the entry module and all that it imports from the package, directly or not.

    Raises:
        HFEError: a module may not be exported, its source is not installed or breaks a rule (see `package_imports` and
            `_check_portable`), or two modules would have the same file name.
    """
    modules: dict[str, _Module] = {}
    flat: dict[str, str] = {}
    waiting = [entry_module]
    while waiting:
        name = waiting.pop()
        if name in modules:
            continue
        if name not in _LEAVES and not name.startswith(_EXPORTED_PACKAGES):
            raise HFEError(
                f"{entry_module} reaches {name}, which is not exported",
                "let exported code import only kernels, modeling, " + ", ".join(_LEAVES),
            )
        other = flat.setdefault(flat_name(name), name)
        if other != name:
            raise HFEError(f"{name} and {other} would both be {flat_name(name)}.py", "rename one of the two modules")
        module = modules[name] = _Module(name, _source_text(name))
        _check_portable(module)
        waiting += [str(node.module) for node in module.imports]
    return modules


def _check_portable(module: _Module) -> None:
    """Raise `HFEError` for imports by function and for `__file__`: transformers copies what import statements name."""
    for node in ast.walk(module.tree):
        called = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if called in ("import_module", "__import__"):
            raise _rule_error(
                module.name, node, f"calls {called}, which the copy cannot follow", "use an import statement"
            )
        if called == "__file__":
            raise _rule_error(
                module.name, node, "reads __file__, but data files are not copied", "keep the data in Python"
            )


def _source_text(module: str) -> str:
    """Source code of an installed module; `HFEError` if it is not available."""
    spec = importlib.util.find_spec(module)
    loader = spec.loader if spec else None
    source = loader.get_source(module) if isinstance(loader, InspectLoader) else None
    if source is None:
        raise HFEError(f"the source of {module} is not installed", "reinstall hf-efficient with its .py files")
    return source


def _is_package(module: str) -> bool:
    """True if an import name is a package (a folder), not a module."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def with_value(text: str, name: str, value: str) -> str:
    """`text`, the source of a module, with the code `value` assigned to the top-level variable `name`.

    Raises:
        HFEError: there is no such assignment.
    """
    for node in ast.parse(text).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        assigned = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if [ast.unparse(target) for target in targets] == [name] and assigned is not None:
            lines = text.encode().splitlines(keepends=True)
            line = lines[assigned.lineno - 1]
            lines[assigned.lineno - 1] = line[: assigned.col_offset] + value.encode() + line[assigned.end_col_offset :]
            return b"".join(lines).decode()
    raise HFEError(f"no line sets {name}", "keep the exporter and the exported module in step")


def file_header(module: str, version: str, source_hash: str) -> str:
    """The first lines of every file that the exporter writes."""
    # No dates: the same release must write the same bytes again.
    return (
        "# SPDX-License-Identifier: Apache-2.0\n"
        f"# {module} of hf-efficient {version}, as its exporter writes it into checkpoints.\n"
        f"# `hf-efficient verify` compares this file with that release. Sources: {source_hash}\n\n"
    )


def _self_check(code: FlatCode) -> None:
    """Raise `HFEError` unless transformers finds and copies all files, with what they need; uses its own functions."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in code.files.items():
            Path(folder, name).write_text(text, encoding="utf-8", newline="\n")
        for name, text in code.files.items():
            compile(text, name, "exec")
            for target in get_relative_imports(Path(folder, name)):
                if f"{target}.py" not in code.files:
                    raise HFEError(
                        f"{name} has a line that transformers reads as an import of {target}.py, which it lacks",
                        "reword the docstring or string that holds this line",
                    )
            needed = set(get_imports(Path(folder, name))) - _ALWAYS_INSTALLED - set(sys.stdlib_module_names)
            if needed:
                raise HFEError(
                    f"{name} imports {sorted(needed)} unguarded, so it loads only where that is installed",
                    "put the import in try/except ImportError at the top of the module",
                )
        copied = {Path(path).name for path in get_relative_import_files(Path(folder, code.entry))} | {code.entry}
    lost = sorted(set(code.files) - copied)
    if lost:
        raise HFEError(f"transformers would not copy {lost}", "import each of them by a plain import statement")


def _rule_error(module: str, node: ast.AST, what: str, remedy: str) -> HFEError:
    """The error (not raised) for a statement that breaks a rule of the export; `what` follows the statement's text."""
    return HFEError(f"{module}, line {getattr(node, 'lineno', 0)}: {ast.unparse(node)!r} {what}", remedy)
