"""Turns the errors of huggingface_hub into `HFEError` with one line that names the fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_efficient.errors import HFEError, error_text


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None, *, or_folder: bool = False) -> Iterator[None]:
    """Context: errors inside of access, HTTP and connection, and of a failed upload, become `HFEError`.

    Among them are Python's ConnectionError and TimeoutError. Other errors pass through, also HFValidationError, which
    huggingface_hub raises for a malformed repository id.

    Args:
        repo_id, revision: the repository, for the messages.
        or_folder: True if `repo_id` could also have been a local folder and the Hub's cache is used when the Hub cannot
            be reached, which the messages then say.
    """
    no_folder = f"there is no local folder {repo_id}" if or_folder else ""
    try:
        yield
    except GatedRepoError as error:
        raise HFEError(f"the repository {repo_id} is gated", "ask for access on its page and pass --token") from error
    except RevisionNotFoundError as error:
        raise HFEError(f"the repository {repo_id} has no revision {revision!r}", "check --revision") from error
    except RepositoryNotFoundError as error:
        problem = f"there is no repository {repo_id} that you may read"
        raise HFEError(
            f"{no_folder} and no Hub repository of that name that you may read" if or_folder else problem,
            "check the name; a private repository needs --token or `hf auth login`",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if not or_folder:
            raise HFEError(f"{repo_id} cannot be reached: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE") from error
        at = f" at revision {revision}" if revision else ""
        raise HFEError(
            f"{no_folder}, the Hub cannot be reached, and its cache does not hold {repo_id}{at}",
            "check the network, unset HF_HUB_OFFLINE, or name a local folder",
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise HFEError(
                f"the Hub refused access to {repo_id} (status {status})",
                "pass --token, or log in with `hf auth login`, with a token that has access",
            ) from error
        raise HFEError(f"the Hub answered {_cause(error)} for {repo_id}", "try again later") from error
    except RuntimeError as error:
        # huggingface_hub wraps the failure of a large file's upload.
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise HFEError(f"the upload to {repo_id} failed: {_cause(error.__cause__)}", "push again") from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise HFEError(f"the Hub cannot be reached for {repo_id}: {_cause(error)}", "check the network") from error


def _cause(error: Exception) -> str:
    """The error's message in one line, or the name of its class if it has none."""
    return error_text(error) or type(error).__name__
