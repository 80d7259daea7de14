"""`Calibration`: the source model, and the text on which patches run it layer by layer to choose and fit weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from hf_efficient.conversion.measuring.layerwise import LayerwisePass
from hf_efficient.conversion.measuring.text import SEQUENCE_LENGTH, load_text, pack
from hf_efficient.conversion.measuring.token_counts import occurrences
from hf_efficient.conversion.reading.source import Source
from hf_efficient.conversion.reading.tensor_reader import TensorReader
from hf_efficient.errors import UsageError
from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig

CALIBRATION_TOKENS = 18_432
HELD_OUT_TOKENS = 4_096
PROBE_TOKENS = 1_024
# Tokens of each document that weights are fitted to: few, so that the text has words of many documents.
FIT_EXCERPT = 128

# Called with (stage, steps done, number of steps).
Progress = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, total: int) -> None:
    """Show nothing."""


class CalibrationSummary(TypedDict, total=False):
    """Names of the texts and their numbers of tokens, the report's `calibration`."""

    calibration_text: str
    calibration_tokens: int
    held_out_text: str
    held_out_tokens: int
    sequence_length: int
    distinct_calibration_tokens: int


@dataclass(frozen=True)
class Calibration:
    """The source model and three texts, each as token ids [B, S], int64.

    Attributes:
        config, reader: configuration (of our decoder) and tensors of the source checkpoint.
        fit: text that weights are fitted to.
        probe: a short text for choices such as the layers, from the same documents as `fit`: the sequences after it, or
            its last ones if the text is short.
        held_out: text of other documents, for the metrics in the report.
        fit_name, held_out_name: names of the texts in reports.
        device: device of the computation.
        progress: called with (stage, steps done, number of steps), by patches after every layer.
    """

    config: EfficientDecoderConfig
    reader: TensorReader
    fit: Tensor
    probe: Tensor
    held_out: Tensor
    fit_name: str = ""
    held_out_name: str = ""
    device: str | torch.device = "cpu"
    progress: Progress = no_progress

    def start(self, *batches: Tensor) -> LayerwisePass:
        """Start a layer-by-layer forward pass of batches of token ids [B, S] through the source model.

        Raises:
            HFEError: the embedding cannot be read, or as its subclass `TokenIdError` an id is outside the vocabulary.
        """
        return LayerwisePass(self.config, self.reader, batches, device=self.device)

    def token_counts(self) -> Tensor:
        """Number of occurrences of each token id in `fit` [vocab_size], fp32, counted by the rule of `occurrences`."""
        return occurrences(self.fit, self.config.vocab_size)[0]

    def summary(self) -> CalibrationSummary:
        """Names of the texts and their numbers of tokens, for the report."""
        return {
            "calibration_text": self.fit_name,
            "calibration_tokens": self.fit.numel(),
            "held_out_text": self.held_out_name,
            "held_out_tokens": self.held_out.numel(),
            "sequence_length": self.fit.shape[1],
            "distinct_calibration_tokens": len(self.fit.unique()),
        }


def prepare_calibration(
    source: Source,
    text: str | None = None,
    *,
    tokens: int = CALIBRATION_TOKENS,
    held_out_tokens: int = HELD_OUT_TOKENS,
    device: str | torch.device = "cpu",
    progress: Progress = no_progress,
) -> Calibration:
    """Read a text, tokenize it with the tokenizer of `source`, and cut it into the parts of a `Calibration`.

    Args:
        source: the opened source checkpoint.
        text: a .jsonl or .txt file, the Hub id of a data set, or None for the built-in sample.
        tokens, held_out_tokens: largest number of tokens of text in `fit` and in `held_out`, cut into whole sequences;
            the BOS of each is not counted. If the text gives too few sequences, `fit` includes those of `probe`.
        device, progress: see `Calibration`.

    Raises:
        HFEError: the text or the tokenizer cannot be read, the text is too short, or a token id is outside the model's
            vocabulary; see `load_text` and `pack`.
    """
    fit_text, held_out_text = load_text(text)
    tokenizer, vocab_size = source.tokenizer(), source.config.vocab_size
    packed = pack(tokenizer, fit_text, tokens + PROBE_TOKENS, vocab_size, excerpt=FIT_EXCERPT)
    # If the text is too short for separate probe sequences, `fit` includes them.
    probe = PROBE_TOKENS // SEQUENCE_LENGTH
    fit = packed[:-probe] if len(packed) > 2 * probe else packed
    return Calibration(
        source.config,
        source.reader,
        fit=fit,
        probe=packed[-probe:],
        held_out=pack(tokenizer, held_out_text, held_out_tokens, vocab_size),
        fit_name=fit_text.name,
        held_out_name=held_out_text.name,
        device=device,
        progress=progress,
    )


def required_calibration(calibration: Calibration | None) -> Calibration:
    """`calibration`; `UsageError` if a patch that measures the source on text was called without one."""
    if calibration is None:
        raise UsageError("the patch measures the source model on text, and no calibration was prepared")
    return calibration
