"""Sorts the files of a checkpoint folder into those of the model and others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from hf_efficient.conversion.families.family import ModelFamily, companion_files
from hf_efficient.conversion.report import REPORT_NAME
from hf_efficient.conversion.writing.companion_files import is_licence
from hf_efficient.conversion.writing.known_tokenizer import TOKENIZER_JSON
from hf_efficient.hub.card import CARD
from hf_efficient.hub.weight_names import is_weight_file, weight_sets
from hf_efficient.json_file import MAX_JSON_BYTES, MAX_TOKENIZER_BYTES
from hf_efficient.modeling.base.saved_code import CODE_MANIFEST

_ALWAYS = (CONFIG_NAME, CODE_MANIFEST, REPORT_NAME, CARD)
_CODE_BYTES = 1 << 22
_TEMPLATE_BYTES = 1 << 20
# Number of bytes at the start of a file from which its format is recognised.
FIRST_BYTES = 1 << 12
# Files that the Trainer writes beside a model, and reads only when training is resumed from the folder.
_TRAINING = re.compile(
    r"training_args\.bin|trainer_state\.json|(optimizer(_\d+)?|scheduler)\.(pt|bin)|scaler\.pt|rng_state(_\d+)?\.pth"
    r"|(all|train|eval|test|predict)_results\.json|runs/([\w.-]+/)*events\.out\.tfevents\.[^/]+",
    re.ASCII,
)
# Files of git, and those that huggingface_hub writes beside a download.
_RECORDS = re.compile(r"\.git/.*|\.gitattributes|\.gitignore|\.cache/huggingface/.*", re.DOTALL)


@dataclass(frozen=True)
class FolderContents:
    """The files of a checkpoint folder by kind, each sorted by name.

    Attributes:
        model: files of the model: weights, configuration, tokenizer, code, report, card and licence. Only these are
            uploaded.
        training: files that the Trainer wrote beside the model, such as optimizer states.
        records: files of git and of huggingface_hub's downloads.
        foreign: all other files.
    """

    model: tuple[str, ...]
    training: tuple[str, ...]
    records: tuple[str, ...]
    foreign: tuple[str, ...]


def folder_contents(
    paths: Iterable[str], code_files: Collection[str], family: ModelFamily | None = None
) -> FolderContents:
    """Sort the files of a checkpoint folder.

    Args:
        paths: every file, relative to the folder, with slashes.
        code_files: names of the code files of the folder's architecture, `render_code(architecture).files`.
        family: its model family, whose companion files are part of the model; None if it is not known: all of them.
    """
    names = sorted(set(paths))
    weights = {name for weight_set in weight_sets(names) for name in weight_set.files}
    sorted_names: dict[str, list[str]] = {"model": [], "training": [], "records": [], "foreign": []}
    for name in names:
        if name in weights or name in code_files or _is_companion(name, family):
            kind = "model"
        elif _TRAINING.fullmatch(name):
            kind = "training"
        else:
            kind = "records" if _RECORDS.fullmatch(name) else "foreign"
        sorted_names[kind].append(name)
    return FolderContents(**{kind: tuple(found) for kind, found in sorted_names.items()})


def size_limit(name: str) -> int:
    """Largest size in bytes up to which a text file of this name is read."""
    if name.endswith(".py"):
        return _CODE_BYTES
    if name.endswith(".jinja"):
        return _TEMPLATE_BYTES
    return MAX_TOKENIZER_BYTES if name in TOKENIZER_JSON else MAX_JSON_BYTES


def may_be_part(name: str) -> bool:
    """True if a file of this name can be part of the model of some architecture."""
    code = name.endswith(".py") and name.rpartition("/")[0] in ("", "custom_generate")
    return is_weight_file(name) or code or _is_companion(name, None)


def _is_companion(name: str, family: ModelFamily | None) -> bool:
    """True for a file of a model of the family other than weights and code: configuration, tokenizer, card and so on.

    None stands for a family that is not known, which has the files of every one.
    """
    patterns = [*_ALWAYS, *(companion_files() if family is None else family.companion_files)]
    if family is None or family.generates:
        patterns.append(GENERATION_CONFIG_NAME)
    if family is None or family.reads_text:
        patterns.append(TOKENIZER_CONFIG_FILE)
    # `*` in the patterns must not match a slash.
    return is_licence(name) or any(
        fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns
    )
