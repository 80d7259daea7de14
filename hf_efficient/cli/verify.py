"""`hf-efficient verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_efficient.cli.options import Json, Revision, Token, show_report


def command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or Hub id.")],
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Compare a checkpoint with what the installed release writes, its code byte by byte, before you trust it.

    Example: hf-efficient verify smollm-stem
    """
    from hf_efficient.hub.verify import verify

    report = verify(checkpoint, revision=revision, token=token)
    show_report(report, json)
    if not report.ok:
        raise typer.Exit(1)
