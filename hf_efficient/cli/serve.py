"""`hf-efficient serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_efficient.errors import HFEError

# All further options, --help included, are passed to `transformers serve`.
CONTEXT_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def command(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="Folder of a checkpoint, or its repository on the Hub.")],
) -> None:
    """Serve a checkpoint over HTTP, as `transformers serve` does, with this package's code.

    Options are those of `transformers serve`.

    Example: hf-efficient serve ./smollm-stem --port 8000 --continuous-batching
    """
    from transformers.cli.transformers import app

    try:
        app(["serve", checkpoint, *context.args], standalone_mode=False)
    except ImportError as error:
        raise HFEError(
            "transformers cannot serve here: packages for serving are missing", "pip install 'transformers[serving]'"
        ) from error
