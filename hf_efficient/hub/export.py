"""Write the code of an architecture into a checkpoint folder, so that it loads without this package."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_efficient import __version__
from hf_efficient.conversion.reading.json_file import read_json
from hf_efficient.errors import HFEError
from hf_efficient.hub.custom_generate import FOLDER, render_custom_generate
from hf_efficient.hub.flatten import FlatCode, flatten
from hf_efficient.registry import ARCHITECTURES, Architecture, architecture_of

CONFIG = "config.json"
CODE_MANIFEST = "code_manifest.json"


@dataclass(frozen=True)
class CodeExport:
    """The code of one architecture, as it belongs into a checkpoint folder.

    Attributes:
        code: text of each file, the entry file and the hash of the sources.
        files: text of each file by its path in the folder: those of the code, and those of a `generate` of its own.
        auto_map: the entry of `config.json` that names the classes.
        manifest: text of `code_manifest.json`.
    """

    code: FlatCode
    files: dict[str, str]
    auto_map: dict[str, str]
    manifest: str


def export(folder: str | Path) -> CodeExport:
    """Make a checkpoint self-contained, so that `from_pretrained(folder, trust_remote_code=True)` loads it anywhere.

    Writes the code files and `code_manifest.json`, and sets `auto_map` in `config.json`. Again changes nothing.

    Raises:
        HFEError: `folder` holds no configuration of an architecture of this package.
    """
    folder = Path(folder)
    model_type = read_json(folder / CONFIG).get("model_type")
    architecture = architecture_of(str(model_type))
    if architecture is None:
        raise HFEError(
            f"{CONFIG} has model_type {model_type!r}, which is none of {[a.model_type for a in ARCHITECTURES]}",
            "convert the checkpoint first: hf-efficient convert",
        )
    return export_code(folder, architecture)


def export_code(folder: Path, architecture: Architecture) -> CodeExport:
    """Write the code of `architecture` into `folder`, beside its `config.json`; returns what was written."""
    exported = render_code(architecture)
    config = read_json(folder / CONFIG)
    if config.get("model_type") != architecture.model_type:
        raise HFEError(
            f"{CONFIG} has model_type {config.get('model_type')!r}, the code is that of {architecture.model_type!r}",
            "export the architecture that the configuration names",
        )
    for name in _files_of_earlier_export(folder) - set(exported.files):
        (folder / name).unlink(missing_ok=True)
    for name, text in exported.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        _write(folder / name, text)
    _write(folder / CODE_MANIFEST, exported.manifest)
    # The configuration comes last: only its auto_map makes the files count.
    _write(folder / CONFIG, _json({**config, "auto_map": exported.auto_map}))
    return exported


def render_code(architecture: Architecture) -> CodeExport:
    """The code of `architecture`, made from the installed package; writes nothing."""
    entry, auto_map = _auto_map(architecture)
    code = flatten(entry, __version__)
    files = {**code.files, **render_custom_generate(architecture, code)}
    manifest = {
        "package": "hf-efficient",
        "version": __version__,
        "model_type": architecture.model_type,
        "source_hash": code.source_hash,
        "files": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()},
    }
    return CodeExport(code, files, auto_map, _json(manifest))


def _auto_map(architecture: Architecture) -> tuple[str, dict[str, str]]:
    """The module that transformers enters by, and `auto_map`.

    AutoConfig, too, points into the modeling file: transformers tells local copies of code apart by a hash over the
    entry file and what it imports, so a second entry file would give a second, unequal configuration class.
    """
    models = {name: cls for name, cls in architecture.auto_classes.items() if name != "AutoConfig"}
    modules = sorted({cls.__module__ for cls in models.values()})
    config = architecture.config_class
    if len(modules) != 1 or getattr(sys.modules[modules[0]], config.__name__, None) is not config:
        raise HFEError(
            f"the classes of {architecture.model_type} are spread over {modules}",
            f"define the models in one modeling file which imports {config.__name__}",
        )
    entry = modules[0].rpartition(".")[2]
    return modules[0], {name: f"{entry}.{cls.__name__}" for name, cls in architecture.auto_classes.items()}


def _files_of_earlier_export(folder: Path) -> set[str]:
    """Code files that an earlier export left here: they would be foreign code beside the new ones."""
    if not (folder / CODE_MANIFEST).exists():
        return set()
    named = read_json(folder / CODE_MANIFEST).get("files")
    if not isinstance(named, dict):
        return set()
    # The manifest is only a file in a folder: it may not point anywhere else.
    return {name for name in named if name.endswith(".py") and name in (Path(name).name, f"{FOLDER}/{Path(name).name}")}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _write(path: Path, text: str) -> None:
    """Replace a file in one step: a killed export leaves the old file or the new one."""
    data = text.encode()
    if path.exists() and not path.is_symlink() and path.read_bytes() == data:
        return
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(data)
    os.replace(temporary, path)
