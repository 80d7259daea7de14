"""Recognises weight files by their names; a checkpoint may have its weights several times, as different variants."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hf_efficient.modeling.decoder.weight_files import weight_file_names

_VARIANT = r"(?:\.(?P<variant>\w[\w-]*?))?"
_FILE = re.compile(rf"model{_VARIANT}(?P<shard>-\d{{5}}-of-\d{{5}})?\.safetensors", re.ASCII)
_INDEX = re.compile(rf"model\.safetensors\.index{_VARIANT}\.json", re.ASCII)


@dataclass(frozen=True)
class WeightSet:
    """The weights that `from_pretrained(folder, variant=…)` loads.

    Attributes:
        variant: the argument of `from_pretrained`; None for names without a variant.
        single, index: name of the single file, and of the index of a sharded one.
        files: existing files of the set that transformers reads: the single file, or else index and shards.
        unused: index and shards next to a single file, which transformers does not read.
    """

    variant: str | None
    single: str
    index: str
    files: tuple[str, ...]
    unused: tuple[str, ...]


def weight_sets(names: Iterable[str]) -> list[WeightSet]:
    """The sets of weights among the file `names` of a folder, that without a variant first; other names are ignored."""
    by_variant: dict[str | None, list[str]] = {}
    for name in sorted(names):
        match = _FILE.fullmatch(name) or _INDEX.fullmatch(name)
        if match is not None:
            by_variant.setdefault(match["variant"], []).append(name)
    sets = []
    for variant, members in sorted(by_variant.items(), key=lambda item: item[0] or ""):
        single, index = weight_file_names(variant=variant)
        files = (single,) if single in members else tuple(members)
        sets.append(WeightSet(variant, single, index, files, tuple(set(members) - set(files))))
    return sets


def is_weight_file(name: str) -> bool:
    """True for the name of a file or an index that can be part of some `WeightSet`."""
    return is_index(name) or _FILE.fullmatch(name) is not None


def is_index(name: str) -> bool:
    """True for the name of an index of sharded weights."""
    return _INDEX.fullmatch(name) is not None
