"""Reads a repository of the Hub without downloading its weights, and checks access to it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, http_backoff, validate_repo_id

from hf_efficient.conversion.reading.hub_errors import hub_errors
from hf_efficient.conversion.reading.hub_files import checked_token
from hf_efficient.errors import HFEError, UsageError
from hf_efficient.hub.contents import FIRST_BYTES, may_be_part, size_limit
from hf_efficient.json_file import MAX_JSON_BYTES

# Files that are downloaded completely, since all of their content is verified.
_READ_WHOLE = (".json", ".py")
# Largest number of files in a repository; no checkpoint has more.
_MAX_FILES = 2_000


def check_repo_id(repo_id: str) -> None:
    """Raise `UsageError` unless `repo_id` has the form of the id of a Hub repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{repo_id!r} is not a repository id ({error})", "write it as OWNER/NAME") from None


def hub_token(token: str | None) -> str:
    """`token`, or the one that `hf auth login` stored; `HFEError` without any, `UsageError` if it is malformed."""
    token = checked_token(token if token is not None else get_token())
    if token is None:
        raise HFEError("there is no Hub token", "log in with `hf auth login`, set HF_TOKEN, or pass --token")
    return token


def check_access(repo_id: str, *, private: bool = True, token: str | None = None) -> None:
    """Ask the Hub whether the token may upload to `repo_id`; writes nothing.

    Args:
        repo_id: OWNER/NAME; it need not exist.
        private: whether the repository must be private.
        token: token that may write there; by default the one that `hf auth login` stored.

    Raises:
        UsageError: `repo_id` is no repository id or names no owner, or the token is malformed.
        HFEError: there is no token, it may not write there, the repository is public although `private` is True, or the
            Hub cannot be reached.
    """
    check_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise UsageError(f"{repo_id!r} names no owner", "write it as OWNER/NAME")
    token = hub_token(token)
    api = HfApi(token=token)
    with hub_errors(repo_id):
        account = api.whoami()
        try:
            is_private = bool(api.model_info(repo_id).private)
        except RepositoryNotFoundError:
            is_private = private
    names = [account.get("name"), *(org.get("name") for org in account.get("orgs") or [])]
    owner = repo_id.partition("/")[0]
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read" or owner not in names:
        raise HFEError(
            f"the token may not write to {repo_id}: it is "
            + ("for reading only" if role == "read" else f"of {', '.join(str(name) for name in names)}"),
            "pass --token, or log in with `hf auth login`, with a token that may write there",
        )
    check_privacy(repo_id, private=private, is_private=is_private)


def check_privacy(repo_id: str, *, private: bool, is_private: bool) -> None:
    """Raise `HFEError` if the upload should be `private` and the repository is public."""
    if private and not is_private:
        raise HFEError(
            f"the repository {repo_id} is public, and a private upload was asked for",
            "choose another repository, make this one private on its page, or allow a public one with --no-private",
        )


def download_headers(repo_id: str, folder: Path, revision: str | None, token: str | None) -> str:
    """Create a repository's files in the empty `folder`, at full size, with only those parts that `verify` reads.

    JSON and Python files are downloaded as a whole, unless they exceed `size_limit`; of a safetensors file the header,
    of any other the first bytes; the rest of a file is a hole. Of files whose names no checkpoint has nothing is
    downloaded. Returns the commit that was read.

    Raises:
        UsageError: the token is malformed.
        HFEError: the repository or revision cannot be read, it has more than 2,000 files, or it lists a file that is
            outside its folder or cannot be created.
    """
    checked_token(token if token is not None else get_token())
    api = HfApi(token=token)
    with hub_errors(repo_id, revision):
        commit = api.model_info(repo_id, revision=revision).sha
        listed = islice(api.list_repo_tree(repo_id, recursive=True, revision=commit), _MAX_FILES + 1)
        files = [file for file in listed if isinstance(file, RepoFile)]
        if len(files) > _MAX_FILES:
            raise HFEError(f"{repo_id} has more than {_MAX_FILES:,} files", "name the repository of a checkpoint")
        for file in files:
            path = PurePosixPath(file.path)
            if path.is_absolute() or ".." in path.parts:
                raise HFEError(f"{repo_id} lists the file {file.path!r}, outside itself", "do not use this repository")
            needed = _needed_bytes(hf_hub_url(repo_id, file.path, revision=commit), file, token)
            _write_sparse(folder / path, needed, file.size, repo_id)
    return str(commit)


def _needed_bytes(url: str, file: RepoFile, token: str | None) -> bytes:
    """The bytes at the start of a file that `verify` reads, downloaded from `url`; errors of the HTTP client pass."""
    if not may_be_part(file.path):
        return b""
    if file.path.endswith(_READ_WHOLE) and file.size <= size_limit(file.path):
        return _read_range(url, 0, file.size, token)
    if file.path.endswith(".safetensors"):
        length = int.from_bytes(_read_range(url, 0, min(8, file.size), token), "little")
        return _read_range(url, 0, min(8 + length, file.size, 8 + MAX_JSON_BYTES), token)
    return _read_range(url, 0, min(FIRST_BYTES, file.size), token)


def _write_sparse(target: Path, content: bytes, size: int, repo_id: str) -> None:
    """Create a file of `size` bytes that begins with `content`; the rest is a hole, which takes no disk space.

    Missing folders are created. `HFEError` if the file cannot be created or exists.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as out:
            out.write(content)
            out.truncate(size)
    # Names that are too long, hold a NUL, or are a file and a folder at once.
    except (OSError, ValueError) as error:
        name = ascii(target.name)[:80]
        raise HFEError(
            f"{repo_id} lists the file {name}, which cannot be created ({error})", "do not use this repository"
        ) from None


def _read_range(url: str, start: int, stop: int, token: str | None) -> bytes:
    """Download bytes `start` to `stop` (exclusive) of a file; raises the HTTP client's error for an error status."""
    if stop <= start:
        return b""
    headers = {**build_hf_headers(token=token), "Range": f"bytes={start}-{stop - 1}"}
    response = http_backoff("GET", url, headers=headers)
    response.raise_for_status()
    return response.content[: stop - start]
