"""Evaluates a model's loss on a text, alone or compared with a reference model, with confidence intervals.

The sampling unit is the sequence: a metric is the mean of per-sequence means, with a Student's t interval over them.
Differences between models are paired by sequence, so that the difficulty of the text cancels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_efficient.conversion.measuring.layerwise import LOGIT_POSITIONS, LayerwisePass
from hf_efficient.conversion.measuring.token_counts import BUCKETS, Bucket, bucket_of
from hf_efficient.conversion.reading.tensor_reader import TensorReader
from hf_efficient.errors import HFEError
from hf_efficient.modeling.efficient_decoder.configuration_efficient_decoder import EfficientDecoderConfig

CONFIDENCE = 0.95
# Dtype in which `checkpoint_logits` computes, whatever the dtype of the weights.
EVAL_DTYPE = "float32"

# Metrics that are reported for each bucket of `BUCKETS`.
Metric = Literal["nll", "reference_nll", "delta_nll", "kl", "top1_agreement", "share_of_tokens"]
# What a model predicts, or gives.
Objective = Literal["next tokens", "masked tokens", "embeddings"]
# Token ids [B, S] -> their logits, in chunks [n, V]: each sequence in turn, cut into LOGIT_POSITIONS positions (the
# last chunk of a sequence may be shorter).
LogitSource = Callable[[Tensor], Iterator[Tensor]]


def metric_labels(reference: str) -> dict[str, str]:
    """Name of a metric -> its label in a table, in order; `reference` names the model compared with."""
    return {
        "reference_nll": f"nll of the {reference}",
        "nll": "nll",
        "delta_nll": "Δ nll",
        "kl": f"KL from the {reference}",
        "top1_agreement": "top-1 agreement",
        "cosine": f"cosine with the {reference}'s embedding",
    }


@dataclass(frozen=True)
class Estimate:
    """A mean and the bounds of its 95 % confidence interval, which are None for a single sequence."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, sequence_means: Tensor) -> Estimate:
        """The estimate from per-sequence means [B]; the bounds are None for B = 1."""
        values = sequence_means.double()
        mean = float(values.mean())
        if len(values) < 2:
            return cls(mean, None, None)
        margin = student_quantile(len(values) - 1) * float(values.std()) / math.sqrt(len(values))
        return cls(mean, mean - margin, mean + margin)

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.mean:.3f}{interval}"


def student_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Two-sided quantile of Student's t, by the expansion in 1 / degrees (Abramowitz and Stegun 26.7.5).

    Within 0.2 % from 3 degrees of freedom on; underestimates by 1 % at 2 degrees and by 12 % at 1 degree.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


@dataclass(frozen=True)
class EvaluationReport:
    """Metrics of a model on a text; those that are None were not measured.

    Attributes:
        text: name of the text.
        tokens: number of predicted tokens; of next tokens, the first of each sequence is not predicted. For embeddings
            the number of all tokens.
        sequences: number of sequences, the sample size of the intervals.
        sequence_length: tokens in each sequence.
        nll: cross-entropy in nats per token.
        perplexity: ``exp(nll)``, with the mean nll, or 700 if it is larger, for a finite number.
        reference_nll, delta_nll: the reference's nll, and nll minus it.
        kl: KL(reference || model), nats per token.
        top1_agreement: fraction of positions at which both models have the same most likely token.
        objective: `next tokens`, `masked tokens` for a bidirectional model, or `embeddings` for one without a head.
        cosine, cosine_min: cosine of the model's embedding of a sequence with the reference's, and the smallest one.
        by_count: bucket -> mean of each metric over the bucket's positions, where a position's bucket is how often its
            input token occurs in the calibration text (`BUCKETS`); `share_of_tokens` is the fraction of predicted
            positions in the bucket. None if no counts were given.
    """

    text: str
    tokens: int
    sequences: int
    sequence_length: int
    nll: Estimate | None = None
    perplexity: float | None = None
    reference_nll: Estimate | None = None
    delta_nll: Estimate | None = None
    kl: Estimate | None = None
    top1_agreement: Estimate | None = None
    by_count: dict[Bucket, dict[Metric, float]] | None = None
    objective: Objective = "next tokens"
    cosine: Estimate | None = None
    cosine_min: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def table(self) -> str:
        """The metrics as a table for a terminal."""
        kind = "tokens" if self.objective == "embeddings" else self.objective
        size = f"{self.tokens} {kind} in {self.sequences} sequences of {self.sequence_length}"
        rows = [("measured on", f"{self.text}: {size}")]
        for key, label in metric_labels("reference").items():
            estimate: Estimate | None = getattr(self, key)
            if estimate is not None:
                rows.append(
                    (
                        label,
                        f"{estimate} nats/token, perplexity {self.perplexity:.2f}" if key == "nll" else str(estimate),
                    )
                )
        if self.cosine_min is not None:
            rows.append(("smallest cosine", f"{self.cosine_min:.4f}"))
        width = max(len(label) for label, _ in rows)
        lines = [f"{label:<{width}}  {value}" for label, value in rows]
        return "\n".join([*lines, "in brackets: 95 % confidence, Student's t over sequences, paired"])


def checkpoint_logits(
    config: EfficientDecoderConfig,
    reader: TensorReader,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> LogitSource:
    """A function that computes a checkpoint's logits in fp32, layer by layer, with one layer's weights in memory.

    Args:
        config, reader: the checkpoint.
        device: device of the computation and of the logits.
        progress: called with (layers done, number of layers) after every layer.

    Returns:
        A `LogitSource`. It raises `TokenIdError` for an id outside the vocabulary, and `HFEError` for a weight that
        holds NaN or infinity or cannot be read.
    """

    def logits(ids: Tensor) -> Iterator[Tensor]:
        run = LayerwisePass(config, reader, [ids], device=device)
        run.run(progress)
        (chunks,) = run.logits(*run.batches)
        yield from chunks

    return logits


def model_logits(model: nn.Module) -> LogitSource:
    """A function that computes a causal model's logits, in eval mode and without gradients, one sequence at a time.

    The model's training mode is restored when the last chunk was read.
    """

    @torch.no_grad()
    def logits(ids: Tensor) -> Iterator[Tensor]:
        training = model.training
        model.eval()
        try:
            device = next(model.parameters()).device
            for sequence in ids:
                output = model(input_ids=sequence[None].to(device), use_cache=False).logits[0]
                yield from output.split(LOGIT_POSITIONS)
        finally:
            model.train(training)

    return logits


def next_token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of targets [n] under logits [n, V], as fp32 [n]."""
    return nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")


def nll_by_position(chunks: Iterator[Tensor], ids: Tensor) -> Tensor:
    """Cross-entropy in nats [B, S - 1], fp32, of each next token of ids [B, S]; `chunks` are the ids' logits.

    Raises:
        ValueError: there are more or fewer chunks than `ids` has.
    """
    nll = [next_token_nll(chunk, target) for chunk, target in zip(chunks, _chunks(ids.roll(-1, dims=1)), strict=True)]
    return torch.cat(nll).view_as(ids)[:, :-1]


def _chunks(values: Tensor) -> Iterator[Tensor]:
    """`values` [B, S] in chunks [n] with the same positions as the chunks of a `LogitSource`."""
    return (chunk for sequence in values for chunk in sequence.split(LOGIT_POSITIONS))


@torch.no_grad()
def compare_predictions(
    ids: Tensor,
    targets: Tensor,
    predicted: Tensor,
    text: str,
    model: LogitSource,
    reference: LogitSource | None = None,
    *,
    counts: Tensor | None = None,
    objective: Objective = "next tokens",
) -> EvaluationReport:
    """Loss of `model`, and its difference from `reference`, over chosen positions of token ids [B, S].

    Args:
        ids: [B, S] input of both models.
        targets: [B, S] correct token of each position.
        predicted: [B, S] bool, True for the positions that count; at least one in each sequence.
        text: name of the text.
        model, reference: functions that compute the logits of the two models.
        counts: [vocab_size] occurrences of each token in the calibration text, for `EvaluationReport.by_count`.
        objective: see `EvaluationReport`.

    Raises:
        HFEError: the two models have vocabularies of different sizes, or as the functions of the models raise it.
        ValueError: `model` returned more or fewer chunks than `ids` has.
    """
    measured: dict[Metric, list[Tensor]] = {"nll": [], "reference_nll": [], "kl": [], "top1_agreement": []}
    reference_chunks = iter(reference(ids)) if reference else None
    for target, chunk in zip(_chunks(targets), model(ids), strict=True):
        measured["nll"].append(next_token_nll(chunk, target).cpu())
        if reference_chunks is None:
            continue
        other = next(reference_chunks).to(chunk.device)
        if other.shape != chunk.shape:
            raise HFEError(
                f"the model's vocabulary has {chunk.shape[-1]} tokens, the reference's {other.shape[-1]}",
                "compare a converted checkpoint with its own source",
            )
        measured["reference_nll"].append(next_token_nll(other, target).cpu())
        log_p, log_q = other.float().log_softmax(-1), chunk.float().log_softmax(-1)
        measured["kl"].append((log_p.exp() * (log_p - log_q)).sum(-1).cpu())
        measured["top1_agreement"].append((other.argmax(-1) == chunk.argmax(-1)).float().cpu())

    predicted = predicted.cpu()
    metrics = {name: torch.cat(values).view_as(predicted).double() for name, values in measured.items() if values}
    if reference:
        metrics["delta_nll"] = metrics["nll"] - metrics["reference_nll"]
    num_predicted = predicted.sum(1)
    estimates: dict[Any, Any] = {
        name: Estimate.of(torch.where(predicted, values, 0).sum(1) / num_predicted) for name, values in metrics.items()
    }
    at_predicted = {name: values[predicted] for name, values in metrics.items()}
    return EvaluationReport(
        text=text,
        tokens=int(num_predicted.sum()),
        sequences=ids.shape[0],
        sequence_length=ids.shape[1],
        perplexity=math.exp(min(estimates["nll"].mean, 700.0)),
        objective=objective,
        by_count=None if counts is None else _by_bucket(bucket_of(counts.cpu()[ids.cpu()[predicted]]), at_predicted),
        **estimates,
    )


def _by_bucket(bucket: Tensor, metrics: dict[Metric, Tensor]) -> dict[Bucket, dict[Metric, float]]:
    """For each bucket with a position: its fraction of the n positions, and the mean of each metric over them.

    Args:
        bucket: [n] index of each position's bucket in `BUCKETS`.
        metrics: values [n] of each metric.
    """
    masks = {name: bucket == i for i, name in enumerate(BUCKETS)}
    return {
        name: {
            "share_of_tokens": float(mask.double().mean()),
            **{metric: float(values[mask].mean()) for metric, values in metrics.items()},
        }
        for name, mask in masks.items()
        if mask.any()
    }


class Evaluator(ABC):
    """Evaluation of the models of one model family (decoders or encoders).

    Attributes:
        objective: what the family's models are trained to predict.
    """

    objective: ClassVar[Objective]

    @abstractmethod
    def checkpoint_logits(
        self,
        config: PreTrainedConfig,
        reader: TensorReader,
        *,
        device: str | torch.device = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> LogitSource:
        """A function that computes a checkpoint's logits in fp32; `progress` gets (steps done, number of steps)."""

    @abstractmethod
    def model_logits(self, model: nn.Module) -> LogitSource:
        """A function that computes the logits of a model in memory."""

    @abstractmethod
    def predictions(self, ids: Tensor, tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
        """`ids`, `targets` and `predicted` of `compare_predictions`, each [B, S], for token ids [B, S] of a text.

        Raises:
            HFEError: the tokenizer has no token that the objective needs.
        """

    def evaluate(
        self,
        ids: Tensor,
        text: str,
        model: LogitSource,
        reference: LogitSource | None = None,
        *,
        tokenizer: Any = None,
        counts: Tensor | None = None,
    ) -> EvaluationReport:
        """Loss of `model` on token ids [B, S], S >= 2, by the family's `objective`, compared with `reference` if any.

        Args:
            ids, text, model, reference, counts: as for `compare_predictions`.
            tokenizer: the tokenizer of the ids, for a family whose `predictions` needs it.

        Raises:
            HFEError: the two models have vocabularies of different sizes, the tokenizer does not suit the model, or the
                function of a model raises it.
        """
        chosen = self.predictions(ids, tokenizer)
        return compare_predictions(*chosen, text, model, reference, counts=counts, objective=self.objective)


class CausalEvaluator(Evaluator):
    """Evaluates causal language models by next-token loss; a checkpoint is run layer by layer."""

    objective = "next tokens"
    checkpoint_logits = staticmethod(checkpoint_logits)
    model_logits = staticmethod(model_logits)

    def predictions(self, ids: Tensor, tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
        """`ids`, the next token at each position, and True at all positions but the last; `tokenizer` is not used."""
        predicted = torch.ones_like(ids, dtype=torch.bool)
        predicted[:, -1] = False  # the last token of a sequence has no next token
        return ids, ids.roll(-1, dims=1), predicted
