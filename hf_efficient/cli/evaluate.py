"""`hf-efficient evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_efficient.cli.options import Device, Json, Text, show_report


def command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, Hub id or .gguf file.")],
    reference: Annotated[str | None, typer.Option(help="Checkpoint to compare with, e.g. the source.")] = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option(help="Tokens of held-out text.")] = 8192,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Measure a checkpoint's loss on held-out text, alone or compared with a reference, with 95 % confidence intervals.

    Example: hf-efficient evaluate smollm-stem --reference HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from hf_efficient.evaluation import evaluate

    report = evaluate(checkpoint, reference=reference, text=text, tokens=tokens, device=device, progress=not json)
    show_report(report, json)
