"""`hf-efficient`: each subcommand is a file of this folder, imported when it is called.

Exit status 0: done; 2: a wrong argument; 1: anything found later; 130: interrupted.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from transformers.utils.logging import disable_progress_bar
from typer.core import TyperGroup

from hf_efficient.errors import HFEError, one_line, redact

# Subcommand -> its help in the overview. The module of the same name in this folder is imported when it is called.
SUBCOMMANDS = {
    "convert": "Convert a stock checkpoint to a patched architecture.",
    "inspect": "Show a checkpoint's architecture, parameters and bytes without loading it.",
    "evaluate": "Measure a checkpoint's loss on held-out text, alone or compared with a reference.",
    "generate": "Generate text from a prompt.",
    "serve": "Serve a checkpoint over HTTP, through transformers.",
    "verify": "Compare a checkpoint with what the installed release writes, its code byte by byte.",
    "export": "Write the code of this release into a checkpoint.",
    "push": "Verify a checkpoint and upload it to the Hub.",
    "demo": "Convert, evaluate and run a small real model.",
    "bench": "Run a benchmark of the source tree.",
    "env": "Show versions, the GPU, and the backend each kernel would use.",
}


class LazyGroup(TyperGroup):
    """Imports a subcommand's module only when that subcommand runs or shows its own help."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the subcommands, without importing them."""
        return list(SUBCOMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the subcommand's module and return its command; None for an unknown name."""
        if cmd_name not in SUBCOMMANDS:
            return None
        module = importlib.import_module(f"hf_efficient.cli.{cmd_name}")
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name, context_settings=getattr(module, "CONTEXT_SETTINGS", None))(module.command)
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the overview of the subcommands from `SUBCOMMANDS`, without importing them."""
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
    """Entry point: run the command line (`arguments`, by default those of the process).

    Always raises `SystemExit` with the exit status; an error is printed on standard error, not raised.
    """
    given = sys.argv[1:] if arguments is None else arguments
    # --debug is taken before and after the subcommand.
    debug, arguments = "--debug" in given, [a for a in given if a != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names and generated text may hold characters that the terminal's encoding does not have.
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        # In a log file, progress bars of transformers and the Hub would be thousands of carriage returns.
        disable_progress_bar()
    try:
        status = app(arguments, prog_name="hf-efficient", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        status = 130
    except BrokenPipeError:
        # The reader closed the pipe. Python flushes stdout again at exit, so it is redirected.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        status = _fail(error, debug)
    sys.exit(status or 0)


def _fail(error: Any, debug: bool) -> int:
    """Print the error as one line on standard error, with `debug` after its traceback; returns the exit status."""
    if debug:
        typer.echo(redact("".join(traceback.format_exception(error))), err=True)
    kind, hint, status = "error", "", 1
    if isinstance(error, HFEError):
        message, status = str(error), error.exit_code
    elif hasattr(error, "show") and hasattr(error, "exit_code"):
        # A wrong argument. The class is click's or Typer's own copy of it, by Typer's version.
        status = error.exit_code
        message = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return status
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
    elif isinstance(error, OSError) and error.strerror:
        # A refusal by the operating system is for the user to fix, so no traceback is offered.
        message = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    elif isinstance(error, MemoryError):
        message = "this machine has too little memory for it"
    else:
        kind, message, hint = f"error ({type(error).__name__})", str(error), " (--debug shows the traceback)"
    shown = one_line(" ".join(f"{kind}: {message}".split()))
    typer.echo(shown + hint, err=True)
    return status
