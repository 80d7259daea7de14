"""`hf-efficient export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_efficient.cli.options import Json, print_json
from hf_efficient.errors import UsageError


def command(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder, also one that training or a merge saved.")],
    output: Annotated[Path | None, typer.Argument(help="With --to: folder to write.")] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT", help="Write OUTPUT in the layout of another library; video: diffusers or original."
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="With --to: largest weight file, e.g. 5GB or 500MB.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --to: replace OUTPUT once the new one is complete.")
    ] = False,
    json: Json = False,
) -> None:
    """Write the code of this release into a checkpoint, so that it loads anywhere with trust_remote_code.

    Weights and tokenizer stay as they are. A model card that this package wrote is renewed. With --to, FOLDER stays as
    it is, and OUTPUT is the checkpoint as another library stores it.

    Example: hf-efficient export smollm-stem
    """
    if to is not None:
        if output is None:
            raise UsageError(
                f"--to {to} needs a folder to write", f"name it: hf-efficient export {folder} OUTPUT --to {to}"
            )
        _export_layout(folder, output, to, max_shard_size, overwrite, json)
        return
    if output is not None or overwrite:
        raise UsageError(f"{output or '--overwrite'} is for --to only", "add --to LAYOUT, or leave it out")
    _export_code(folder, json)


def _export_layout(folder: Path, output: Path, layout: str, max_shard_size: str, overwrite: bool, json: bool) -> None:
    """Write OUTPUT in another library's layout, and say so."""
    from hf_efficient.layout_export import export_layout

    written = export_layout(folder, output, layout, max_shard_size=max_shard_size, overwrite=overwrite)
    files = sorted(path.name for path in written.iterdir())
    if json:
        print_json({"folder": str(output), "layout": layout, "files": files})
    else:
        typer.echo(f"{output} has the {len(files)} files of the layout {layout}: {', '.join(files)}")


def _export_code(folder: Path, json: bool) -> None:
    """Write the code into the folder and renew its card, and say so."""
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
