"""A repository of the Hub, seen without downloading its weights; and the Hub's errors in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, http_backoff, validate_repo_id

from hf_efficient.conversion.reading.hub_files import checked_token
from hf_efficient.errors import HFEError, UsageError

# Read whole, since their content is verified. Of any other file the first bytes tell what it is.
_READ_WHOLE = (".json", ".py")
_LARGEST_WHOLE = 1 << 28
_FIRST_BYTES = 16


def check_repo_id(repo_id: str) -> None:
    """Raise `UsageError` for what cannot be the id of a Hub repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{repo_id!r} is not a repository id ({error})", "write it as OWNER/NAME") from None


def fetch_skeleton(repo_id: str, folder: Path, revision: str | None, token: str | None) -> str:
    """Lay a repository out in the empty `folder`: each file at its true size, but only what `verify` reads is fetched.

    JSON and Python files are whole; a safetensors file has its header, any other file its first bytes, and the rest is
    a hole. Returns the commit that was read.
    """
    checked_token(token if token is not None else get_token())
    api = HfApi(token=token)
    with hub_errors(repo_id, revision):
        commit = api.model_info(repo_id, revision=revision).sha
        files = [f for f in api.list_repo_tree(repo_id, recursive=True, revision=commit) if isinstance(f, RepoFile)]
        for file in files:
            path = PurePosixPath(file.path)
            if path.is_absolute() or ".." in path.parts:
                raise HFEError(f"{repo_id} lists the file {file.path!r}, outside itself", "do not use this repository")
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            url = hf_hub_url(repo_id, file.path, revision=commit)
            with target.open("wb") as out:
                out.write(_needed_bytes(url, file, token))
                out.truncate(file.size)
    return str(commit)


def _needed_bytes(url: str, file: RepoFile, token: str | None) -> bytes:
    if file.path.endswith(_READ_WHOLE):
        if file.size > _LARGEST_WHOLE:
            raise HFEError(f"{file.path} has {file.size} bytes, too many for such a file", "inspect it by hand")
        return _read_range(url, 0, file.size, token)
    if file.path.endswith(".safetensors"):
        length = int.from_bytes(_read_range(url, 0, min(8, file.size), token), "little")
        return _read_range(url, 0, min(8 + length, file.size, _LARGEST_WHOLE), token)
    return _read_range(url, 0, min(_FIRST_BYTES, file.size), token)


def _read_range(url: str, start: int, stop: int, token: str | None) -> bytes:
    if stop <= start:
        return b""
    headers = {**build_hf_headers(token=token), "Range": f"bytes={start}-{stop - 1}"}
    response = http_backoff("GET", url, headers=headers)
    response.raise_for_status()
    return response.content[: stop - start]


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn the errors of huggingface_hub into one clear line each."""
    try:
        yield
    except GatedRepoError as error:
        raise HFEError(f"the repository {repo_id} is gated", "ask for access on its page and pass --token") from error
    except RevisionNotFoundError as error:
        raise HFEError(f"the repository {repo_id} has no revision {revision!r}", "check --revision") from error
    except RepositoryNotFoundError as error:
        raise HFEError(
            f"there is no repository {repo_id} that you may see",
            "check the name; a private repository needs --token or `hf auth login`",
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise HFEError(
                f"the Hub refused access to {repo_id} (status {status})",
                "pass --token, or log in with `hf auth login`, with a token that may write there",
            ) from error
        raise HFEError(f"the Hub answered {_one_line(error)} for {repo_id}", "try again later") from error
    except RuntimeError as error:
        # huggingface_hub wraps the failure of a large file's upload.
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise HFEError(f"the upload to {repo_id} failed: {_one_line(error.__cause__)}", "push again") from error
    except OfflineModeIsEnabled as error:
        raise HFEError(f"{repo_id} cannot be reached: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise HFEError(f"the Hub cannot be reached for {repo_id}: {_one_line(error)}", "check the network") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
