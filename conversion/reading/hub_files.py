"""Downloads checkpoints from the Hub, and finds the Hub repository that local files come from."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, metadata_load, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers.utils import CONFIG_NAME

from hf_efficient.conversion.families.family import family_of_fields, model_folder
from hf_efficient.conversion.reading.checkpoint_files import read_config
from hf_efficient.conversion.reading.hub_errors import hub_errors
from hf_efficient.errors import HFEError, UsageError, error_text, hide_secret
from hf_efficient.modeling.decoder.weight_files import shard_names, weight_file_names

# Everything but weights: configuration, tokenizer, licence, card. They are downloaded first.
_SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model", "LICEN?E*", "NOTICE*", "COPYING*", "README.md"]


# The Hub id of a model (group 1), or the URL of its page.
_HUB_ID = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?(?!datasets/|spaces/)([\w-][\w.-]*/[\w-][\w.-]*)(?:/|/tree/[\w.-]+)?",
    re.ASCII,
)


def is_repo_id(location: str) -> bool:
    """True if `location` has the form of the id of a Hub repository. Does not access the Hub."""
    try:
        validate_repo_id(location)
    except HFValidationError:
        return False
    return True


def checked_token(token: str | None) -> str | None:
    """`token` unchanged; from this call on, error messages hide it.

    Raises:
        UsageError: it is empty or has characters that no Hub token has, which the error of a request would show.
    """
    hide_secret(token)
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise UsageError(
            "the Hub token is empty or holds a blank, a line break or another character that no token has",
            "copy it again from the page of your access tokens, or log in with `hf auth login`",
        )
    return token


def download_checkpoint(
    repo_id: str, *, revision: str | None, token: str | None, accept: Callable[[dict[str, Any]], None] | None = None
) -> Path:
    """Download the files of a checkpoint that a conversion reads; returns the snapshot's folder in the Hub's cache.

    Of the weights only the safetensors that the model's library would load are downloaded. If there are none, the
    folder has only the small files, unless the repository is found to have weights of another kind, which raises.

    Args:
        repo_id, revision, token: the repository.
        accept: called with the fields of config.json, if there is one, before weights are downloaded.

    Raises:
        HFEError: the repository cannot be read or the files cannot be stored (see `_snapshot`), its configuration or
            index is not valid (see `read_config` and `shard_names`), or it has pickle or GGUF files and no safetensors.
        UsageError: the token is malformed.
        Exception: whatever `accept` raises.
    """
    folder = _snapshot(repo_id, _SMALL_FILES, revision, token)
    # The same commit as the small files, even if the branch has moved on since.
    commit = repo_of_snapshot(folder)[1] or revision
    inside = model_folder(folder).relative_to(folder)
    fields = read_config(folder / inside, repo_id) if (folder / inside / CONFIG_NAME).is_file() else {}
    if accept is not None and fields:
        accept(fields)
    family = family_of_fields(fields)
    # In the order in which the model's library looks for them.
    for name in weight_file_names(fields) if family is None else family.weight_file_names(fields):
        path = inside / name
        if not (folder / path).is_file():
            folder = _snapshot(repo_id, [*_SMALL_FILES, path.as_posix()], commit, token)
        if (folder / path).is_file():
            if name.endswith(".json"):
                shards = [(inside / shard).as_posix() for shard in shard_names(folder / path)]
                folder = _snapshot(repo_id, [*_SMALL_FILES, *shards], commit, token)
            return folder
    with suppress(HfHubHTTPError, OfflineModeIsEnabled, OSError):
        names = HfApi(token=token).list_repo_files(repo_id, revision=commit)
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        if pickles:
            raise HFEError(
                f"{repo_id} holds its weights as pickle ({pickles[0]}), which can run any code when it is opened",
                "use a revision with safetensors",
            )
        ggufs = [name for name in names if name.lower().endswith(".gguf")]
        if ggufs:
            raise HFEError(
                f"{repo_id} holds GGUF files ({ggufs[0]}) and no safetensors",
                f"download one, `hf download {repo_id} {ggufs[0]} --local-dir .`, and name the file",
            )
    return folder


def download_tokenizer(repo_id: str, *, token: str | None) -> Path:
    """Download a repository's small files, which include the tokenizer; returns the snapshot's folder.

    Raises:
        HFEError: the repository cannot be read (see `hub_errors`), or the files cannot be stored, e.g. on a full disk.
        UsageError: the token is malformed.
    """
    return _snapshot(repo_id, _SMALL_FILES, None, token)


def _snapshot(repo_id: str, patterns: list[str], revision: str | None, token: str | None) -> Path:
    """Download the files that match `patterns`; returns the snapshot's folder in the Hub's cache.

    Raises:
        HFEError: the repository cannot be read (see `hub_errors`), or the files cannot be stored in the cache.
        UsageError: the token, or without one the token of the login, is malformed.
    """
    checked_token(token if token is not None else get_token())
    try:
        with hub_errors(repo_id, revision, or_folder=True):
            return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))
    except OSError as error:  # of the disk that holds the Hub's cache
        raise HFEError(f"downloading {repo_id} failed: {error_text(error)}", "check the Hub's cache folder") from error


def repo_of_snapshot(folder: Path) -> tuple[str | None, str | None]:
    """(repository id, commit) of a folder `models--ORG--NAME/snapshots/COMMIT` of the cache, else (None, None)."""
    match = re.fullmatch(r"models--(.+)", folder.parent.parent.name)
    if folder.parent.name != "snapshots" or match is None:
        return None, None
    return match[1].replace("--", "/"), folder.name


def gguf_names(metadata: dict[str, Any]) -> tuple[str | None, str | None]:
    """(Hub id, name) of the model in a GGUF file, each None if the metadata does not give it.

    The id is that of the model itself, or of what it was converted from, or of its only base model, in this order.
    """
    based_on_one = metadata.get("general.base_model.count") == 1
    keys = (
        *("general.repo_url", "general.source.huggingface.repository", "general.source.repo_url", "general.source.url"),
        *(("general.base_model.0.repo_url", "general.base_model.0.url") if based_on_one else ()),
    )
    matches = (_HUB_ID.fullmatch(value) for key in keys if isinstance(value := metadata.get(key), str))
    name = metadata.get("general.name")
    return next((match[1] for match in matches if match), None), name if isinstance(name, str) and name else None


def card_metadata(folder: Path) -> dict[str, str]:
    """`license` and `base_model` from the metadata of a folder's README.md, each if it is one string or a list of one.

    Empty if there is no README.md or its metadata is invalid.
    """
    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        header = metadata_load(card) or {}
    # A card with invalid metadata is ignored: the weights can still be converted.
    except Exception:
        return {}
    values = {key: header.get(key) for key in ("license", "base_model")}
    single = {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in values.items()}
    return {key: value for key, value in single.items() if isinstance(value, str)}
