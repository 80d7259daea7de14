"""Weight files by their names: a checkpoint may hold its weights several times, each time under another variant."""

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
        variant: as for `from_pretrained`; None for the plain names.
        single, index: name of the single file, and of the index of a sharded one.
        files: those of the set that are there: the single file alone, else index and shards.
        unused: index and shards beside a single file, which transformers does not read.
    """

    variant: str | None
    single: str
    index: str
    files: tuple[str, ...]
    unused: tuple[str, ...]


def weight_sets(names: Iterable[str]) -> list[WeightSet]:
    """The weights among the files of a folder, the plain ones first; names of other files are passed over."""
    by_variant: dict[str | None, list[str]] = {}
    for name in sorted(names):
        match = _FILE.fullmatch(name) or _INDEX.fullmatch(name)
        if match is not None:
            by_variant.setdefault(match["variant"], []).append(name)
    sets = []
    for variant, found in sorted(by_variant.items(), key=lambda item: item[0] or ""):
        single, index = weight_file_names(variant=variant)
        files = (single,) if single in found else tuple(found)
        sets.append(WeightSet(variant, single, index, files, tuple(set(found) - set(files))))
    return sets


def is_weight_file(name: str) -> bool:
    """True for the name of a file or an index that can be part of some `WeightSet`."""
    return is_index(name) or _FILE.fullmatch(name) is not None


def is_index(name: str) -> bool:
    """True for the name of an index of sharded weights."""
    return _INDEX.fullmatch(name) is not None
