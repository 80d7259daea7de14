"""Names of a checkpoint's weight files: the safetensors files that `from_pretrained` would load."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_efficient.errors import HFEError
from hf_efficient.json_file import read_weight_map

_SHARD, _INDEX = ".safetensors", ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Files that `save_pretrained` writes of a model that is sharded over processes; a file may hold parts of tensors.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def weight_file_names(config: Mapping[str, Any] | None = None, variant: str | None = None) -> tuple[str, ...]:
    """Return the names of the weight file or its index to look for, in transformers' order: the first found is loaded.

    Args:
        config: fields of config.json; its field `transformers_weights`, if set, is the only name.
        variant: as for `from_pretrained`: `fp16` for `model.fp16.safetensors`.

    Raises:
        HFEError: `transformers_weights` is not the name of a safetensors file or index inside the folder.
    """
    named = None if config is None else config.get("transformers_weights")
    if named is None:
        names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        return names if variant is None else tuple(f".{variant}.".join(name.rsplit(".", 1)) for name in names)
    if not isinstance(named, str) or not named.endswith((_SHARD, _INDEX)):
        raise HFEError(
            f"transformers_weights in config.json is {named!r}, which is not the name of a safetensors file or index",
            "take the field out, or let it name the file with the weights",
        )
    return (_inside(named, "transformers_weights in config.json"),)


def shard_names(index: Path) -> list[str]:
    """Return the names of the files that an index lists, sorted, the order in which transformers reads them.

    If several of them have a tensor of the same name, the last one is used.

    Args:
        index: path of a `.safetensors.index.json`.

    Raises:
        HFEError: the index cannot be read, lists nothing, or lists a name that is not a safetensors file in its folder.
    """
    return sorted({_inside(name, index.name, _SHARD) for name in read_weight_map(index).values()})


def resolve_weight_files(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    *,
    variant: str | None = None,
    subfolder: str = "",
    name: str | None = None,
) -> list[Path]:
    """Return the paths of the safetensors files that `from_pretrained(folder)` loads, in the order of reading.

    A single file takes precedence over an index; shards that no index lists are not loaded.

    Args:
        folder: folder of the checkpoint.
        config: fields of its config.json.
        variant, subfolder: as for `from_pretrained`.
        name: name of the checkpoint in error messages; by default the folder's name.

    Raises:
        HFEError: the folder cannot be read or has no such file, a shard is missing, the weights are of an unsupported
            kind (pickle, or the files of a distributed model), the index is damaged, or the index or
            `transformers_weights` names a file outside the folder or one that is not safetensors.
    """
    directory, name = folder / subfolder, name or folder.resolve().name
    present = _file_names(directory)
    distributed = [file for file in present if _DISTRIBUTED.match(file)]
    if distributed:
        raise HFEError(
            f"{name} has the weights of a distributed model ({distributed[0]}), whose files may hold parts",
            "load it with transformers and save it again with save_pretrained, without distributed_checkpoint",
        )
    wanted = weight_file_names(config, variant)
    entry = next((directory / file for file in wanted if (directory / file).is_file()), None)
    if entry is None:
        raise _absent(name, wanted, present)
    if not entry.name.endswith(".json"):
        return [entry]
    files = [directory / shard for shard in shard_names(entry)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise HFEError(
            f"{entry.name} names {missing[0].name!r}, which is missing ({len(missing)} of {len(files)} files are)",
            "download the checkpoint again",
        )
    return files


def _inside(name: Any, origin: str, suffix: str = "") -> str:
    """Return `name` after a check that it is a relative path inside the checkpoint's folder.

    Args:
        name: the name, any value from a JSON file.
        origin: where it comes from, for the message.
        suffix: what it must end with.

    Raises:
        HFEError: it is not such a path.
    """
    if isinstance(name, str) and name.endswith(suffix) and name.isprintable():
        path = PurePosixPath(name.replace("\\", "/"))
        if not (path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name)):
            return name
        problem, remedy = "outside the checkpoint's folder", "do not use this checkpoint, or correct its index"
    else:
        problem, remedy = "not a safetensors file", "save the model with save_pretrained, which writes safetensors"
    raise HFEError(f"{origin} points to {name!r}, {problem}", remedy)


def _file_names(folder: Path) -> list[str]:
    """Return the sorted names in a folder.

    Raises:
        HFEError: the folder cannot be read.
    """
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise HFEError(f"the folder {folder.name!r} cannot be read ({error.strerror})", "check the path") from error


def _absent(name: str, wanted: tuple[str, ...], present: list[str]) -> HFEError:
    """Return the error for a checkpoint without weight files that can be loaded.

    Args:
        name: name of the checkpoint.
        wanted: names of the files of which one is needed.
        present: names in its folder. The message names the first pickle file (`training_args.bin` aside), or else up to
            three other `model.*` weight files.
    """
    pickles = [file for file in present if file.endswith(_PICKLES) and file != "training_args.bin"]
    if pickles:
        return HFEError(
            f"{name} holds its weights as pickle ({pickles[0]}), which can run any code when it is opened",
            "use a revision with safetensors, or load it where you trust it and save it again with save_pretrained",
        )
    others = [file for file in present if re.fullmatch(r"model\..*safetensors(\.index\..*json)?", file)]
    has = f", but {', '.join(others[:3])}" if others else ""
    return HFEError(
        f"{name} does not hold {' or '.join(wanted)}{has}",
        "name the folder of a whole checkpoint, and the variant where its files have one",
    )
