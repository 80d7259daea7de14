"""Fits STEM tables in closed form: sums over the calibration text, and the rows computed from them.

With the feed-forward's input ``x``, its up-projection ``u = W_up x (+ b)`` and its gate ``g = act(W_gate x)``, sums
over the n occurrences of a token, a prior row ``p`` and the shrinkage ``k`` (the prior weighs as much as k average
occurrences), channel by channel:

| name | row of the token | least squares in |
|---|---|---|
| `gated_mean` | ``(sum g^2 u + k s p) / (sum g^2 + k s)``, s the mean of g^2 over all tokens | ``g * u`` |
| `mean` | ``(sum u + k p) / (n + k)`` | ``u`` |
| `output_ls` | by conjugate gradients, starting at `gated_mean`: see `output_fit.py` | the feed-forward's output |
| `ridge` | ``p`` of `gated_mean` | |

The prior is a ridge regression of such rows on the tokens' embeddings, `ridge_prior`; a token that is not in the text
gets the prior. The first two are the least-squares optimum for each token and channel in the quantity of the last
column, so with k = 0 no other table has a smaller error on the calibration text.

If layers are fitted sequentially, a layer's gate is that of the converted model, ``g'``, and the target is still the
source's: ``sum g' (g u)`` and ``sum g'^2`` replace ``sum g^2 u`` and ``sum g^2``.
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
from hf_efficient.conversion.reading.tensor_reader import TensorReader
from hf_efficient.conversion.stem.output_fit import OutputFit
from hf_efficient.modeling.decoder.decoder_layer import DecoderLayer, GatedMLP
from hf_efficient.modeling.stem.modeling_stem import StemMLP

# Quantities whose relative error is measured: `up` is u, `gated_up` is g * u, `output` the feed-forward's output.
# Errors by count also have the fraction of tokens in the bucket.
Quantity = Literal["up", "gated_up", "output", "share_of_tokens"]
INITIALISERS = ("gated_mean", "mean", "output_ls", "ridge")
# Rows of a table that `FittedTable.write` computes at a time.
CHUNK_ROWS = 4096
# A channel whose gate was near zero at all occurrences of a token has a very noisy row. Shrinking rows to the mean row
# by this share of an average occurrence keeps such noise out of the regression.
_SHRINKAGE_TO_MEAN = 0.1


@contextmanager
def observe_feed_forward(mlp: GatedMLP, consume: Callable[[Tensor, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Context: each call of `mlp` also calls ``consume(local_ids, x, g, u)``, by forward hooks.

    local_ids [B, S] are the indices of the tokens in `LayerwisePass.vocabulary`, x [B, S, D] is the input, g and u
    [B, S, F] are gate and up-projection.
    """
    outputs: dict[str, Tensor] = {}

    def finish(_: nn.Module, inputs: tuple[Tensor, Tensor], __: Tensor) -> None:
        x, local_ids = inputs
        consume(local_ids, x, mlp.act_fn(outputs["gate"]), outputs["up"])

    handles = [
        mlp.gate_proj.register_forward_hook(lambda *call: outputs.update(gate=call[-1])),
        mlp.up_proj.register_forward_hook(lambda *call: outputs.update(up=call[-1])),
        mlp.register_forward_hook(finish),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stem_feed_forward(run: LayerwisePass, layer: DecoderLayer, rows: Tensor | None) -> Iterator[None]:
    """Context: `layer.mlp` is a STEM feed-forward with table `rows` [R, F], indexed by local ids; None: unchanged.

    Local ids are the indices of tokens in `LayerwisePass.vocabulary`. The weights of gate and `down_proj` are shared
    with the stock feed-forward, which `layer` gets back at the end.
    """
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
    """Sums over the occurrences of each token, for the feed-forward of one layer.

    Tokens are given by local ids, their indices in `LayerwisePass.vocabulary`.

    Args:
        local_ids: local ids of all tokens that will be added [B, S].
        rows, hidden_size, intermediate_size: R (size of that vocabulary), D and F.
        outputs: collects every occurrence for `output_ls`; None for other initialisers.

    Attributes:
        count: number of occurrences that are summed [R], fp32; first positions of sequences count only for tokens that
            occur nowhere else (`occurrences`).
        inputs: ``sum x`` [R, D].
        weight: ``sum g'^2`` [R, F], g' the gate in the converted model.
        weighted_up: ``sum g' (g u)`` [R, F].
        up_energy, gated_energy: ``sum |u|^2`` and ``sum |g * u|^2`` over all tokens.
    """

    def __init__(
        self, local_ids: Tensor, rows: int, hidden_size: int, intermediate_size: int, outputs: OutputFit | None = None
    ) -> None:
        device = local_ids.device
        self.count, self._first_only = occurrences(local_ids, rows)
        self.inputs = torch.zeros(rows, hidden_size, device=device)
        self.weight = torch.zeros(rows, intermediate_size, device=device)
        self.weighted_up = torch.zeros(rows, intermediate_size, device=device)
        self.up_energy = 0.0
        self.gated_energy = 0.0
        self.outputs = outputs

    def add(self, local_ids: Tensor, x: Tensor, gate: Tensor, up: Tensor, converted_gate: Tensor | None = None) -> None:
        """Add the tokens of a batch to the sums.

        Args:
            local_ids: local ids [B, S].
            x: input of the feed-forward [B, S, D].
            gate, up: g and u [B, S, F].
            converted_gate: g' [B, S, F]; None if it is g.
        """
        counts = torch.ones_like(local_ids, dtype=torch.bool)
        counts[:, 0] = self._first_only[local_ids[:, 0]]
        converted_gate = (gate if converted_gate is None else converted_gate)[counts]
        local_ids, x, gate, up = (part[counts] for part in (local_ids, x, gate, up))
        gated_up = gate * up
        self.inputs.index_add_(0, local_ids, x)
        self.weight.index_add_(0, local_ids, converted_gate.square())
        self.weighted_up.index_add_(0, local_ids, converted_gate * gated_up)
        self.up_energy += float(up.square().sum())
        self.gated_energy += float(gated_up.square().sum())
        if self.outputs is not None:
            self.outputs.add(local_ids, converted_gate, gated_up)

    def mean_up(self, up_proj: nn.Linear) -> Tensor:
        """Mean of u for each token [R, F], zero if it does not occur; from the sum of x, because u is linear in x."""
        present = self.count[:, None] > 0
        return up_proj(self.inputs / self.count.clamp_min(1)[:, None]) * present

    def within_token_share(self, up_proj: nn.Linear) -> dict[Quantity, float]:
        """Fraction of the sums of squares of u and g * u that varies between occurrences of a token."""
        up_kept = float((self.mean_up(up_proj).square().sum(1) * self.count).sum())
        gated_kept = float((self.weighted_up.square() / self.weight.clamp_min(torch.finfo(torch.float32).tiny)).sum())
        kept: dict[Quantity, tuple[float, float]] = {
            "up": (up_kept, self.up_energy),
            "gated_up": (gated_kept, self.gated_energy),
        }
        # If all values are zero, the fraction is 0.
        return {name: max(1 - part / energy, 0.0) if energy else 0.0 for name, (part, energy) in kept.items()}


def run_layer_and_sum(
    init: str,
    run: LayerwisePass,
    index: int,
    layer: DecoderLayer,
    batch: BatchState,
    converted: BatchState | None = None,
) -> TokenSums:
    """Apply the source's layer `index` to `batch`, in place, and return the sums over its feed-forward's activations.

    Args:
        init: one of `INITIALISERS`.
        run: the pass that `batch` belongs to.
        index, layer: the layer, with its weights loaded.
        batch: the calibration text in the source model, before this layer.
        converted: the same text in the converted model, before this layer; it gives the gates g' and is not changed.
            None for g' = g.

    Raises:
        HFEError: with `output_ls`, the gates of all tokens would take more than 8 GiB.
    """
    converted_gates: list[Tensor | None] = []
    if converted is not None:
        with observe_feed_forward(layer.mlp, lambda _ids, _x, gate, _up: converted_gates.append(gate)):
            run.run_layer(index, layer, converted.clone())
    gates = iter(converted_gates)
    rows = len(run.vocabulary)
    outputs = OutputFit(layer.mlp.down_proj, batch.local_ids.numel(), rows) if init == "output_ls" else None
    sums = TokenSums(batch.local_ids, rows, run.config.hidden_size, run.config.intermediate_size, outputs)
    with observe_feed_forward(layer.mlp, lambda ids, x, gate, up: sums.add(ids, x, gate, up, next(gates, None))):
        run.run_layer(index, layer, batch)
    return sums


@dataclass(frozen=True)
class EmbeddingRegression:
    """Ridge regression on the embeddings of the text's tokens; its Gram matrix is factored once for all layers.

    A token that occurs n times has the weight ``n / (n + k)``, k the shrinkage: the noise of its row decreases with n,
    but not the part of the row that its embedding cannot predict.

    Attributes:
        weighted: embedding rows times the weights of their tokens [R, D], fp64.
        factor: Cholesky factor of ``weighted^T e + lambda I`` [D, D], fp64.
    """

    weighted: Tensor
    factor: Tensor

    @classmethod
    def of(cls, count: Tensor, embeddings: Tensor, shrinkage: float, ridge: float) -> EmbeddingRegression:
        """Set up the regression, whose matrix depends on the text but not on the layer.

        Args:
            count: occurrences of each token [R].
            embeddings: the tokens' embedding rows [R, D].
            shrinkage: k.
            ridge: lambda, as a multiple of the mean of the Gram matrix's diagonal.
        """
        e, tiny = embeddings.double(), torch.finfo(torch.float32).tiny
        weighted = e * (count.double() / (count.double() + shrinkage).clamp_min(tiny))[:, None]
        gram = weighted.T @ e
        # The tiny constant keeps the matrix positive definite if the embedding is zero for all tokens of the text.
        shift = ridge * gram.diagonal().mean() + tiny
        gram += shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return cls(weighted, torch.linalg.cholesky(gram))

    def coefficients(self, rows: Tensor) -> Tensor:
        """The coefficients B [D, F], fp32, for which ``embeddings @ B`` fits `rows` [R, F] best."""
        return torch.cholesky_solve(self.weighted.T @ rows.double(), self.factor).float()


# Embedding rows [n, D] -> table rows [n, F].
Prior = Callable[[Tensor], Tensor]


def ridge_prior(weight: Tensor, weighted_up: Tensor, count: Tensor, regression: EmbeddingRegression) -> Prior:
    """The prior ``m + e B`` for embedding rows e, with m [F] the row that fits all tokens of the text best.

    B is the regression of the tokens' rows minus m, after shrinking each row to m by `_SHRINKAGE_TO_MEAN` average
    occurrences.

    Args:
        weight, weighted_up: sums of weights and of weighted u of each token [R, F]; `weight` may be [R, 1].
        count: occurrences of each token [R].
        regression: the regression on the embeddings of these tokens.
    """
    tiny = torch.finfo(torch.float32).tiny
    mean_row = weighted_up.sum(0) / weight.sum(0).clamp_min(tiny)
    mean_weight = _SHRINKAGE_TO_MEAN * weight.sum(0) / count.sum()
    rows = (weighted_up + mean_weight * mean_row) / (weight + mean_weight).clamp_min(tiny)
    coefficients = regression.coefficients(rows - mean_row)
    return lambda e: torch.addmm(mean_row, e, coefficients)


@dataclass(frozen=True)
class FittedTable:
    """The table of one layer: fitted rows of the text's tokens, and a prior for all others.

    Attributes:
        ids: token ids with a fitted row [K], sorted.
        rows: those rows [K, F].
        prior: gives the rows of all other tokens from their embeddings.
    """

    ids: Tensor
    rows: Tensor
    prior: Prior

    def at(self, ids: Tensor, embeddings: Tensor) -> Tensor:
        """Rows [n, F], fp32, of the tokens `ids` [n], sorted and unique; `embeddings` [n, D] are their embeddings."""
        rows = self.prior(embeddings)
        fitted = torch.isin(self.ids, ids, assume_unique=True)
        rows[torch.searchsorted(ids, self.ids[fitted]).to(rows.device)] = self.rows[fitted.to(self.rows.device)]
        return rows

    @torch.no_grad()
    def write(self, reader: TensorReader, size: int, dtype: torch.dtype) -> Tensor:
        """The whole table [size, F] in `dtype` on the CPU, of which rows beyond the source's embedding are zero.

        `reader` gives the source's embedding; `HFEError` if that cannot be read or holds NaN or infinity.
        """
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
    """Compute the table of one layer by the initialiser `init`, from the sums over the calibration text.

    Args:
        init: one of `INITIALISERS`.
        shrinkage: k.
        layer: the source's layer, with its weights loaded.
        run: the pass in which `sums` were computed.
        sums: the result of `run_layer_and_sum`.
        regression: the regression on the embeddings of the pass's vocabulary.
    """
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
    # With shrinkage 0, the weight of a channel whose gate was always exactly zero is 0.
    rows = torch.where(total > 0, (weighted_up[seen] + prior_weight * prior_rows) / total, prior_rows)
    if sums.outputs is not None:
        every_prior = prior(run.embeddings)
        start = every_prior.clone()
        start[seen] = rows
        rows = sums.outputs.rows(start, every_prior, weight, prior_weight)[seen]
    return FittedTable(run.vocabulary[seen.cpu()], rows, prior)


class TableError:
    """Relative error of a table on text: ``|y - y_table| / |y|`` over all tokens; y is u, g * u and the output.

    The first position of each sequence, the attention sink, is left out.

    Args:
        mlp: the source's feed-forward.
        rows: the table's rows of the tokens of the pass [R, F].
        count: occurrences of each token in the calibration text [R].
    """

    _QUANTITIES: tuple[Quantity, ...] = ("up", "gated_up", "output")

    def __init__(self, mlp: GatedMLP, rows: Tensor, count: Tensor) -> None:
        self.down = mlp.down_proj.weight
        self.rows = rows
        self.bucket = bucket_of(count)
        self.tokens = torch.zeros(len(BUCKETS), dtype=torch.float64, device=count.device)
        # [bucket, quantity, (sum of squared errors, sum of squares)]
        self.energy = self.tokens.new_zeros(len(BUCKETS), len(self._QUANTITIES), 2)

    def add(self, local_ids: Tensor, x: Tensor, gate: Tensor, up: Tensor) -> None:
        """Add tokens: local_ids [B, S], x [B, S, D], gate and up [B, S, F]."""
        local_ids, gate, up = (part[:, 1:].flatten(0, 1) for part in (local_ids, gate, up))
        error = up - self.rows[local_ids]
        pairs = ((error, up), (gate * error, gate * up), (gate * error @ self.down.T, gate * up @ self.down.T))
        energy = torch.stack([torch.stack([part.square().sum(-1) for part in pair], -1) for pair in pairs], 1)
        self.energy.index_add_(0, self.bucket[local_ids], energy.double())
        self.tokens += torch.bincount(self.bucket[local_ids], minlength=len(self.tokens))

    def overall(self) -> dict[Quantity, float]:
        """Relative error of each quantity over all tokens."""
        return self._named(self.energy.sum(0))

    def by_count(self) -> dict[Bucket, dict[Quantity, float]]:
        """Bucket of the count in the calibration text -> fraction of the tokens, and relative error of each quantity.

        Only buckets with tokens are included.
        """
        share = self.tokens / self.tokens.sum()
        return {
            name: {"share_of_tokens": float(share[i]), **self._named(self.energy[i])}
            for i, name in enumerate(BUCKETS)
            if self.tokens[i]
        }

    def _named(self, energy: Tensor) -> dict[Quantity, float]:
        """Relative errors by quantity, from sums of squared errors and of squares [quantity, 2]."""
        error = torch.where(
            energy[:, 0] > 0, energy[:, 0] / energy[:, 1], 0
        ).sqrt()  # no error means 0, also if all values are 0
        return dict(zip(self._QUANTITIES, error.tolist(), strict=True))
