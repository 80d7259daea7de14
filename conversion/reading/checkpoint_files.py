"""Finds the files of a checkpoint folder that transformers would load: configuration and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.configuration_utils import get_configuration_file
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from hf_efficient.conversion.reading.safetensors_reader import SafetensorsReader
from hf_efficient.errors import HFEError
from hf_efficient.json_file import is_file_name, read_json
from hf_efficient.modeling.decoder.weight_files import resolve_weight_files, weight_file_names


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The fields of a checkpoint's configuration, from the file that the installed transformers would read.

    `configuration_files` in config.json names files for versions of transformers: config.4.0.0.json serves 4.0.0 and
    later ones.

    Args:
        folder: of the checkpoint.
        name: of the checkpoint in error messages.

    Raises:
        HFEError: there is no configuration, it cannot be read or `file_inside` rejects it, `configuration_files` is
            not a list of file names with versions, or the folder holds an adapter.
    """
    has_config = (folder / CONFIG_NAME).is_file()
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise HFEError(
            f"{name} holds an adapter beside its weights ({ADAPTER_CONFIG_NAME}), which transformers would load too"
            if has_config
            else f"{name} is an adapter, not a model",
            "merge it (PeftModel.merge_and_unload) and save the result, or remove its files"
            if has_config
            else "merge it into its base model (PeftModel.merge_and_unload), save that and name its folder",
        )
    if not has_config:
        ggufs = sorted(path.name for path in folder.glob("*") if path.suffix.lower() == ".gguf")
        if ggufs:
            raise HFEError(
                f"{name} has no {CONFIG_NAME}, but the file {ggufs[0]}", f"name the file: {folder / ggufs[0]}"
            )
        weight_files(folder, {}, name)  # a folder of pickles has a better message
        raise HFEError(f"{name} has no {CONFIG_NAME}", "name the folder of a whole checkpoint")
    fields = read_json(file_inside(folder, CONFIG_NAME, name))
    file_names = fields.get("configuration_files")
    if "configuration_files" not in fields:
        return fields
    if not isinstance(file_names, list) or not all(is_file_name(each) for each in file_names):
        raise HFEError(
            f"configuration_files in {CONFIG_NAME} must be a list of file names", "correct or remove the field"
        )
    try:
        chosen = get_configuration_file(file_names)
    except ValueError as error:  # raised by packaging for an invalid version
        raise HFEError(
            f"configuration_files in {CONFIG_NAME} are not named by versions ({error})", "correct it"
        ) from error
    return fields if chosen == CONFIG_NAME else read_json(file_inside(folder, chosen, CONFIG_NAME))


def weight_files(folder: Path, fields: dict[str, Any], name: str) -> list[Path]:
    """The safetensors files that `from_pretrained(folder)` loads, none of which lies outside the folder.

    Args:
        folder: of the checkpoint.
        fields: of its configuration.
        name: of the checkpoint in error messages.

    Raises:
        HFEError: there are none, or one is missing or outside (see `file_inside`); an index cannot be read; the field
            `transformers_weights` is wrong; or the weights are pickles or those of a distributed model.
    """
    entry = next((each for each in weight_file_names(fields) if (folder / each).is_file()), None)
    if entry is not None and entry.endswith(".json"):
        file_inside(folder, entry, name)  # raises where the index is a link out of the folder
    files = resolve_weight_files(folder, fields, name=name)
    return [file_inside(folder, str(path.relative_to(folder)), entry or name) for path in files]


def open_folder_reader(folder: Path) -> SafetensorsReader:
    """A reader of the safetensors weights of a folder, in one file or sharded; config.json may be missing.

    Raises:
        HFEError: config.json cannot be read, or as for `weight_files` and `SafetensorsReader`.
    """
    fields = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    return SafetensorsReader(weight_files(folder, fields, folder.name))


def file_inside(folder: Path, name: Any, origin: str) -> Path:
    """`folder / name`, checked to be an existing file inside the folder or one of its subfolders.

    A symbolic link may lead out of the folder only to the blobs of the Hub's cache, whose snapshots consist of links.

    Args:
        folder: of the checkpoint.
        name: path relative to it, as a file of the checkpoint gives it.
        origin: the file or checkpoint that names it, for the message.

    Raises:
        HFEError: `name` is not a relative path (see `is_file_name`) or has the part `..`; it leads outside the folder
            through a link, or is part of a loop of links; or there is no such file.
    """
    if not is_file_name(name) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise HFEError(
            f"{origin} points to {name!r}, outside the checkpoint's folder; shards are named by paths inside it",
            "do not use this checkpoint, or correct its index",
        )
    path, root = folder / name, folder.resolve()
    # The checkpoint may be a folder of a snapshot, such as `transformer`.
    snapshots = next((place for place in (root.parent, root.parent.parent) if place.name == "snapshots"), None)
    allowed = [root] if snapshots is None else [root, snapshots.parent / "blobs"]
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # by Python's version
        raise HFEError(f"{name} is a loop of symbolic links", "copy the file into the folder") from error
    if not any(target.is_relative_to(place) for place in allowed):
        raise HFEError(
            f"{name} is a link that leads outside the checkpoint's folder",
            "copy the file into the folder, or name the folder that holds it",
        )
    if not path.is_file():
        raise HFEError(f"{origin} names {name}, which is missing", "download the checkpoint again")
    return path
