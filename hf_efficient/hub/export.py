"""Writes the code of an architecture into a checkpoint folder, so that it loads without this package."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers.utils import CONFIG_NAME

from hf_efficient import __version__
from hf_efficient.errors import HFEError
from hf_efficient.hub.custom_generate import render_generate
from hf_efficient.hub.flatten import FlatCode, flat_name, flatten, with_value
from hf_efficient.json_file import read_json
from hf_efficient.modeling.base.saved_code import SavedCode
from hf_efficient.registry import ARCHITECTURES, ArchitectureSpec, architecture_of

_SAVED_CODE = flat_name("hf_efficient.modeling.base.saved_code") + ".py"


@dataclass(frozen=True)
class CodeExport(SavedCode):
    """The code of one architecture, generated from the installed package.

    Attributes:
        code: text of each flat code file, the entry file and the hash of the sources.
    """

    code: FlatCode


def export(folder: str | Path) -> CodeExport:
    """Write the code of this release into a checkpoint, so that `trust_remote_code=True` loads it anywhere.

    Writes the code files and `code_manifest.json`, and sets `auto_map` in `config.json`. Exporting again changes
    nothing. If the process is killed while it writes, the folder still loads, with the old code or with the new.

    Raises:
        HFEError: config.json is missing or cannot be read, its model type is not one of this package's, or a file
            cannot be written.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).exists():
        raise HFEError(
            f"{folder} has no {CONFIG_NAME}",
            "name the folder of a whole checkpoint; merge an adapter into its base first",
        )
    model_type = read_json(folder / CONFIG_NAME).get("model_type")
    architecture = architecture_of(str(model_type))
    if architecture is None:
        raise HFEError(
            f"{CONFIG_NAME} has model_type {model_type!r}, which is none of {[a.model_type for a in ARCHITECTURES]}",
            "convert the checkpoint first: hf-efficient convert",
        )
    return export_code(folder, architecture)


def export_code(folder: Path, architecture: ArchitectureSpec) -> CodeExport:
    """Write the code of `architecture` into `folder` and set `auto_map` in its config.json; returns what was written.

    Raises:
        HFEError: config.json cannot be read or has another model type, or a file cannot be written.
    """
    exported = render_code(architecture)
    config = read_json(folder / CONFIG_NAME)
    if config.get("model_type") != architecture.model_type:
        raise HFEError(
            f"{CONFIG_NAME} has model_type {config.get('model_type')!r}, "
            f"the code is that of {architecture.model_type!r}",
            "export the architecture that the configuration names",
        )
    exported.write(folder, config)
    return exported


def render_code(architecture: ArchitectureSpec) -> CodeExport:
    """Generate the code of `architecture` from the installed package; writes nothing.

    Raises:
        HFEError: the package's code cannot be exported, see `flatten`, or the architecture's model classes are not all
            in one module.
    """
    entry, auto_map = _auto_map(architecture)
    code = flatten(entry, __version__)
    generate, generation = render_generate(architecture, code)
    about = {
        "package": "hf-efficient",
        "version": __version__,
        "model_type": architecture.model_type,
        "source_hash": code.source_hash,
        "auto_map": auto_map,
        "generate": generate,
        "generation": generation,
    }
    code.files[_SAVED_CODE] = with_value(code.files[_SAVED_CODE], "EXPORTED", repr(about))
    saved = SavedCode.of(code.files, about)
    return CodeExport(saved.files, saved.entry, saved.auto_map, saved.manifest, code)


@cache
def installed_code(config_class: type) -> CodeExport | None:
    """The code that `save_pretrained` writes with a configuration of this class; None if it is not registered.

    Errors as for `render_code`.
    """
    return next((render_code(a) for a in ARCHITECTURES if a.config_class is config_class), None)


def _auto_map(architecture: ArchitectureSpec) -> tuple[str, dict[str, str]]:
    """(entry module, which transformers loads, `auto_map`) of an architecture.

    AutoConfig, too, points into the modeling file: transformers tells local copies of code apart by a hash over the
    entry file and what it imports, so a second entry file would give a second, unequal configuration class.

    Raises:
        HFEError: the model classes are not all in one module, or it does not import the configuration class.
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
