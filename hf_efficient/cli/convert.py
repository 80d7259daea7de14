"""`hf-efficient convert`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_efficient.cli.options import Device, Json, Revision, Token, build_patches, show_report, with_patch_options
from hf_efficient.errors import UsageError
from hf_efficient.logging import hide_reported_warnings


@with_patch_options
def command(
    source: Annotated[
        str,
        typer.Argument(
            help="Hub id, local folder (of an architecture's own training code too), or a local .gguf file."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write; it must not exist, or be empty.")],
    patch: Annotated[
        list[str] | None,
        typer.Option(help="Patch to apply; repeat it to combine patches. `none` moves the model unchanged."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (the source's; GGUF gives float32), float32, bfloat16, float16.")
    ] = "auto",
    revision: Revision = None,
    token: Token = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, e.g. 5GB or 500MB.")] = "5GB",
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a tokenizer, for a source without one.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Calibration text: FILE.jsonl, FILE.txt or a data set id. Default: a built-in sample."),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of calibration text.")] = 18432,
    evaluate: Annotated[bool, typer.Option(help="Measure the loss and compare it with the source's.")] = True,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the source, for the model card.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence for the card; by default the source's.")] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO_ID", help="Upload OUTPUT at the end, to a private repository unless it exists."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted conversion.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUTPUT once the new one is complete.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, disk and memory; write and measure nothing.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --dry-run: measure what is chosen by measurement, such as layers.")
    ] = False,
    json: Json = False,
    **patch_fields: Any,
) -> None:
    """Convert a stock checkpoint to a patched architecture.

    OUTPUT is a folder that `from_pretrained(OUTPUT, trust_remote_code=True)` loads anywhere, even without this package.

    Example: hf-efficient convert HuggingFaceTB/SmolLM2-135M-Instruct smollm-stem --patch stem --stem-layers 1,4,7
    """
    from hf_efficient.conversion.families.family import family_of
    from hf_efficient.convert_checkpoint import convert

    if not patch:
        raise UsageError(
            "no --patch was given", "name one, e.g. --patch stem, or --patch none to move the model unchanged"
        )
    hide_reported_warnings()
    report = convert(
        source,
        output,
        build_patches(patch, patch_fields),
        dtype=dtype,
        revision=revision,
        token=token,
        device=device,
        seed=seed,
        max_shard_size=max_shard_size,
        base_model=base_model,
        license=license,
        tokenizer=tokenizer,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        evaluate=evaluate,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
        measure=measure,
        push_to_hub=push_to_hub,
        progress=not json,
    )
    show_report(report, json)
    if not json and not dry_run:
        family = family_of(report.model_type)
        folder = shlex.quote(str(output))
        steps = [f'generate {folder} "Hello"' if family is not None and family.generates else f"inspect {folder}"]
        if report.evaluation is not None or not evaluate:  # Neither: the model cannot be measured on text.
            steps.append(f"evaluate {folder} --reference {shlex.quote(source)}")
        if push_to_hub is None:
            steps.append(f"push {folder} YOU/{shlex.quote(output.resolve().name)}")
        typer.echo("\n".join([f"\n{output} is complete. Next:", *(f"  hf-efficient {step}" for step in steps)]))
