"""`hf-efficient inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_efficient.cli.options import Json, Revision, Token, show_report


def command(
    source: Annotated[str, typer.Argument(help="Hub id, local folder, or a local .gguf file.")],
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Show a checkpoint's architecture, parameters and bytes without loading it.

    Example: hf-efficient inspect smollm-stem
    """
    from hf_efficient.inspection import inspect

    report = inspect(source, revision=revision, token=token)
    show_report(report, json)
