"""Closed-form STEM tables: what is summed over the calibration text, and the row each sum gives.

With the feed-forward's input ``x``, its up-projection ``u = W_up x (+ b)`` and its gate ``g = act(W_gate x)``, sums
over the n occurrences of a token, a prior row ``p`` and the shrinkage ``k`` (how many average occurrences the prior
counts for), channel by channel:

| name | row of the token | closest in |
|---|---|---|
| `gated_mean` | ``(sum g^2 u + k s p) / (sum g^2 + k s)``, s the mean of g^2 over all tokens | ``g * u`` |
| `mean` | ``(sum u + k p) / (n + k)`` | ``u`` |
| `output_ls` | by least squares from `gated_mean`: see `stem_output_fit` | the feed-forward's output |
| `ridge` | ``p`` of `gated_mean` | |

The prior is a ridge regression of such rows on the tokens' embeddings, `ridge_prior`; a token that the text does not
hold gets it alone. The first two are the least-squares optimum of each token and channel in their own metric, so with
k = 0 no other table is closer on the calibration text.

Fitted in sequence, a layer's gate is that of the converted model, ``g'``, and what it should give is still the
source's: ``sum g' (g u)`` and ``sum g'^2`` take the places of ``sum g^2 u`` and ``sum g^2``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hf_efficient.conversion.measuring.layerwise import EMBEDDING, BatchState, LayerwisePass
from hf_efficient.conversion.measuring.token_counts import BUCKETS, Bucket, bucket_of, occurrences
from hf_efficient.conversion.reading.source import TensorReader
from hf_efficient.conversion.stem.output_fit import OutputFit
from hf_efficient.modeling.decoder.modeling_decoder import DecoderLayer, GatedMLP
from hf_efficient.modeling.stem.modeling_stem import StemMLP

# Whose relative error is measured: the up-projection u, the gated g * u, the feed-forward's output. Split by count, the
# share of the tokens goes with them.
Quantity = Literal["up", "gated_up", "output", "share_of_tokens"]
INITIALISERS = ("gated_mean", "mean", "output_ls", "ridge")
# Rows of the vocabulary handled at once where a whole table is computed.
CHUNK_ROWS = 4096
# A channel that a token's occurrences hardly opened says next to nothing about u: it must not weigh like the others in
# the regression. This share of an average occurrence is enough to quieten it.
_DRAWN_TO_MEAN = 0.1


@contextmanager
def observe_feed_forward(mlp: GatedMLP, consume: Callable[[Tensor, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """While open, each call of a gated FFN hands ``(slots [B, S], x [B, S, D], g and u [B, S, F])`` to `consume`."""
    seen: dict[str, Tensor] = {}

    def finish(_: nn.Module, inputs: tuple[Tensor, Tensor], __: Tensor) -> None:
        x, slots = inputs
        consume(slots, x, mlp.act_fn(seen["gate"]), seen["up"])

    handles = [
        mlp.gate_proj.register_forward_hook(lambda *call: seen.update(gate=call[-1])),
        mlp.up_proj.register_forward_hook(lambda *call: seen.update(up=call[-1])),
        mlp.register_forward_hook(finish),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stem_feed_forward(run: LayerwisePass, layer: DecoderLayer, rows: Tensor | None) -> Iterator[None]:
    """While open, the layer is a STEM layer whose table holds `rows` for the tokens of the pass; None leaves it."""
    if rows is None:
        yield
        return
    stock = layer.mlp
    with torch.device("meta"):
        layer.mlp = StemMLP(run.config)
    layer.mlp.gate_proj, layer.mlp.down_proj = stock.gate_proj, stock.down_proj
    layer.mlp.stem_embed.weight = nn.Parameter(rows, requires_grad=False)
    try:
        yield
    finally:
        layer.mlp = stock


class TokenSums:
    """Sums over the occurrences of each token, for the FFN of one layer; tokens are slots of a pass's vocabulary.

    Args:
        slots: all tokens that will be added [B, S].
        rows, hidden_size, intermediate_size: R, D and F.

    Attributes:
        count: occurrences that count [R], by the rule of `occurrences`.
        inputs: ``sum x`` [R, D].
        weight: ``sum g'^2`` [R, F], g' the gate that the table will meet.
        weighted_up: ``sum g' (g u)`` [R, F].
        up_energy, gated_energy: ``sum |u|^2`` and ``sum |g * u|^2`` over all tokens.
        outputs: takes the occurrences one by one, where the fit of the feed-forward's output is asked for.
    """

    def __init__(
        self, slots: Tensor, rows: int, hidden_size: int, intermediate_size: int, outputs: OutputFit | None = None
    ) -> None:
        device = slots.device
        self.count, self._first_only = occurrences(slots, rows)
        self.inputs = torch.zeros(rows, hidden_size, device=device)
        self.weight = torch.zeros(rows, intermediate_size, device=device)
        self.weighted_up = torch.zeros(rows, intermediate_size, device=device)
        self.up_energy = 0.0
        self.gated_energy = 0.0
        self.outputs = outputs

    def add(self, slots: Tensor, x: Tensor, gate: Tensor, up: Tensor, met_gate: Tensor | None = None) -> None:
        """Add tokens: slots [B, S], x [B, S, D], gate and up [B, S, F]; `met_gate` is g' where it is not g."""
        counts = torch.ones_like(slots, dtype=torch.bool)
        counts[:, 0] = self._first_only[slots[:, 0]]
        met_gate = (gate if met_gate is None else met_gate)[counts]
        slots, x, gate, up = (part[counts] for part in (slots, x, gate, up))
        gated_up = gate * up
        self.inputs.index_add_(0, slots, x)
        self.weight.index_add_(0, slots, met_gate.square())
        self.weighted_up.index_add_(0, slots, met_gate * gated_up)
        self.up_energy += float(up.square().sum())
        self.gated_energy += float(gated_up.square().sum())
        if self.outputs is not None:
            self.outputs.add(slots, met_gate, gated_up)

    def mean_up(self, up_proj: nn.Linear) -> Tensor:
        """Mean of u for each token [R, F], zero for an absent one; u is linear in x, so it needs no sum of its own."""
        present = self.count[:, None] > 0
        return up_proj(self.inputs / self.count.clamp_min(1)[:, None]) * present

    def within_token_share(self, up_proj: nn.Linear) -> dict[Quantity, float]:
        """Share of the energy of u and of g * u that varies among occurrences of a token: no table can give it."""
        up_kept = float((self.mean_up(up_proj).square().sum(1) * self.count).sum())
        gated_kept = float((self.weighted_up.square() / self.weight.clamp_min(torch.finfo(torch.float32).tiny)).sum())
        return {
            "up": max(1 - up_kept / self.up_energy, 0.0),
            "gated_up": max(1 - gated_kept / self.gated_energy, 0.0),
        }


def observed_push(
    init: str,
    run: LayerwisePass,
    index: int,
    layer: DecoderLayer,
    stream: BatchState,
    converted: BatchState | None = None,
) -> TokenSums:
    """Move the stream through the stock layer and sum what its feed-forward sees, for the initialiser `init`.

    `converted` is the same text after the converted layers below, and stays there: it gives the gates that tables meet.
    """
    met: list[Tensor | None] = []
    if converted is not None:
        with observe_feed_forward(layer.mlp, lambda _slots, _x, gate, _up: met.append(gate)):
            run.run_layer(index, layer, converted.clone())
    gates = iter(met)
    rows = len(run.vocabulary)
    outputs = OutputFit(layer.mlp.down_proj, stream.local_ids.numel(), rows) if init == "output_ls" else None
    sums = TokenSums(stream.local_ids, rows, run.config.hidden_size, run.config.intermediate_size, outputs)
    with observe_feed_forward(layer.mlp, lambda slots, x, gate, up: sums.add(slots, x, gate, up, next(gates, None))):
        run.run_layer(index, layer, stream)
    return sums


@dataclass(frozen=True)
class EmbeddingRegression:
    """Ridge regression on the embeddings of the text's tokens; every layer has the same Gram matrix, factored once.

    A token that occurs n times counts ``n / (n + k)``, k the shrinkage: the noise of its row falls with n, what its
    embedding cannot tell of it does not.

    Attributes:
        weighted: embedding rows times their tokens' counts so defined [R, D], fp64.
        factor: Cholesky factor of ``weighted^T e + lambda I`` [D, D], fp64.
    """

    weighted: Tensor
    factor: Tensor

    @classmethod
    def of(cls, count: Tensor, embeddings: Tensor, shrinkage: float, ridge: float) -> EmbeddingRegression:
        """From occurrences [R] and embedding rows [R, D]; lambda is `ridge` times the mean of the Gram's diagonal."""
        e, tiny = embeddings.double(), torch.finfo(torch.float32).tiny
        weighted = e * (count.double() / (count.double() + shrinkage).clamp_min(tiny))[:, None]
        gram = weighted.T @ e
        # The tiny constant keeps the factorisation alive for an embedding that is zero on the whole text.
        shift = ridge * gram.diagonal().mean() + tiny
        gram += shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return cls(weighted, torch.linalg.cholesky(gram))

    def coefficients(self, rows: Tensor) -> Tensor:
        """B [D, F], fp32, such that ``e B`` is closest to rows [R, F]."""
        return torch.cholesky_solve(self.weighted.T @ rows.double(), self.factor).float()


Prior = Callable[[Tensor], Tensor]


def ridge_prior(weight: Tensor, weighted_up: Tensor, count: Tensor, regression: EmbeddingRegression) -> Prior:
    """Rows [n, F] from embedding rows [n, D]: ``m + e B``, with m the row that is best for all tokens alike.

    B is the regression of the tokens' own rows, less m, each first drawn to m by `_DRAWN_TO_MEAN` average occurrences.

    Args:
        weight, weighted_up: sums of weights and of weighted u of each token [R, F], or [R, 1] for equal channels.
        count: its occurrences [R].
    """
    tiny = torch.finfo(torch.float32).tiny
    mean_row = weighted_up.sum(0) / weight.sum(0).clamp_min(tiny)
    drawn = _DRAWN_TO_MEAN * weight.sum(0) / count.sum()
    rows = (weighted_up + drawn * mean_row) / (weight + drawn).clamp_min(tiny)
    coefficients = regression.coefficients(rows - mean_row)
    return lambda e: torch.addmm(mean_row, e, coefficients)


@dataclass(frozen=True)
class FittedTable:
    """The table of one layer, before it is written out.

    Attributes:
        ids: tokens with a row of their own [K], sorted.
        rows: those rows [K, F].
        prior: rows of all other tokens from their embeddings.
    """

    ids: Tensor
    rows: Tensor
    prior: Prior

    def at(self, ids: Tensor, embeddings: Tensor) -> Tensor:
        """Rows [n, F] of the tokens `ids` [n], sorted and unique, whose embedding rows are [n, D]."""
        rows = self.prior(embeddings)
        own = torch.isin(self.ids, ids, assume_unique=True)
        rows[torch.searchsorted(ids, self.ids[own]).to(rows.device)] = self.rows[own.to(self.rows.device)]
        return rows

    @torch.no_grad()
    def write(self, reader: TensorReader, size: int, dtype: torch.dtype) -> Tensor:
        """The whole table [size, F] on the CPU; rows beyond those of the source's embedding are zero."""
        vocab_size = reader.shape(EMBEDDING)[0]
        table = torch.empty(size, self.rows.shape[1], dtype=dtype)
        table[vocab_size:] = 0
        for start in range(0, vocab_size, CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, vocab_size)
            embeddings = reader.read_rows(EMBEDDING, start, stop).to(self.rows.device, torch.float32)
            table[start:stop] = self.at(torch.arange(start, stop), embeddings)
        return table


@torch.no_grad()
def fit_table(
    init: str,
    shrinkage: float,
    layer: DecoderLayer,
    run: LayerwisePass,
    sums: TokenSums,
    regression: EmbeddingRegression,
) -> FittedTable:
    """The table of one layer by the initialiser `init`, from the sums over the calibration text."""
    up_proj = layer.mlp.up_proj
    if init == "mean":
        weight, weighted_up = sums.count[:, None], sums.mean_up(up_proj) * sums.count[:, None]
    else:
        weight, weighted_up = sums.weight, sums.weighted_up
    prior = ridge_prior(weight, weighted_up, sums.count, regression)
    if init == "ridge":
        return FittedTable(run.vocabulary[:0], run.embeddings.new_empty(0, sums.weight.shape[1]), prior)

    seen = sums.count > 0
    prior_weight = shrinkage * weight.sum(0) / sums.count.sum()
    prior_rows = prior(run.embeddings[seen])
    total = weight[seen] + prior_weight
    # Without shrinkage a gate that was exactly zero leaves nothing to divide by.
    rows = torch.where(total > 0, (weighted_up[seen] + prior_weight * prior_rows) / total, prior_rows)
    if sums.outputs is not None:
        every_prior = prior(run.embeddings)
        start = every_prior.clone()
        start[seen] = rows
        rows = sums.outputs.rows(start, every_prior, weight, prior_weight)[seen]
    return FittedTable(run.vocabulary[seen.cpu()], rows, prior)


class TableError:
    """Relative error of a table on text: ``|y - y_table| / |y|`` over all tokens; y is u, g * u and the FFN's output.

    First positions are left out, for the reason that `occurrences` gives.

    Args:
        mlp: the stock feed-forward.
        rows: the table at the tokens of the pass [R, F].
        count: occurrences of each in the calibration text [R].
    """

    _QUANTITIES: tuple[Quantity, ...] = ("up", "gated_up", "output")

    def __init__(self, mlp: GatedMLP, rows: Tensor, count: Tensor) -> None:
        self.down = mlp.down_proj.weight
        self.rows = rows
        self.bucket = bucket_of(count)
        self.tokens = torch.zeros(len(BUCKETS), dtype=torch.float64, device=count.device)
        # [bucket, quantity, (error, signal)]
        self.energy = self.tokens.new_zeros(len(BUCKETS), len(self._QUANTITIES), 2)

    def add(self, slots: Tensor, x: Tensor, gate: Tensor, up: Tensor) -> None:
        """Add tokens: slots [B, S], x [B, S, D], gate and up [B, S, F]."""
        slots, gate, up = (part[:, 1:].flatten(0, 1) for part in (slots, gate, up))
        off = up - self.rows[slots]
        pairs = ((off, up), (gate * off, gate * up), (gate * off @ self.down.T, gate * up @ self.down.T))
        energy = torch.stack([torch.stack([part.square().sum(-1) for part in pair], -1) for pair in pairs], 1)
        self.energy.index_add_(0, self.bucket[slots], energy.double())
        self.tokens += torch.bincount(self.bucket[slots], minlength=len(self.tokens))

    def overall(self) -> dict[Quantity, float]:
        """Error of each quantity over all tokens."""
        return self._named(self.energy.sum(0))

    def by_count(self) -> dict[Bucket, dict[Quantity, float]]:
        """Share of the tokens and errors, by how often the calibration text holds the token."""
        share = self.tokens / self.tokens.sum()
        return {
            name: {"share_of_tokens": float(share[i]), **self._named(self.energy[i])}
            for i, name in enumerate(BUCKETS)
            if self.tokens[i]
        }

    def _named(self, energy: Tensor) -> dict[Quantity, float]:
        error = (energy[:, 0] / energy[:, 1]).sqrt()
        return dict(zip(self._QUANTITIES, error.tolist(), strict=True))
