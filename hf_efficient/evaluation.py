"""`evaluate`: measures the loss of a checkpoint or a model, alone or compared with a reference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_efficient.conversion.architecture import active_architectures
from hf_efficient.conversion.families.family import ModelFamily, families, family_of
from hf_efficient.conversion.measuring.evaluation import EvaluationReport, Evaluator, LogitSource
from hf_efficient.conversion.measuring.text import load_text, pack
from hf_efficient.conversion.options import check_device
from hf_efficient.conversion.progress import Progress
from hf_efficient.conversion.reading.source import Source, open_source
from hf_efficient.errors import HFEError, UsageError

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
    """Cross-entropy of a model on held-out text and, given a reference, its difference, KL and top-1 agreement.

    A checkpoint is run layer by layer in fp32, so that memory holds one layer; a model in memory runs as it is.

    Args:
        model: Hub id, checkpoint folder, `.gguf` file, or a model in memory.
        reference: the same kinds; usually the source of a conversion.
        text: a `.jsonl` or `.txt` file, the id of a data set, or None for the built-in sample of English documentation.
            Only the part that a conversion holds out is used, so that nothing is measured on what it was fitted to.
        tokens: maximum number of tokens of text; rounded down to whole sequences.
        tokenizer: required if no checkpoint is given; by default the checkpoint's.
        revision: branch, tag or commit of the Hub repository `model`.
        token: access token for the Hub.
        device: device on which checkpoints run; a model in memory stays on its device.
        progress: show a progress bar.

    Raises:
        UsageError: `tokens` is below 2, the device is not available, the token is malformed, or no tokenizer is known.
        HFEError: a checkpoint, its tokenizer or the text cannot be read or does not suit the model; the model is no
            language model, such as a classifier; the two are of different families; or their vocabularies differ in
            size although no patch added control tokens to the larger. If one did, predictions are compared on the
            tokens that both have.
    """
    if tokens < 2:
        raise UsageError(
            f"tokens={tokens} must be at least 2: the first token of a sequence is not predicted",
            "give a larger number",
        )
    check_device(device)
    sources: list[Any] = [
        model if isinstance(model, nn.Module) else open_source(str(model), revision=revision, token=token)
    ]
    if reference is not None:
        sources.append(reference if isinstance(reference, nn.Module) else open_source(str(reference), token=token))
    opened = [source for source in sources if isinstance(source, Source)]
    family, evaluator = _family_and_evaluator(sources)
    if evaluator is None:
        raise HFEError(
            f"the model cannot be measured on text: {family.not_evaluated}",
            "evaluate a checkpoint with a language-model head",
        )
    size = _shared_vocabulary([source.config for source in sources])
    if tokenizer is None:
        if not opened:
            raise UsageError("no tokenizer is known for models in memory", "pass tokenizer=AutoTokenizer…")
        # Of two models, the tokenizer of the smaller vocabulary: it gives no id that one of them lacks.
        tokenizer = min(opened, key=lambda source: source.config.vocab_size).tokenizer()
    _, held_out = load_text(None if text is None else str(text))
    ids = pack(tokenizer, held_out, tokens, size)

    with Progress({"measuring": 1}, show=progress) as bar, bar.stage("measuring"):
        logits = [_logits(evaluator, source, device, bar, index, len(sources)) for index, source in enumerate(sources)]
        if any(source.config.vocab_size != size for source in sources):
            logits = [_narrowed(each, size) for each in logits]
        return evaluator.evaluate(ids, held_out.name, *logits, tokenizer=tokenizer)


def _family_and_evaluator(sources: list[Any]) -> tuple[ModelFamily, Evaluator | None]:
    """(model family of the sources, its evaluator, None if a source has no head that predicts tokens).

    A model in memory of an unknown type is evaluated as one of the registry's first family, causal decoders.

    Raises:
        HFEError: the sources are of two families.
    """
    model_families = [family_of(source.config.model_type) or families()[0] for source in sources]
    if any(family is not model_families[0] for family in model_families):
        raise HFEError(
            f"the model is one of the {model_families[0].name}, the reference one of the {model_families[-1].name}",
            "compare a converted checkpoint with its own source",
        )
    evaluators = [model_families[0].evaluator(_config(source)) for source in sources]
    return model_families[0], None if None in evaluators else evaluators[0]


def _config(source: Source | nn.Module) -> PreTrainedConfig:
    """The configuration of a source, which names its class; that of a model in memory may not."""
    if isinstance(source, Source):
        return source.config
    config: Any = copy.copy(source.config)
    config.architectures = [type(source).__name__]
    return config


def _shared_vocabulary(configs: list[Any]) -> int:
    """The smaller `vocab_size`; `HFEError` if they differ and no patch added tokens to the larger one."""
    narrow, wide = min(configs, key=lambda c: c.vocab_size), max(configs, key=lambda c: c.vocab_size)
    added = any(spec.adds_tokens for spec in active_architectures(wide))
    if narrow.vocab_size != wide.vocab_size and not added:
        first, second = (config.vocab_size for config in configs)
        raise HFEError(
            f"the model's vocabulary has {first} tokens, the reference's {second}",
            "compare a converted checkpoint with its own source",
        )
    return int(narrow.vocab_size)


def _narrowed(logits: LogitSource, size: int) -> LogitSource:
    """The logits of the first `size` tokens only."""
    return lambda ids: (chunk[:, :size] for chunk in logits(ids))


def _logits(
    evaluator: Evaluator, source: Source | nn.Module, device: str | torch.device, bar: Progress, index: int, count: int
) -> LogitSource:
    """A function that computes the logits of one of `count` sources, and advances `bar` by its share, number `index`.

    A checkpoint runs on `device`; a model in memory runs where it is, and does not advance the bar.
    """
    if not isinstance(source, Source):
        return evaluator.model_logits(source)
    return evaluator.checkpoint_logits(
        source.config,
        source.reader,
        device=device,
        progress=lambda done, total: bar.advance(index * total + done, count * total),
    )
