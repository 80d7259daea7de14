"""The files beside the weights that make a checkpoint usable: tokenizer, generation settings, licence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from hf_efficient.conversion.reading.json_file import read_json
from hf_efficient.conversion.reading.source import Source, file_inside
from hf_efficient.conversion.vocabulary import VocabularyChange
from hf_efficient.conversion.writing.durable_files import disk_errors, write_text

TOKENIZER_FILES = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja"),
    *("chat_template.json", "additional_chat_templates/*.jinja"),
)
TOKENIZER_CONFIG = "tokenizer_config.json"
_GENERATION_CONFIG = "generation_config.json"
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")


def write_companions(source: Source, folder: Path, vocabulary: VocabularyChange | None = None) -> list[str]:
    """Put tokenizer, generation settings and licence of the source into `folder`; returns warnings for the report.

    Files of a checkpoint folder are copied byte for byte, except that no reference to code is taken over, and that a
    tokenizer with added tokens is saved anew.
    """
    tokenizer = vocabulary.tokenizer if vocabulary else None
    with disk_errors(folder):
        if tokenizer is not None or (source.gguf_file is not None and source.tokenizer_files is None):
            warnings = _save_tokenizer(source.tokenizer() if tokenizer is None else tokenizer, folder)
        else:
            warnings = _copy_tokenizer(source.tokenizer_files or source.files, folder)
        if source.gguf_file is None:
            _copy(source.files, folder, _LICENCES)
    if source.gguf_file is None and (source.files / _GENERATION_CONFIG).is_file():
        _copy(source.files, folder, (_GENERATION_CONFIG,))
    else:
        settings = GenerationConfig.from_model_config(source.stock_config)
        write_text(folder / _GENERATION_CONFIG, settings.to_json_string(use_diff=True))
    if vocabulary and vocabulary.suppressed:
        settings = read_json(folder / _GENERATION_CONFIG)
        settings.pop("_from_model_config", None)  # from here on they say more than the model's configuration
        settings["suppress_tokens"] = sorted({*(settings.get("suppress_tokens") or []), *vocabulary.suppressed})
        write_text(folder / _GENERATION_CONFIG, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return warnings


def _save_tokenizer(tokenizer: Any, folder: Path) -> list[str]:
    tokenizer.save_pretrained(folder)
    path = folder / TOKENIZER_CONFIG
    return _write_without_code(read_json(path), path) if path.is_file() else []


def _copy_tokenizer(origin: Path, folder: Path) -> list[str]:
    _copy(origin, folder, TOKENIZER_FILES)
    if not (origin / TOKENIZER_CONFIG).is_file():
        return ["the source has no tokenizer, so the result has none"] if not _has_tokenizer(origin) else []
    _copy(origin, folder, (TOKENIZER_CONFIG,))
    return _write_without_code(read_json(folder / TOKENIZER_CONFIG), folder / TOKENIZER_CONFIG)


def _write_without_code(settings: dict[str, Any], path: Path) -> list[str]:
    """Leave a tokenizer's settings as they are in `path`, unless they refer to code; then write them without."""
    if settings.pop("auto_map", None) is None:
        return []
    write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return ["the source's tokenizer has code of its own, which is not carried over: check that it works without"]


def _has_tokenizer(folder: Path) -> bool:
    return any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern))


def _copy(origin: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in sorted(origin.glob(pattern)):
            name = path.relative_to(origin)
            (folder / name).parent.mkdir(exist_ok=True)
            # Links are followed, within the bounds that hold for weights.
            shutil.copyfile(file_inside(origin, str(name), origin.name), folder / name)
