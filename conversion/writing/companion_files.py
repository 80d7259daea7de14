"""Writes the files of a checkpoint beside weights, configuration and code: tokenizer, generation settings, licence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import GENERATION_CONFIG_NAME

from hf_efficient.conversion.families.family import TOKENIZER_FILES
from hf_efficient.conversion.reading.checkpoint_files import file_inside
from hf_efficient.conversion.reading.source import Source
from hf_efficient.conversion.vocabulary import VocabularyChange
from hf_efficient.conversion.writing.durable_files import disk_errors, write_text
from hf_efficient.conversion.writing.known_settings import (
    GenerationSettings,
    TokenizerSettings,
    is_tokenizer_class,
    without_unknown,
)
from hf_efficient.conversion.writing.tokenizer_check import keep_tokenizer
from hf_efficient.errors import HFEError, error_text
from hf_efficient.json_file import read_json

_LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
# File names of texts only: a LICENSE.py of the source is code.
_LICENCE_NAME = re.compile(
    r"(LICEN[CS]E|NOTICE|COPYING)[\w+-]*(\.(txt|md|rst))?|LICEN[CS]ES/[\w+-][\w.+-]*\.(txt|md)", re.ASCII
)


def is_licence(name: str) -> bool:
    """True if the path `name`, relative to the checkpoint, is that of the text of a licence or notice."""
    return _LICENCE_NAME.fullmatch(name) is not None


def write_companions(source: Source, folder: Path, vocabulary: VocabularyChange | None = None) -> list[str]:
    """Write tokenizer, generation settings and licence of the source to `folder`; returns warnings for the report.

    Files of a checkpoint folder are copied byte for byte, except that settings that transformers does not know, such
    as references to code, are removed, and that a tokenizer with added tokens is saved again. A GGUF file's tokenizer
    is saved too. The tokenizer in `folder` gives the same ids as the source's; if that cannot be loaded, its copy is
    not checked, and a warning says so.

    Raises:
        HFEError: a file leads outside the source, a settings file cannot be read, generation settings are invalid, a
            tokenizer that must be saved cannot be loaded, or the tokenizer behaves differently when it is loaded from
            `folder`.
        DiskFullError: the disk is full.
    """
    tokenizer = vocabulary.tokenizer if vocabulary else None
    with disk_errors(folder):
        if tokenizer is not None or (source.gguf_file is not None and source.tokenizer_files is None):
            tokenizer = source.tokenizer() if tokenizer is None else tokenizer
            warnings = _save_tokenizer(tokenizer, folder)
        else:
            warnings = _copy_tokenizer(source.tokenizer_files or source.files, folder, source.family.companion_files)
        if has_tokenizer(folder):
            warnings += _keep_tokenizer(source, tokenizer, folder)
        if not source.single_file:
            warnings += copy_licences(source.files, folder)
        if source.family.generates:
            warnings += _write_generation_settings(source, folder, vocabulary)
    return warnings


def _write_generation_settings(source: Source, folder: Path, vocabulary: VocabularyChange | None) -> list[str]:
    """Write generation_config.json: the source's without unknown entries or, without one, the settings of config.json.

    The ids in `vocabulary.suppressed` are added to `suppress_tokens`. Returns warnings.

    Raises:
        HFEError: the source's file cannot be read or leads outside it, or settings in config.json are invalid.
    """
    path = folder / GENERATION_CONFIG_NAME
    if source.gguf_file is None and (source.files / GENERATION_CONFIG_NAME).is_file():
        _copy(source.files, folder, (GENERATION_CONFIG_NAME,))
        settings, warnings = _drop_unknown_entries(path, GenerationSettings)
    else:
        warnings = []
        try:
            stock = GenerationConfig.from_model_config(dict(source.fields) or source.stock_config)
            settings = json.loads(stock.to_json_string(use_diff=True))
        # transformers raises many kinds of errors for a setting of a wrong type or value.
        except Exception as error:
            cause = error_text(error)
            raise HFEError(
                f"the generation settings in config.json are not valid ({cause})", "correct or remove them"
            ) from error
        # transformers replaces settings with this mark by those of the model's configuration, which has none.
        settings.pop("_from_model_config", None)
        write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    if vocabulary and vocabulary.suppressed:
        settings.pop("_from_model_config", None)  # they now differ from the model's configuration
        settings["suppress_tokens"] = sorted({*(settings.get("suppress_tokens") or []), *vocabulary.suppressed})
        write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return warnings


def _keep_tokenizer(source: Source, tokenizer: Any, folder: Path) -> list[str]:
    """`keep_tokenizer` for `tokenizer`, or for the source's if that is None; a warning if that cannot be loaded.

    Errors as for `keep_tokenizer`.
    """
    if tokenizer is None:
        try:
            tokenizer = source.tokenizer()
        # The source's own tokenizer cannot be loaded, so there is nothing to compare with.
        except HFEError as error:
            return [f"the source's tokenizer was copied, but not checked: {error.problem}"]
    return keep_tokenizer(source.name, tokenizer, folder)


def _save_tokenizer(tokenizer: Any, folder: Path) -> list[str]:
    """Save a tokenizer, without settings that transformers does not know; returns warnings that name these."""
    tokenizer.save_pretrained(folder)
    path = folder / TOKENIZER_CONFIG_FILE
    return _drop_unknown_entries(path, TokenizerSettings)[1] if path.is_file() else []


def _copy_tokenizer(origin: Path, folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """Copy tokenizer_config.json, if there is one, and the tokenizer or processor files that match a glob pattern.

    Without patterns, for models without a tokenizer, nothing is copied. Settings that transformers does not know are
    removed. Returns warnings: names of these, or that there is no tokenizer. Errors as for `_copy_file` and
    `_drop_unknown_entries`.
    """
    if not patterns:
        return []
    _copy(origin, folder, patterns)
    if not (origin / TOKENIZER_CONFIG_FILE).is_file():
        return ["the source has no tokenizer, so the result has none"] if not has_tokenizer(origin) else []
    _copy(origin, folder, (TOKENIZER_CONFIG_FILE,))
    return _drop_unknown_entries(folder / TOKENIZER_CONFIG_FILE, TokenizerSettings)[1]


def _drop_unknown_entries(path: Path, kind: Any) -> tuple[dict[str, Any], list[str]]:
    """Remove the entries of a JSON settings file that the TypedDict `kind` does not have or whose type differs.

    A `tokenizer_class` that is not one of transformers is removed too. If nothing is removed, the file is not written.

    Returns:
        The settings and, if entries were removed, a list with one warning that names them.

    Raises:
        HFEError: the file is not a JSON object that `read_json` accepts.
    """
    settings, dropped = without_unknown(read_json(path), kind)
    name = settings.get("tokenizer_class")
    if name is not None and not is_tokenizer_class(name):
        del settings["tokenizer_class"]
        dropped.append("tokenizer_class")
    if not dropped:
        return settings, []
    write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    warning = f"{path.name} of the source has entries that transformers does not know, left out: {', '.join(dropped)}"
    if {"auto_map", "tokenizer_class"} & set(dropped):
        warning += "; its tokenizer has code of its own, which is not carried over: check that it works without"
    return settings, [warning]


def has_tokenizer(folder: Path) -> bool:
    """True if a folder has any file of a tokenizer."""
    return any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern))


def _copy(origin: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of `origin` that match one of the glob patterns; errors as for `_copy_file`."""
    for pattern in patterns:
        for path in sorted(origin.glob(pattern)):
            _copy_file(origin, str(path.relative_to(origin)), folder)


def _copy_file(origin: Path, name: str, folder: Path) -> None:
    """Copy the file `name` from `origin` to `folder`; `HFEError` if it is a link that leads outside `origin`."""
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(file_inside(origin, name, origin.name), folder / name)


def copy_licences(origin: Path, folder: Path) -> list[str]:
    """Copy licence texts, also from a folder LICENSES; errors as for `_copy_file`.

    Returns a list with one warning that names similar files that are no such texts, if there are any.
    """
    left_out = []
    for path in sorted(match for pattern in _LICENCE_PATTERNS for match in origin.glob(pattern)):
        for each in sorted(path.iterdir()) if path.is_dir() else [path]:
            name = each.relative_to(origin).as_posix()
            if is_licence(name) and each.is_file():
                _copy_file(origin, name, folder)
            else:
                left_out.append(name)
    return (
        [f"{', '.join(left_out)} of the source is not the text of a licence, so it was not copied"] if left_out else []
    )
