"""`hf-efficient`: one subcommand a file.

Exit status 0: done; 2: a wrong argument; 1: anything found later; 130: interrupted.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_efficient.errors import HFEError

# Subcommand -> its help in the overview. The module of the same name in this folder is imported when it is called.
SUBCOMMANDS = {
    "convert": "Convert a stock checkpoint to a patched architecture.",
    "inspect": "Show a checkpoint's architecture, parameters and bytes without loading it.",
    "evaluate": "Measure a checkpoint's loss on held-out text, alone or against a reference.",
    "generate": "Generate text from a prompt.",
    "verify": "Compare a checkpoint's code with the installed release, byte by byte.",
    "push": "Verify a checkpoint and upload it to the Hub.",
    "demo": "Convert, evaluate and run a small real model.",
    "bench": "Run a benchmark of the source tree.",
    "env": "Show versions, the GPU, and the backend each kernel would take.",
}


class LazyGroup(TyperGroup):
    """Imports a subcommand's module only when that subcommand runs or shows its own help."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in SUBCOMMANDS:
            return None
        module = importlib.import_module(f"hf_efficient.cli.{cmd_name}")
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name)(module.command)
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUBCOMMANDS.items()))


app = typer.Typer(cls=LazyGroup, add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Patched model architectures for the Hugging Face stack.

    A first conversion: hf-efficient convert HuggingFaceTB/SmolLM2-135M-Instruct smollm-stem --patch stem
    """


def run(arguments: list[str] | None = None) -> None:
    """Entry point: run the command line and leave with its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    # --debug is taken before and after the subcommand.
    debug, arguments = "--debug" in given, [a for a in given if a != "--debug"]
    try:
        status = app(arguments, standalone_mode=False)
    except HFEError as error:
        status = _fail(error, error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        status = 130
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            # A wrong argument. The class is click's or Typer's own copy of it, by Typer's version.
            error.show()
            status = error.exit_code
        else:
            status = _fail(error, 1, debug)
    sys.exit(status or 0)


def _fail(error: Exception, status: int, debug: bool) -> int:
    """Print the error as one line, with --debug after its traceback."""
    if debug:
        traceback.print_exception(error)
    expected = isinstance(error, HFEError)
    kind = "error" if expected else f"error ({type(error).__name__})"
    hint = "" if expected else " (--debug shows the traceback)"
    typer.echo(f"{kind}: {' '.join(str(error).split())}{hint}", err=True)
    return status
