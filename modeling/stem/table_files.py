"""Finds the tables of a checkpoint in its safetensors files, to be mapped instead of loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from hf_efficient.errors import HFEError

# Arguments of `from_pretrained` that say which files of a repository are meant.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that choose files."""
    return {name: arguments[name] for name in _HUB_ARGUMENTS if name in arguments}


def find_tensors(source: Any, names: Iterable[str], **hub: Any) -> dict[str, Path]:
    """The safetensors file in which each tensor of a checkpoint lies.

    Args:
        source: local folder or Hub id.
        names: the tensors.
        hub: what `hub_arguments` keeps.

    Raises:
        HFEError: the checkpoint has no safetensors, or lacks a tensor.
    """
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        single = cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **hub)
        if single is None:
            raise HFEError(
                f"{source} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}",
                "only safetensors can be mapped from disk; save the model with save_pretrained",
            )
        with safe_open(single, "pt") as tensors:
            files = dict.fromkeys(tensors.keys(), Path(single))
    else:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        shards = {
            shard: Path(cached_file(source, shard, **hub))
            for shard in {weight_map.get(name) for name in names}
            if shard
        }
        files = {name: shards[shard] for name, shard in weight_map.items() if shard in shards}
    missing = [name for name in names if name not in files]
    if missing:
        raise HFEError(
            f"{source} lacks {missing[0]}, so it is not the STEM checkpoint that its configuration describes",
            "convert the stock model with `hf-efficient convert SOURCE OUTPUT --patch stem` and load OUTPUT",
        )
    return {name: files[name] for name in names}
