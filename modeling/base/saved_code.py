"""The code that a saved model comes with, so that its folder loads wherever torch and transformers are.

`save_pretrained` of the installed package gets it from the exporter. A checkpoint's own copy of this file, which has
the exporter's account of itself in `EXPORTED`, hands on the files that it was loaded from.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from hf_efficient.errors import HFEError
from hf_efficient.json_file import read_json

CODE_MANIFEST = "code_manifest.json"
CUSTOM_GENERATE = "custom_generate"
GENERATE = f"{CUSTOM_GENERATE}/generate.py"
# A whole set of the new code stands here while the files beside the configuration are replaced.
UNDER_WAY = "hfe_code_under_way"
# What the exporter knows of a checkpoint's code; it writes the value. Empty in the package itself.
EXPORTED: dict[str, Any] = {}
_IMPORT = re.compile(r"^[ \t]*from[ \t]+\.(\w+)[ \t]+import\b", re.MULTILINE)


@dataclass(frozen=True)
class SavedCode:
    """The code of one architecture, as it belongs into a checkpoint folder.

    Attributes:
        files: text of each file by its path in the folder: those of the code, and those of a `generate` of its own.
        entry: name of the modeling file.
        auto_map: the entry of `config.json` that names the classes.
        manifest: text of `code_manifest.json`.
    """

    files: dict[str, str]
    entry: str
    auto_map: dict[str, str]
    manifest: str

    @classmethod
    def of(cls, code: dict[str, str], about: dict[str, Any]) -> SavedCode:
        """All files of a checkpoint's code.

        Args:
            code: text of each flat code file by its name.
            about: what the exporter writes to `EXPORTED`: `package`, `version`, `model_type`, `source_hash`,
                `auto_map`; `generate` and `generation`, the text of a `generate` of its own and the name of the code
                file that it imports, or None.
        """
        files = dict(code)
        if about["generate"] is not None:
            files[GENERATE] = about["generate"]
            files |= {f"{CUSTOM_GENERATE}/{name}": code[name] for name in reached_files(about["generation"], code.get)}
        manifest = {
            **{key: about[key] for key in ("package", "version", "model_type", "source_hash")},
            "files": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()},
        }
        entry = about["auto_map"]["AutoConfig"].partition(".")[0] + ".py"
        return cls(files, entry, about["auto_map"], json_text(manifest))

    def write(self, folder: Path, config: dict[str, Any]) -> None:
        """Write the files and `config.json` into `folder`; whatever lies there under their names is replaced.

        A process that is killed meanwhile leaves a folder that loads, with the code that was there or with this one.

        Args:
            folder: the checkpoint.
            config: content of `config.json`; its `auto_map` is set here.

        Raises:
            HFEError: a file cannot be written.
        """
        for name in {UNDER_WAY, *(name.rpartition("/")[0] for name in self.files)} - {""}:
            if (folder / name).is_symlink():
                (folder / name).unlink()
        stale = _files_of_earlier_code(folder) - set(self.files)
        live = _live_code(folder)
        if live is not None and live.parent == folder and any(_differs(folder / n, t) for n, t in self.files.items()):
            # No order of single files keeps a mixture of two releases from being loaded. So a whole set of the new one
            # takes over first, by the one step that replaces the configuration.
            for name, text in self.files.items():
                if "/" not in name:
                    replace_file(folder / UNDER_WAY / name, text)
            replace_file(folder / CONFIG_NAME, self._config_text(config, f"{UNDER_WAY}/"))
        generated = {name: text for name, text in self.files.items() if "/" in name}
        if any(_differs(folder / name, text) for name, text in generated.items()):
            # transformers enters that folder by this file: without it, models generate as their class does.
            (folder / GENERATE).unlink(missing_ok=True)
        for name, text in sorted(self.files.items(), key=lambda item: item[0] == GENERATE):
            replace_file(folder / name, text)
        replace_file(folder / CONFIG_NAME, self._config_text(config))
        for name in stale:
            if not (folder / name).parent.is_symlink():
                (folder / name).unlink(missing_ok=True)
        _remove_folder(folder / UNDER_WAY)
        # Last, since the earlier one tells which files are to be removed.
        replace_file(folder / CODE_MANIFEST, self.manifest)

    def _config_text(self, config: dict[str, Any], prefix: str = "") -> str:
        return json_text({**config, "auto_map": {name: prefix + value for name, value in self.auto_map.items()}})


def carried_code(config_class: type) -> SavedCode | None:
    """The code that a checkpoint's configuration class was loaded with; None for a class of another file.

    Raises:
        HFEError: the files are no longer there.
    """
    if not EXPORTED or not is_ours(config_class) or getattr(config_class, "model_type", None) != EXPORTED["model_type"]:
        return None
    folder = Path(inspect.getfile(config_class)).parent

    def read(name: str) -> str:
        try:
            return (folder / name).read_bytes().decode()
        except OSError as error:
            raise HFEError(
                f"the code that the model was loaded with cannot be read: {folder / name} ({error.strerror})",
                "load the model again before saving it",
            ) from None

    entry = EXPORTED["auto_map"]["AutoConfig"].partition(".")[0] + ".py"
    return SavedCode.of(reached_files(entry, read), EXPORTED)


def is_ours(cls: type) -> bool:
    """Whether a class is defined in the package, or in the checkpoint's copy of it that this file belongs to."""
    package = __name__.partition(".")[0] if not EXPORTED else __name__.rpartition(".")[0]
    return cls.__module__.startswith(f"{package}.")


def reached_files(entry: str, read: Callable[[str], str | None]) -> dict[str, str]:
    """Text of the flat file `entry` and of all that it imports, directly or not, in the order of their names."""
    found: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        text = read(name)
        if text is None:
            raise HFEError(f"the code has no file {name}, which it imports", "import it in the modeling file")
        if name not in found:
            found[name] = text
            waiting += [f"{target}.py" for target in _IMPORT.findall(text)]
    return {name: found[name] for name in sorted(found)}


def json_text(value: dict[str, Any]) -> str:
    """The text of a JSON file of a checkpoint."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def replace_file(path: Path, text: str) -> None:
    """Give `path` this content in one step, and leave it alone where it has it; a link is replaced, not followed."""
    if not _differs(path, text):
        return
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.write_bytes(text.encode())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise HFEError(
            f"{path} cannot be written: {error.strerror}", "free the disk or the name, and save again"
        ) from error


def _differs(path: Path, text: str) -> bool:
    return path.is_symlink() or not path.is_file() or path.read_bytes() != text.encode()


def _remove_folder(folder: Path) -> None:
    """Remove a folder of code files, and nothing else that somebody may have put there."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.glob("*.py*"):
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _live_code(folder: Path) -> Path | None:
    """The modeling file that `config.json` names and that is there; None where the folder loads without code."""
    names = _read_object(folder / CONFIG_NAME).get("auto_map")
    named = names.get("AutoConfig") if isinstance(names, dict) else None
    path = folder / f"{named.rpartition('.')[0]}.py" if isinstance(named, str) else None
    return path if path is not None and path.is_file() else None


def _files_of_earlier_code(folder: Path) -> set[str]:
    """Code files that an earlier release left here: they would be foreign code beside the new ones."""
    named = _read_object(folder / CODE_MANIFEST).get("files")
    if not isinstance(named, dict):
        return set()
    # The manifest is only a file in a folder: it may not point anywhere else.
    allowed = re.compile(rf"({CUSTOM_GENERATE}/)?\w+\.py", re.ASCII)
    return {name for name in named if allowed.fullmatch(name)}


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, as what is broken is about to be replaced."""
    try:
        return read_json(path)
    except HFEError:
        return {}
