"""`hf-efficient push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_efficient.cli.options import Json, Token, print_json


def command(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder, also one that training or a merge saved.")],
    repo_id: Annotated[str, typer.Argument(help="Hub repository, e.g. you/smollm-stem.")],
    private: Annotated[bool, typer.Option(help="Visibility of a new repository.")] = True,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.")] = None,
    commit_message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Verify a checkpoint, write its model card and upload it to the Hub, private by default.

    Example: hf-efficient push smollm-stem you/smollm-stem
    """
    from hf_efficient.hub.push import push

    result = push(folder, repo_id, private=private, revision=revision, commit_message=commit_message, token=token)
    if json:
        print_json(result.to_dict())
    else:
        typer.echo(f"Uploaded {folder} to {result.url} (commit {result.commit})")
        if result.left_out:
            shown, more = result.left_out[:5], len(result.left_out) - 5
            rest = f" and {more} more" if more > 0 else ""
            typer.echo(f"Left out, as no part of the model: {', '.join(ascii(name)[1:-1] for name in shown)}{rest}")
