"""Measured loss of a checkpoint or a model, alone or against a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_efficient.conversion.measuring.evaluation import (
    EvaluationReport,
    LogitSource,
    checkpoint_logits,
    evaluate_logits,
    model_logits,
)
from hf_efficient.conversion.measuring.text import load_text, pack
from hf_efficient.conversion.progress import Progress
from hf_efficient.conversion.reading.source import Source, open_source
from hf_efficient.errors import UsageError

EVALUATION_TOKENS = 8_192


def evaluate(
    model: str | Path | nn.Module,
    *,
    reference: str | Path | nn.Module | None = None,
    text: str | Path | None = None,
    tokens: int = EVALUATION_TOKENS,
    tokenizer: Any = None,
    revision: str | None = None,
    token: str | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> EvaluationReport:
    """Cross-entropy of a model on held-out text and, given a reference, how far the model is from it.

    A checkpoint is run layer by layer in fp32, so that memory holds one layer; a model in memory runs as it is.

    Args:
        model: Hub id, checkpoint folder, `.gguf` file, or a model in memory.
        reference: the same kinds; usually the source of a conversion.
        text: a `.jsonl` or `.txt` file, the id of a data set, or None for the documentation that comes with Python.
            Only the part that a conversion holds out is used, so that nothing is measured on what it was fitted to.
        tokens: tokens of text, at most; rounded down to whole sequences.
        tokenizer: needed when both are models in memory; by default the checkpoint's.
        revision, token: of a Hub repository, for `model` only.
        device: where checkpoints run; a model in memory stays where it is.
        progress: show a bar.

    Raises:
        UsageError: `tokens` is below 2, or no tokenizer is known.
        HFEError: a checkpoint or the text cannot be read, or the vocabularies differ.
    """
    if tokens < 2:
        raise UsageError(
            f"tokens={tokens} must be at least 2: the first of a sequence predicts nothing", "ask for more"
        )
    sources: list[Any] = [
        model if isinstance(model, nn.Module) else open_source(str(model), revision=revision, token=token)
    ]
    if reference is not None:
        sources.append(reference if isinstance(reference, nn.Module) else open_source(str(reference), token=token))
    known = [source for source in sources if isinstance(source, Source)]
    if tokenizer is None:
        if not known:
            raise UsageError("no tokenizer is known for models in memory", "pass tokenizer=AutoTokenizer…")
        tokenizer = known[0].tokenizer()
    _, held_out = load_text(None if text is None else str(text))
    ids = pack(tokenizer, held_out, tokens, sources[0].config.vocab_size)

    with Progress({"measuring": 1}, show=progress) as bar, bar.stage("measuring"):
        logits = [_logits(source, device, bar, turn, len(sources)) for turn, source in enumerate(sources)]
        return evaluate_logits(ids, held_out.name, *logits)


def _logits(
    source: Source | nn.Module, device: str | torch.device, bar: Progress, turn: int, turns: int
) -> LogitSource:
    if not isinstance(source, Source):
        return model_logits(source)
    return checkpoint_logits(
        source.config,
        source.reader,
        device=device,
        progress=lambda done, total: bar.advance(turn * total + done, turns * total),
    )
