"""Arguments and options that several subcommands share, and the flags that are generated from a patch's fields."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
from collections.abc import Callable
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from hf_efficient.conversion.reading.hub_files import checked_token
from hf_efficient.errors import UsageError
from hf_efficient.json_file import finite_or_null
from hf_efficient.registry import patch_classes

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")]
Token = Annotated[
    str | None,
    typer.Option(help="Hub access token; by default the one you logged in with.", callback=checked_token),
]
Device = Annotated[str, typer.Option(help="Device that computes, e.g. cpu or cuda.")]
Text = Annotated[
    str | None,
    typer.Option(help="Text to measure on: FILE.jsonl, FILE.txt or a data set id. Default: a built-in sample."),
]


def print_json(result: dict[str, Any]) -> None:
    """Print `result` as indented JSON on standard output; null stands for numbers that are not finite."""
    typer.echo(json.dumps(finite_or_null(result), indent=2, allow_nan=False))


def show_report(report: Any, json: bool) -> None:
    """Print a report on standard output: its `to_dict` as JSON, or its `table` for a terminal."""
    if json:
        print_json(report.to_dict())
    else:
        typer.echo(report.table())


def _flag_type(hint: Any) -> Any:
    """The type that the command line parses for a field: bool, int, float, or a string that the patch itself reads."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    given = [m for m in members if m is not type(None)]
    if len(given) == 1 and given[0] in (bool, int, float, str):
        return given[0]
    return str


def with_patch_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` an option `--<patch>-<field>` for every field of every patch, passed on as keyword arguments.

    The keyword of a field is `<patch>_<field>`, and its value None if the option was not given.
    """
    signature = inspect.signature(command)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    hints = get_type_hints(command, include_extras=True)
    parameters = [p.replace(annotation=hints[p.name]) for p in parameters]
    for patch, cls in patch_classes().items():
        types_of = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            flag = f"--{patch}-{field.name.replace('_', '-')}"
            text = field.metadata.get("help", "")
            if not isinstance(field.default, bool) and field.default is not None:
                text = f"{text}  [default: {field.default}]".strip()
            flag_type = _flag_type(types_of[field.name])
            names = (f"{flag}/--no-{flag[2:]}",) if flag_type is bool else (flag,)
            annotation = Annotated[flag_type | None, typer.Option(*names, help=text, show_default=False)]  # type: ignore[valid-type]
            name = f"{patch}_{field.name}"
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            )

    def wrapped(**arguments: Any) -> None:
        command(**arguments)

    wrapped.__doc__ = command.__doc__
    wrapped.__name__ = command.__name__
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def build_patches(names: list[str], fields: dict[str, Any]) -> list[Any]:
    """Create the patches that `--patch` named, with their options, in this order; an empty list for `none`.

    Args:
        names: values of `--patch`; `none` stands for no patch.
        fields: `<patch>_<field>` -> value of every flag of a patch; None if it was not given.

    Raises:
        UsageError: a patch is unknown or repeated, `none` is combined with another, an option belongs to a patch that
            is not named, or a patch rejects an option.
    """
    known = patch_classes()
    unknown = [n for n in names if n not in known and n != "none"]
    if unknown:
        raise UsageError(f"--patch {unknown[0]} is not known", f"choose from {', '.join([*known, 'none'])}")
    if len(set(names)) != len(names) or ("none" in names and len(names) > 1):
        raise UsageError(f"--patch {' --patch '.join(names)} contradicts itself", "name each patch once, `none` alone")
    given = {key: value for key, value in fields.items() if value is not None}
    for key in given:
        owner = next(patch for patch in known if key.startswith(f"{patch}_"))
        if owner not in names:
            raise UsageError(
                f"--{key.replace('_', '-')} belongs to the patch {owner}, which --patch does not name",
                f"add --patch {owner}",
            )
    return [
        known[name](**{key.removeprefix(f"{name}_"): v for key, v in given.items() if key.startswith(f"{name}_")})
        for name in names
        if name != "none"
    ]
