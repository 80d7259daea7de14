"""`hf-efficient export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_efficient.cli.options import Json, print_json


def command(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder, also one that training or a merge saved.")],
    json: Json = False,
) -> None:
    """Write the code of this release into a checkpoint, so that it loads anywhere with trust_remote_code.

    Weights and tokenizer stay as they are. A model card that this package wrote is renewed.

    Example: hf-efficient export smollm-stem
    """
    from hf_efficient import __version__
    from hf_efficient.environment import TESTED_TRANSFORMERS
    from hf_efficient.hub.card import CARD, write_card
    from hf_efficient.hub.export import export

    exported = export(folder)
    if (folder / CARD).exists():
        write_card(folder)
    oldest, newest = TESTED_TRANSFORMERS
    if json:
        print_json({"folder": str(folder), "version": __version__, "files": sorted(exported.files)})
    else:
        typer.echo(
            f"{folder} has the {len(exported.files)} code files of hf-efficient {__version__}, tested with "
            f"transformers {oldest} to {newest}"
        )
