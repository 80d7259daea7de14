"""The source model and the text on which a patch measures it, layer by layer, before it computes weights."""

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
# Tokens of each document that weights are fitted to: few, since a table gains from many different words.
FIT_EXCERPT = 128

# Called with (stage, steps done, number of steps).
Progress = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, total: int) -> None:
    """Show nothing."""


class CalibrationSummary(TypedDict, total=False):
    """Names and sizes of the texts, as the report gives them."""

    calibration_text: str
    calibration_tokens: int
    held_out_text: str
    held_out_tokens: int
    sequence_length: int
    distinct_calibration_tokens: int


@dataclass(frozen=True)
class Calibration:
    """The source model and the text it is measured on; every part [B, S] of token ids.

    Attributes:
        config, reader: the source checkpoint.
        fit: text that weights are fitted to.
        probe: a short text for choices between options, of the same source as `fit` and after it.
        held_out: text of other documents, for the reported figures.
        fit_name, held_out_name: names of the texts in reports.
        device: on which layers run.
        progress: called after every layer.
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
        """A layer-by-layer pass through the source model of batches of token ids [B, S]."""
        return LayerwisePass(self.config, self.reader, batches, device=self.device)

    def token_counts(self) -> Tensor:
        """Number of occurrences of each token in `fit` [vocab_size], fp32, counted as in `occurrences`."""
        return occurrences(self.fit, self.config.vocab_size)[0]

    def summary(self) -> CalibrationSummary:
        """Names and sizes of the texts, for the report."""
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
    """The calibration of a patch on `source`, with the text that `load_text(text)` reads.

    Args:
        tokens, held_out_tokens: upper bounds, rounded down to whole sequences; a short text gives fewer.

    Raises:
        HFEError: the text or the tokenizer cannot be read, or they do not fit the model; see `load_text` and `pack`.
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
