"""Writes the files of a checkpoint beside weights, configuration and code.

They are those of the tokenizer or image processor and of sentence-transformers, generation settings, and licence.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import GENERATION_CONFIG_NAME, IMAGE_PROCESSOR_NAME

from hf_efficient.conversion.families.family import TOKENIZER_FILES
from hf_efficient.conversion.reading.checkpoint_files import file_inside
from hf_efficient.conversion.reading.source import Source
from hf_efficient.conversion.vocabulary import VocabularyChange
from hf_efficient.conversion.writing.durable_files import disk_errors, write_text
from hf_efficient.conversion.writing.known_files import settings_type
from hf_efficient.conversion.writing.known_processor import current_class, is_image_processor_class
from hf_efficient.conversion.writing.known_sentence_transformers import (
    MODULE_FILES,
    MODULES_NAME,
    SENTENCE_TRANSFORMERS_FILES,
)
from hf_efficient.conversion.writing.known_settings import is_tokenizer_class, type_mismatches, without_unknown
from hf_efficient.conversion.writing.tokenizer_check import keep_tokenizer
from hf_efficient.errors import HFEError, UsageError, error_text
from hf_efficient.json_file import MAX_JSON_BYTES, parse_json_list, read_bytes_of, read_json

_LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
# File names of texts only: a LICENSE.py of the source is code.
_LICENCE_NAME = re.compile(
    r"(LICEN[CS]E|NOTICE|COPYING)[\w+-]*(\.(txt|md|rst))?|LICEN[CS]ES/[\w+-][\w.+-]*\.(txt|md)", re.ASCII
)

# Key that names a class -> whether transformers has the class.
_CLASS_NAMES = {
    "tokenizer_class": is_tokenizer_class,
    "image_processor_type": is_image_processor_class,
    "feature_extractor_type": is_image_processor_class,
}


def is_licence(name: str) -> bool:
    """True if the path `name`, relative to the checkpoint, is that of the text of a licence or notice."""
    return _LICENCE_NAME.fullmatch(name) is not None


def write_companions(source: Source, folder: Path, vocabulary: VocabularyChange | None = None) -> list[str]:
    """Write the files beside weights and configuration of the source to `folder`; returns warnings for the report.

    Files of a checkpoint folder are copied byte for byte, except that settings that transformers does not know, such
    as references to code, are removed, and that a tokenizer with added tokens is saved again. A GGUF file's tokenizer
    is saved too. The tokenizer in `folder` gives the same ids as the source's; if that cannot be loaded, its copy is
    not checked, and a warning says so. `AutoImageProcessor` finds the source's class of image processor in `folder`.

    Raises:
        UsageError: the user named a tokenizer for a model without one.
        HFEError: a file leads outside the source, a settings file cannot be read, generation settings are invalid, a
            tokenizer that must be saved cannot be loaded, or the tokenizer behaves differently when it is loaded from
            `folder`.
        DiskFullError: the disk is full.
    """
    tokenizer, family = vocabulary.tokenizer if vocabulary else None, source.family
    if not family.reads_text and source.tokenizer_files is not None:
        raise UsageError(f"a tokenizer was given, and {family.name} have none", "leave it out (--tokenizer)")
    with disk_errors(folder):
        if family.image_processor is not None:
            warnings = _copy_processor(source.files, folder, family.image_processor)
        elif not family.reads_text:
            warnings = []
        elif tokenizer is not None or (source.gguf_file is not None and source.tokenizer_files is None):
            tokenizer = source.tokenizer() if tokenizer is None else tokenizer
            warnings = _save_tokenizer(tokenizer, folder)
        else:
            warnings = _copy_tokenizer(source.tokenizer_files or source.files, folder)
        if has_tokenizer(folder):
            warnings += _keep_tokenizer(source, tokenizer, folder)
        if not source.single_file:
            warnings += copy_licences(source.files, folder)
            if MODULES_NAME in family.companion_files and (source.files / MODULES_NAME).is_file():
                warnings += _copy_sentence_transformers(source.files, folder)
        if family.generates:
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
        settings, warnings = _drop_unknown_entries(path)
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
    return _drop_unknown_entries(path)[1] if path.is_file() else []


def _copy_tokenizer(origin: Path, folder: Path) -> list[str]:
    """Copy tokenizer_config.json, if there is one, and the other files of a tokenizer.

    Settings that transformers does not know are removed. Returns warnings: names of these, or that there is no
    tokenizer. Errors as for `_copy_file` and `_drop_unknown_entries`.
    """
    _copy(origin, folder, TOKENIZER_FILES)
    if not (origin / TOKENIZER_CONFIG_FILE).is_file():
        return ["the source has no tokenizer, so the result has none"] if not has_tokenizer(origin) else []
    _copy(origin, folder, (TOKENIZER_CONFIG_FILE,))
    return _drop_unknown_entries(folder / TOKENIZER_CONFIG_FILE)[1]


def _copy_processor(origin: Path, folder: Path, default: str) -> list[str]:
    """Copy preprocessor_config.json, without settings that transformers does not know; returns warnings.

    `AutoImageProcessor` would look up a class that the file does not name by the model type, which a conversion
    changes: so it is written into the file. `default` is the class that transformers looks up for the source.

    Errors as for `_copy_file` and `_drop_unknown_entries`.
    """
    path = folder / IMAGE_PROCESSOR_NAME
    if not (origin / IMAGE_PROCESSOR_NAME).is_file():
        return ["the source has no image processor, so the result has none"]
    _copy(origin, folder, (IMAGE_PROCESSOR_NAME,))
    settings, warnings = _drop_unknown_entries(path)
    named = current_class(settings.get("image_processor_type") or settings.pop("feature_extractor_type", None))
    if named is None or not is_image_processor_class(named):
        named = default
    if settings.get("image_processor_type") != named:
        settings["image_processor_type"] = named
        write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return warnings


def _copy_sentence_transformers(origin: Path, folder: Path) -> list[str]:
    """Copy the files that the package sentence-transformers reads, so that it loads the result; returns warnings.

    Without them it would take the mean of the hidden states. None is copied if the source has a module with weights or
    code of its own, or with settings that are not known. Errors as for `_copy_file` and `_drop_unknown_entries`.
    """
    data = read_bytes_of(file_inside(origin, MODULES_NAME, origin.name), MAX_JSON_BYTES)
    found: dict[str, Any] = {MODULES_NAME: parse_json_list(MODULES_NAME, data)}
    for pattern in MODULE_FILES:
        for path in sorted(origin.glob(pattern)):
            name = path.relative_to(origin).as_posix()
            found[name] = read_json(file_inside(origin, name, origin.name))
    for name, value in found.items():
        where = next((f"{where} {what}" for where, what in type_mismatches(value, settings_type(name))), None)
        if where is not None:
            return [
                f"the files of sentence-transformers were not copied, because a conversion does not know all of them "
                f"({name}: {where}); that package would load the result with the mean of the hidden states"
            ]
    _copy(origin, folder, SENTENCE_TRANSFORMERS_FILES)
    warnings = []
    for name in SENTENCE_TRANSFORMERS_FILES:
        if name not in (MODULES_NAME, *MODULE_FILES) and (folder / name).is_file():
            warnings += _drop_unknown_entries(folder / name)[1]
    return warnings


def _drop_unknown_entries(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Remove the entries of a JSON settings file that its type (`settings_type`) lacks or has with another type.

    The name of a class of tokenizer or image processor that is not one of transformers is removed too. If nothing is
    removed, the file is not written.

    Returns:
        The settings and, if entries were removed, a list with one warning that names them.

    Raises:
        HFEError: the file is not a JSON object that `read_json` accepts.
    """
    settings, dropped = without_unknown(read_json(path), settings_type(path.name))
    for key, known in _CLASS_NAMES.items():
        name = settings.get(key)
        if name is not None and not known(str(current_class(name))):
            del settings[key]
            dropped.append(key)
    if not dropped:
        return settings, []
    write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    warning = f"{path.name} of the source has entries that a conversion does not know, left out: {', '.join(dropped)}"
    if {"auto_map", *_CLASS_NAMES} & set(dropped):
        kind = "image processor" if path.name == IMAGE_PROCESSOR_NAME else "tokenizer"
        warning += f"; its {kind} has code of its own, which is not carried over: check that it works without"
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
