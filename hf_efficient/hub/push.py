"""Publishes a checkpoint: verifies it, writes its model card, uploads it."""

from __future__ import annotations

import glob
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from hf_efficient import __version__
from hf_efficient.conversion.reading.hub_errors import hub_errors
from hf_efficient.errors import UsageError
from hf_efficient.hub.card import CARD, write_card
from hf_efficient.hub.repository import check_privacy, check_repo_id, hub_token
from hf_efficient.hub.verify import verify_upload

# Code and weights of an earlier checkpoint in the same repository. The commit deletes those that it does not write.
_REPLACED = ("*.py", "model*.safetensors", "model.safetensors.index*.json")


@dataclass(frozen=True)
class PushResult:
    """Where a checkpoint was published.

    Attributes:
        repo_id: the repository, OWNER/NAME.
        url: the repository's page.
        commit: the commit to pin as `revision`.
        commit_url: the commit's page.
        private: whether the repository is private.
        card: `written` if README.md was generated, `kept` if it is the user's own.
        left_out: files of the folder that are not part of the model, such as optimizer states; not uploaded.
    """

    repo_id: str
    url: str
    commit: str
    commit_url: str
    private: bool
    card: str
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return asdict(self)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> PushResult:
    """Verify the checkpoint in `folder`, write its model card, and upload it in one commit.

    Only files of the model are verified and uploaded; optimizer states, editor files and the like are not. Code and
    weights of an earlier checkpoint in the same repository are replaced. An edited README.md is uploaded as it is.

    Args:
        folder: the checkpoint.
        repo_id: OWNER/NAME; created when it does not exist.
        private: whether the repository must be private. An existing one is never made public or private.
        token: token that may write there; by default the one that `hf auth login` stored.
        revision: branch to upload to, created when it does not exist; by default the main one.
        commit_message: by default names the architecture and the release.

    Raises:
        UsageError: `folder` is no folder, `repo_id` is no repository id, or the token is malformed.
        HFEError: the checkpoint does not pass verification, there is no token, the repository is public although
            `private` is True, access is denied, or the Hub cannot be reached. No file is uploaded then, but the
            repository or branch may have been created, and the card written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", "name the folder that the conversion wrote")
    check_repo_id(repo_id)
    report, files = verify_upload(folder)
    report.raise_if_not_ok()
    api = HfApi(token=hub_token(token), library_name="hf-efficient", library_version=__version__)
    with hub_errors(repo_id, revision):
        is_private = _make_repository(api, repo_id, private)
        card = write_card(folder, repo_id=repo_id)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            # By name, since other files of the folder may hold secrets.
            allow_patterns=[glob.escape(name) for name in {*files, CARD}],
            revision=revision,
            commit_message=commit_message or f"{report.model_type} checkpoint, hf-efficient {__version__}",
            delete_patterns=list(_REPLACED),
        )
    return PushResult(
        repo_id=repo_id,
        url=commit.repo_url.url,
        commit=commit.oid,
        commit_url=commit.commit_url,
        private=is_private,
        card=card,
        left_out=report.not_part,
    )


def _make_repository(api: HfApi, repo_id: str, private: bool) -> bool:
    """Create the repository unless it exists; returns whether it is private. `HFEError`: see `check_privacy`."""
    try:
        is_private = bool(api.model_info(repo_id).private)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private, exist_ok=True)
        is_private = bool(api.model_info(repo_id).private)
    check_privacy(repo_id, private=private, is_private=is_private)
    return is_private
