"""Finds the tables of a checkpoint in its safetensors files, so that they can be mapped instead of loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils.hub import cached_file

from hf_efficient.errors import HFEError
from hf_efficient.modeling.decoder.weight_files import resolve_weight_files, shard_names, weight_file_names

# Arguments of `from_pretrained` that choose the files of a repository.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those of the keyword arguments of `from_pretrained` that choose the files of a repository."""
    return {name: arguments[name] for name in _HUB_ARGUMENTS if name in arguments}


def find_tensors(
    source: Any, names: Iterable[str], config: Mapping[str, Any], variant: str | None = None, **hub: Any
) -> dict[str, tuple[Path, str]]:
    """Return, for each tensor, the safetensors file that `from_pretrained` loads it from and its name in that file.

    Files of a Hub repository are downloaded if they are not in the cache.

    Args:
        source: local folder or Hub id.
        names: names of the tensors in the base model; the checkpoint may prefix them with ``model.``.
        config: fields of the configuration.
        variant: as for `from_pretrained`.
        hub: from `hub_arguments`.

    Raises:
        HFEError: the checkpoint has no safetensors, or lacks a tensor; and the errors of `resolve_weight_files`.

    Errors of transformers' download propagate, mostly as `OSError`.
    """
    found: dict[str, tuple[Path, str]] = {}
    for file in _weight_files(source, config, variant, hub):
        with safe_open(file, "pt") as tensors:
            # If several files have a tensor, the last one counts, as in transformers.
            found |= {name.removeprefix("model."): (file, name) for name in tensors.keys()}  # noqa: SIM118
    missing = [name for name in names if name not in found]
    if missing:
        raise HFEError(
            f"{source} lacks model.{missing[0]}, so it is not the STEM checkpoint that its configuration describes",
            "convert the stock model with `hf-efficient convert SOURCE OUTPUT --patch stem` and load OUTPUT",
        )
    return {name: found[name] for name in names}


def _weight_files(source: Any, config: Mapping[str, Any], variant: str | None, hub: dict[str, Any]) -> list[Path]:
    """Return the paths of the safetensors files that `from_pretrained` loads, downloaded if `source` is a Hub id.

    Arguments and errors as for `find_tensors`, without missing tensors.
    """
    if os.path.isdir(source):
        return resolve_weight_files(Path(source), config, variant=variant, subfolder=hub.get("subfolder") or "")
    names = weight_file_names(config, variant)
    for name in names:
        entry = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
        if entry is not None:
            shards = shard_names(Path(entry)) if name.endswith(".json") else [name]
            return [Path(cached_file(source, shard, **hub)) for shard in shards]
    raise HFEError(
        f"{source} has none of {', '.join(names)}",
        "only safetensors can be mapped from disk; save the model with save_pretrained",
    )
