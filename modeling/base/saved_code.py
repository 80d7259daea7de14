"""The code files in a saved checkpoint, with which it loads if only torch and transformers are installed.

In the installed package, `save_pretrained` gets the files from the exporter (`hub/export.py`). In a checkpoint's copy
of this file, `EXPORTED` is filled in, and `save_pretrained` copies the files that the checkpoint was loaded from.
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
# Folder for a complete copy of the new code, from which the checkpoint loads while its own files are replaced.
STAGING = "hfe_new_code"
# In a checkpoint's copy of this file the dictionary `about` of `SavedCode.of`; empty in the installed package.
EXPORTED: dict[str, Any] = {}
_IMPORT = re.compile(r"^[ \t]*from[ \t]+\.(\w+)[ \t]+import\b", re.MULTILINE)


@dataclass(frozen=True)
class SavedCode:
    """The code files of one architecture, as a checkpoint folder holds them.

    Attributes:
        files: text of each file by its path in the folder, those in `custom_generate/` included.
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
        """Return the code files of a checkpoint, with its manifest and `custom_generate/`.

        Args:
            code: text of each flat code file by its name.
            about: what the exporter writes to `EXPORTED`: `package`, `version`, `model_type`, `source_hash`,
                `auto_map`; `generate` and `generation`, the text of `custom_generate/generate.py` and the name of the
                code file that it imports, or None.
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
        """Write the files, `config.json` and the manifest into `folder`; existing files of these names are replaced.

        Code files that the folder's earlier manifest lists and that are not among the new ones are removed. A symbolic
        link in place of a folder of code files is replaced by a folder. If the process is killed while it writes, the
        folder still loads, with the old code or with the new.

        Args:
            folder: the checkpoint.
            config: content of `config.json`; its `auto_map` is set here.

        Raises:
            HFEError: a file cannot be written.
            OSError: an existing file cannot be read or removed.
        """
        for name in {STAGING, *(name.rpartition("/")[0] for name in self.files)} - {""}:
            if (folder / name).is_symlink():
                (folder / name).unlink()
        stale = _files_of_earlier_code(folder) - set(self.files)
        live = _named_modeling_file(folder)
        if live is not None and live.parent == folder and any(_differs(folder / n, t) for n, t in self.files.items()):
            # Replaced one by one, the files would be a mixture of two releases for a while. So config.json first points
            # to a complete copy of the new ones.
            for name, text in self.files.items():
                if "/" not in name:
                    replace_file(folder / STAGING / name, text)
            replace_file(folder / CONFIG_NAME, self._config_text(config, f"{STAGING}/"))
        generated = {name: text for name, text in self.files.items() if "/" in name}
        if any(_differs(folder / name, text) for name, text in generated.items()):
            # transformers loads that folder by this file; while it is absent, `generate` of the class is used.
            (folder / GENERATE).unlink(missing_ok=True)
        for name, text in sorted(self.files.items(), key=lambda item: item[0] == GENERATE):
            replace_file(folder / name, text)
        replace_file(folder / CONFIG_NAME, self._config_text(config))
        for name in stale:
            if not (folder / name).parent.is_symlink():
                (folder / name).unlink(missing_ok=True)
        _remove_folder(folder / STAGING)
        # Last, since the previous manifest lists the files to remove.
        replace_file(folder / CODE_MANIFEST, self.manifest)

    def _config_text(self, config: dict[str, Any], prefix: str = "") -> str:
        """Return the text of config.json with our `auto_map`; `prefix` is the folder of its files, such as "dir/"."""
        return json_text({**config, "auto_map": {name: prefix + value for name, value in self.auto_map.items()}})


def carried_code(config_class: type) -> SavedCode | None:
    """Return the code files that a configuration class was loaded with from a checkpoint.

    None in the installed package, and for a class of other code or of another model type.

    Raises:
        HFEError: the files cannot be read any more.
    """
    if not EXPORTED or not is_ours(config_class) or getattr(config_class, "model_type", None) != EXPORTED["model_type"]:
        return None
    folder = Path(inspect.getfile(config_class)).parent

    def read(name: str) -> str:
        """Return the text of one of the checkpoint's code files."""
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
    """True if `cls` is defined in the installed package, or in the same checkpoint's code as this file."""
    package = __name__.partition(".")[0] if not EXPORTED else __name__.rpartition(".")[0]
    return cls.__module__.startswith(f"{package}.")


def reached_files(entry: str, read: Callable[[str], str | None]) -> dict[str, str]:
    """Return the file `entry` and all code files that it imports, directly or indirectly.

    Args:
        entry: name of a flat code file.
        read: returns the text of a code file by its name, or None if there is no such file.

    Returns:
        Name -> text, sorted by name.

    Raises:
        HFEError: a file does not exist; errors of `read` propagate.
    """
    texts: dict[str, str] = {}
    pending = [entry]
    while pending:
        name = pending.pop()
        text = read(name)
        if text is None:
            raise HFEError(f"the code has no file {name}, which it imports", "import it in the modeling file")
        if name not in texts:
            texts[name] = text
            pending += [f"{target}.py" for target in _IMPORT.findall(text)]
    return {name: texts[name] for name in sorted(texts)}


def json_text(value: dict[str, Any]) -> str:
    """Return `value` as the text of a JSON file: sorted keys, indent 2, a final newline."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def replace_file(path: Path, text: str) -> None:
    """Write `path` atomically, unless it has this content already; a symbolic link is replaced, not followed.

    The parent folder is created if absent, but not the parents of that.

    Raises:
        HFEError: the file cannot be written.
        OSError: the existing file cannot be read.
    """
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
    """True unless `path` is a regular file with exactly this content; `OSError` if it cannot be read."""
    return path.is_symlink() or not path.is_file() or path.read_bytes() != text.encode()


def _remove_folder(folder: Path) -> None:
    """Remove the Python files in a folder, and the folder if it is then empty; nothing for a link or no folder."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.glob("*.py*"):
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _named_modeling_file(folder: Path) -> Path | None:
    """Return the path of the code file that `auto_map` in config.json names for `AutoConfig`; None if there is none."""
    names = _read_object(folder / CONFIG_NAME).get("auto_map")
    named = names.get("AutoConfig") if isinstance(names, dict) else None
    path = folder / f"{named.rpartition('.')[0]}.py" if isinstance(named, str) else None
    return path if path is not None and path.is_file() else None


def _files_of_earlier_code(folder: Path) -> set[str]:
    """Return the names of the code files in a checkpoint folder that its manifest lists; empty without a manifest."""
    named = _read_object(folder / CODE_MANIFEST).get("files")
    if not isinstance(named, dict):
        return set()
    # The manifest is not trusted: only code files inside the folder may be removed.
    allowed = re.compile(rf"({CUSTOM_GENERATE}/)?\w+\.py", re.ASCII)
    return {name for name in named if allowed.fullmatch(name)}


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} if the file is absent or damaged, since it is about to be replaced."""
    try:
        return read_json(path)
    except HFEError:
        return {}
