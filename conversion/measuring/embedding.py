"""Compares the embeddings of a text encoder without a head with those of another model."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_efficient.conversion.measuring.evaluation import Estimate, EvaluationReport, LogitSource, Objective
from hf_efficient.conversion.measuring.masked import MaskedEvaluator
from hf_efficient.errors import HFEError


class EmbeddingEvaluator(MaskedEvaluator):
    """Evaluates encoders by the cosine between their embedding of a sequence and that of a reference.

    An embedding is the mean of the last hidden states over the sequence, of all windows if it is longer than the
    model's input. `checkpoint_logits` and `model_logits` give hidden states [n, hidden_size] in place of logits.
    """

    objective: ClassVar[Objective] = "embeddings"

    @torch.no_grad()
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
        """Cosines of the embeddings of token ids [B, S]; `tokenizer` and `counts` are not used.

        Raises:
            HFEError: there is no reference, the two models have hidden states of different sizes, or the function of a
                model raises it.
        """
        if reference is None:
            raise HFEError(
                "the model has no head that predicts tokens; its embeddings can only be compared with those of another",
                "name a reference, such as its source (--reference)",
            )
        found, expected = (_means(states(ids), ids) for states in (model, reference))
        if found.shape != expected.shape:
            raise HFEError(
                f"the model's embeddings have {found.shape[1]} numbers, the reference's {expected.shape[1]}",
                "compare a converted checkpoint with its own source",
            )
        cosine = nn.functional.cosine_similarity(found, expected, dim=1)
        return EvaluationReport(
            text=text,
            tokens=ids.numel(),
            sequences=ids.shape[0],
            sequence_length=ids.shape[1],
            cosine=Estimate.of(cosine),
            cosine_min=float(cosine.min()),
            objective=self.objective,
        )


def _means(chunks: Any, ids: Tensor) -> Tensor:
    """Mean of the hidden states of each sequence of ids [B, S], fp64 [B, hidden_size]; `chunks`: see `LogitSource`."""
    sums = torch.cat([chunk.double().cpu() for chunk in chunks])
    return sums.view(*ids.shape, -1).mean(1)
