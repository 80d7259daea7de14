"""Analyses STEM embedding tables: cosines between rows, comparison with the dense up-projection, and ablation.

A STEM layer has an embedding table with a row ``U[t]`` of width F (`intermediate_size`) for each token id t in place of
its up-projection ``W_up x``. Cosines mean little without a baseline: random rows, such as those of an untrained table,
have cosines of standard deviation ``1 / sqrt(F)``, which in wide tables looks like near-orthogonality. So every spread
includes this baseline, and can be restricted to tokens that occur often enough in some text for their rows to be
trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_efficient.conversion.measuring.evaluation import Estimate, model_logits, nll_by_position
from hf_efficient.conversion.measuring.text import load_text, pack
from hf_efficient.editing.stem_tables import stem_base_model, table_weights
from hf_efficient.errors import HFEError, UsageError

ANALYSIS_TOKENS = 4_096
# Pairs whose cosines are computed at a time.
_PAIRS = 8_192


@dataclass(frozen=True)
class AngularSpread:
    """Cosines between rows of one table, and the same statistics for random rows of that width.

    Attributes:
        layer: index of the table's layer.
        n_rows, zero_rows: number of rows compared; number of zero rows, which have no direction and are left out.
        n_pairs: number of pairs of different rows; sampled pairs may repeat.
        mean, std, p50_abs, p95_abs: of the cosines (std NaN for one pair); the percentiles are of their magnitude.
        tau, frac_abs_below: fraction of the cosines whose magnitude is below tau.
        participation_ratio: ``(sum of eigenvalues)^2 / sum of squared eigenvalues`` of the rows' covariance, which is
            the number of directions if all eigenvalues are equal; NaN if all rows are equal.
        baseline_std, baseline_p95_abs: of cosines of isotropic rows, ``1 / sqrt(F)`` and 1.96 times that.
        baseline_participation: of as many isotropic rows, ``n F / (n + F)``.
        cosines: the sample itself [n_pairs], float32, on the CPU.
    """

    layer: int
    n_rows: int
    zero_rows: int
    n_pairs: int
    mean: float
    std: float
    p50_abs: float
    p95_abs: float
    tau: float
    frac_abs_below: float
    participation_ratio: float
    baseline_std: float
    baseline_p95_abs: float
    baseline_participation: float
    cosines: Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without `cosines`."""
        return {name: value for name, value in vars(self).items() if name != "cosines"}


def stem_angular_spread(
    model: PreTrainedModel,
    layer: int,
    *,
    ids: Tensor | Sequence[int] | None = None,
    counts: Tensor | Sequence[int] | None = None,
    min_count: int = 1,
    n_pairs: int = 200_000,
    center: bool = False,
    tau: float = 0.05,
    seed: int = 0,
) -> AngularSpread:
    """Compute statistics of the cosines between rows of one table, and those of random rows as a baseline.

    Args:
        model: a loaded STEM model.
        layer: one of its STEM layers.
        ids: tokens whose rows are compared, a repeated one once; None for all.
        counts: instead of `ids`, how often each token occurs in some text [vocab_size]; tokens with at least
            `min_count` are compared.
        n_pairs: number of pairs of different rows to sample, with replacement, at least 1; all if there are not more.
        center: subtract the mean of the chosen rows first.
        tau: bound for `frac_abs_below`.
        seed: random seed of the sampling, which does not change the global random state.

    Raises:
        HFEError: `ids` and `counts` are both given, an id is outside the table, `counts` is not [vocab_size], fewer
            than two of the chosen rows are not zero, the model is no STEM model, or the layer has no table that can be
            read (see `table_weights`).

    Source: the pairwise cosines of STEM, arXiv:2601.10639, figure 6; baseline and participation ratio are not in the
        paper.

    Example:
        >>> spread = stem_angular_spread(model, layer=4)
        >>> print(spread.std, "random rows:", spread.baseline_std)
    """
    table = _table(model, layer)
    rows = table[_chosen_ids(ids, counts, min_count, len(table)).to(table.device)].float()
    if center:
        rows = rows - rows.mean(0)
    norms = rows.norm(dim=1)
    rows = rows[norms > 0]
    zero_rows, (n, width) = int((norms == 0).sum()), rows.shape
    if n < 2:
        raise HFEError(f"{n} rows of layer {layer} are not zero, two are needed", "name more tokens")
    first, second = _pairs(n, n_pairs, seed)
    cosines = _cosines(nn.functional.normalize(rows, dim=1), first, second).cpu()
    magnitude = cosines.abs()
    baseline = 1 / math.sqrt(width)
    return AngularSpread(
        layer=layer,
        n_rows=n,
        zero_rows=zero_rows,
        n_pairs=len(cosines),
        mean=float(cosines.double().mean()),
        std=float(cosines.double().std()),
        p50_abs=_percentile(magnitude, 0.5),
        p95_abs=_percentile(magnitude, 0.95),
        tau=tau,
        frac_abs_below=float((magnitude < tau).double().mean()),
        participation_ratio=_participation(rows),
        baseline_std=baseline,
        baseline_p95_abs=1.96 * baseline,
        baseline_participation=n * width / (n + width),
        cosines=cosines,
    )


@dataclass(frozen=True)
class RowReport:
    """One row of one table.

    Attributes:
        token, text: the token's id, and its text; None without a tokenizer.
        layer: of the table.
        norm, norm_percentile: norm of the row; percentage of the table's rows with a smaller norm.
        neighbours: the other rows with the largest cosines, largest first: (id, text, cosine).
        channels: the channels with the largest effect on the output, largest first: (channel j, element ``U_j`` of the
            row, ``|U_j|`` times the norm of column j of ``W_down``, the weight of the down-projection).
    """

    token: int
    text: str | None
    layer: int
    norm: float
    norm_percentile: float
    neighbours: list[tuple[int, str | None, float]]
    channels: list[tuple[int, float, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def stem_row_report(
    model: PreTrainedModel, token: int | str, layer: int, k: int = 10, *, tokenizer: Any = None
) -> RowReport:
    """Report the nearest rows, the norm and the strongest channels of a token's row in one table.

    Args:
        model: a loaded STEM model.
        token: its id; or, with `tokenizer`, a text that is a single token.
        layer: a STEM layer.
        k: maximum number of rows and of channels to return.
        tokenizer: encodes `token` if it is a text, and decodes ids to text.

    Raises:
        HFEError: a text is given without a tokenizer or is not exactly one token, the id is outside the table, the
            model is no STEM model, or the layer has no table that can be read (see `table_weights`).
    """
    table = _table(model, layer)
    token_id = _one_token(token, tokenizer, len(table))

    def text(i: int) -> str | None:
        return None if tokenizer is None else tokenizer.decode([i])

    rows = table.float()
    norms = rows.norm(dim=1)
    cosines = nn.functional.normalize(rows, dim=1) @ nn.functional.normalize(rows[token_id], dim=0)
    cosines[token_id] = -math.inf
    nearest = cosines.topk(min(k, len(rows) - 1))
    down = stem_base_model(model).layers[layer].mlp.down_proj.weight.detach().float()
    strength = rows[token_id].abs() * down.norm(dim=0)
    strongest = strength.topk(min(k, len(strength)))
    return RowReport(
        token=token_id,
        text=text(token_id),
        layer=layer,
        norm=float(norms[token_id]),
        norm_percentile=100 * float((norms < norms[token_id]).double().mean()),
        neighbours=[(i, text(i), c) for i, c in zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)],
        channels=[
            (j, float(rows[token_id, j]), s)
            for j, s in zip(strongest.indices.tolist(), strongest.values.tolist(), strict=True)
        ],
    )


@dataclass(frozen=True)
class DenseComparison:
    """Comparison of one layer's rows with the up-projection that they replace, over the tokens of a text.

    Attributes:
        layer: of the table.
        tokens: number of tokens compared; the first of each sequence, the attention sink, is left out.
        up_cosine: mean cosine of ``U[t]`` and ``u = W_up x``, x the input of the dense model's feed-forward.
        gated_cosine: mean cosine of ``g * U[t]`` and ``g * u``, with the dense model's gate ``g = act(W_gate x)``.
        norm_ratio: mean of ``|U[t]| / |u|``.
    """

    layer: int
    tokens: int
    up_cosine: float
    gated_cosine: float
    norm_ratio: float


@torch.no_grad()
def stem_compare_dense(
    model: PreTrainedModel, dense: PreTrainedModel, text: str | Path | Tensor | None = None, *, tokenizer: Any = None
) -> list[DenseComparison]:
    """Compare each STEM layer's rows with the output of the dense source's up-projection, token by token.

    Args:
        model: a loaded STEM model.
        dense: the model that it was converted from, loaded by transformers; its training mode is not changed.
        text: as for `stem_ablate`.
        tokenizer: encodes the text.

    Raises:
        HFEError: `dense` has no up-projection of the table's width at a STEM layer, the model is no STEM model, a table
            cannot be read (see `table_weights`); text as for `stem_ablate`.
        UsageError: text is given without a tokenizer.
    """
    ids = _token_ids(model, text, tokenizer)
    layers = {layer: _table(model, layer) for layer in model.config.stem_layers}
    inner = dense.base_model.layers
    mlp_inputs: dict[int, Tensor] = {}
    handles = []
    for layer, table in layers.items():
        mlp: Any = inner[layer].mlp if layer < len(inner) else None
        if getattr(mlp, "up_proj", None) is None or mlp.up_proj.out_features != table.shape[1]:
            raise HFEError(
                f"layer {layer} of the dense model has no up-projection of width {table.shape[1]}",
                "compare with the model that was converted",
            )
        handles.append(mlp.register_forward_pre_hook(lambda _, args, i=layer: mlp_inputs.__setitem__(i, args[0])))
    sums = {layer: torch.zeros(3, dtype=torch.float64) for layer in layers}
    try:
        for sequence in ids:
            dense(input_ids=sequence[None].to(next(dense.parameters()).device), use_cache=False)
            for layer, table in layers.items():
                mlp, x = inner[layer].mlp, mlp_inputs.pop(layer)[0, 1:]
                u, g = mlp.up_proj(x).float(), mlp.act_fn(mlp.gate_proj(x)).float()
                rows = table[sequence[1:].to(table.device)].to(u)
                parts = (
                    nn.functional.cosine_similarity(rows, u, dim=1),
                    nn.functional.cosine_similarity(g * rows, g * u, dim=1),
                    rows.norm(dim=1) / u.norm(dim=1),
                )
                sums[layer] += torch.stack([part.double().sum() for part in parts]).cpu()
    finally:
        for handle in handles:
            handle.remove()
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    return [DenseComparison(layer, tokens, *(sums[layer] / tokens).tolist()) for layer in layers]


@dataclass(frozen=True)
class Ablation:
    """Increase in the loss when all rows of some layers are replaced by one row.

    Attributes:
        layers: the layers whose rows are replaced.
        mode: ``zero`` or ``mean``.
        nll: mean loss of the ablated model, nats per token; that of the unchanged model is ``nll - delta_nll.mean``.
        delta_nll: the increase over the unchanged model, nats per token: its mean, and the bounds `low` and `high` of
            its 95 % confidence interval over sequences, None for a single sequence.
        by_role: role of a position's token -> (mean increase in the loss of the next token, number of positions), for
            each role that occurs.
    """

    layers: list[int]
    mode: str
    nll: float
    delta_nll: Estimate
    by_role: dict[str, tuple[float, int]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def stem_ablate(
    model: PreTrainedModel,
    text: str | Path | Tensor | None = None,
    layers: Sequence[int] | Sequence[Sequence[int]] | None = None,
    mode: str = "zero",
    *,
    tokenizer: Any = None,
) -> list[Ablation]:
    """Increase in the loss with one row in place of all rows of tables, layer by layer and by the token's role.

    Args:
        model: a loaded STEM model; its weights and training mode stay as they are, and it is run in eval mode.
        text: a `.jsonl` or `.txt` file, the id of a data set, or None for the built-in sample of documentation; of
            each, at most 4,096 tokens of the part that conversions hold out for evaluation. Or token ids [B, S], S of 2
            or more, one sequence in each row.
        layers: layers to ablate one by one, or groups of layers to ablate together, with one result for each in this
            order; None for every STEM layer, then all together.
        mode: ``zero``: zero rows, which make the feed-forward's output zero; ``mean``: the mean of the rows at the
            text's positions, in which a token counts as often as it occurs.
        tokenizer: encodes the text, and decodes ids to find roles: ``first`` (of a sequence), ``word``, ``rest`` (of a
            word), ``number``, ``other``. Without it there is only the role ``all``.

    Raises:
        HFEError: the mode is unknown; the model is no STEM model; a group is empty, repeats a layer or names one
            without a readable table (see `table_weights`); ids are not [B, S] with S of 2 or more; or the text cannot
            be read, is too short, or has ids outside the vocabulary.
        UsageError: text is given without a tokenizer.
    """
    if mode not in ("zero", "mean"):
        raise HFEError(f"mode={mode!r} is unknown", "choose 'zero' or 'mean'")
    stem_layers = list(model.config.stem_layers)
    chosen: list[Any] = [*stem_layers, stem_layers] if layers is None else list(layers)
    groups = [[entry] if isinstance(entry, int) else list(entry) for entry in chosen]
    for group in groups:
        table_weights(stem_base_model(model), group)
    ids = _token_ids(model, text, tokenizer)
    logits = model_logits(model)
    plain = nll_by_position(logits(ids), ids)
    roles = _roles(ids, tokenizer)
    ablations = []
    for group in groups:
        with _without_rows(model, group, mode, ids):
            increase = nll_by_position(logits(ids), ids) - plain
        by_role = {
            role: (float(increase[mask].double().mean()), int(mask.sum())) for role, mask in roles.items() if mask.any()
        }
        estimate = Estimate.of(increase.double().mean(1))
        ablations.append(Ablation(group, mode, float((plain + increase).double().mean()), estimate, by_role))
    return ablations


@contextmanager
def _without_rows(model: PreTrainedModel, layers: list[int], mode: str, ids: Tensor) -> Iterator[None]:
    """Context: the tables of `layers` return the same row for every token: zeros, or the mean row
    of the positions of `ids` [B, S]; `HFEError` if a layer has no table.

    This uses forward hooks; a table with a hook is called as a module, not read by the fused kernel.
    """

    def returning(row: Tensor | None) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(module: nn.Module, inputs: Any, rows: Tensor) -> Tensor:
            return torch.zeros_like(rows) if row is None else row.to(rows).expand_as(rows)

        return hook

    handles = []
    try:
        for layer in layers:
            table = _table(model, layer)
            row = None if mode == "zero" else table[ids.flatten().to(table.device)].mean(0, dtype=torch.float32)
            mlp = stem_base_model(model).layers[layer].mlp
            handles.append(mlp.stem_embed.register_forward_hook(returning(row)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _table(model: PreTrainedModel, layer: int) -> Tensor:
    """The table [vocab_size, intermediate_size] of a layer, detached; `HFEError` as `table_weights`."""
    return table_weights(stem_base_model(model), [layer])[layer].detach()


def _token_ids(model: PreTrainedModel, text: str | Path | Tensor | None, tokenizer: Any) -> Tensor:
    """Token ids [B, S], on the CPU: those given, or of the held-out part of a text.

    Raises:
        HFEError: ids are not [B, S], S >= 2; the text cannot be read, is too short, or has ids outside the vocabulary.
        UsageError: a text is given without a tokenizer.
    """
    if isinstance(text, Tensor):
        if text.ndim != 2 or text.shape[1] < 2:
            raise HFEError(f"token ids of shape {list(text.shape)} are not [B, S] with S of 2 or more", "reshape them")
        return text.cpu()
    if tokenizer is None:
        raise UsageError("text needs a tokenizer", "pass tokenizer=, or token ids [B, S] in place of the text")
    _, held_out = load_text(None if text is None else str(text))
    return pack(tokenizer, held_out, ANALYSIS_TOKENS, model.config.vocab_size)


def _one_token(token: int | str, tokenizer: Any, rows: int) -> int:
    """The id of a token given by id or text; `HFEError` unless it is one of `rows` ids, or a text of one token."""
    if isinstance(token, str):
        if tokenizer is None:
            raise HFEError(f"token={token!r} is a text and no tokenizer was given", "pass tokenizer=, or the id")
        ids = tokenizer(token, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise HFEError(f"{token!r} is {len(ids)} tokens {ids}", "name one token, for example with its space before")
        return ids[0]
    if not 0 <= token < rows:
        raise HFEError(f"token {token} is outside 0..{rows - 1}", "name a token id of this model")
    return token


def _chosen_ids(ids: Any, counts: Any, min_count: int, rows: int) -> Tensor:
    """Unique token ids [n], int64, for `stem_angular_spread`, whose arguments these are; the table has `rows` rows.

    Raises:
        HFEError: ids and counts are both given, counts has a wrong shape, or an id is outside the table.
    """
    if ids is not None and counts is not None:
        raise HFEError("ids and counts are both given", "give one of them")
    if counts is not None:
        counts = torch.as_tensor(counts)
        if counts.shape != (rows,):
            raise HFEError(f"counts has shape {list(counts.shape)}, the table {rows} rows", "count every token id")
        return (counts >= min_count).nonzero().flatten()
    if ids is None:
        return torch.arange(rows)
    chosen = torch.as_tensor(ids).flatten()
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < rows:
        raise HFEError(
            f"ids reach from {int(chosen.min())} to {int(chosen.max())}, the table has {rows} rows",
            "name token ids of this model",
        )
    return chosen.unique()


def _pairs(n: int, max_pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices [pairs] of the first and second row of each pair: all pairs of n rows, or `max_pairs` sampled ones."""
    if n * (n - 1) // 2 <= max_pairs:
        first, second = torch.triu_indices(n, n, offset=1)
        return first, second
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(n, (max_pairs,), generator=generator)
    return first, (first + torch.randint(1, n, (max_pairs,), generator=generator)) % n


def _cosines(directions: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Cosines [pairs] of unit rows [n, F] for pairs of indices; by one matrix product if that is less work."""
    n = len(directions)
    if n * n <= 4 * len(first):
        return (directions @ directions.T)[first, second]
    pairs = zip(first.split(_PAIRS), second.split(_PAIRS), strict=True)
    return torch.cat([(directions[a] * directions[b]).sum(1) for a, b in pairs])


def _percentile(values: Tensor, fraction: float) -> float:
    """The element of `values` [n], sorted in ascending order, with the rank ``fraction * n``, rounded, at least 1."""
    return float(values.kthvalue(max(round(fraction * len(values)), 1)).values)


def _participation(rows: Tensor) -> float:
    """``trace(C)^2 / trace(C^2)`` for the covariance C of rows [n, F], by the smaller Gram matrix; NaN if C = 0."""
    centred = rows - rows.mean(0)
    gram = centred @ centred.T if len(rows) < rows.shape[1] else centred.T @ centred
    gram = gram.double()
    return float(gram.trace() ** 2 / gram.square().sum())


def _roles(ids: Tensor, tokenizer: Any) -> dict[str, Tensor]:
    """Role -> bool mask [B, S - 1] of the positions whose token has it; a position's loss is that of the next token."""
    inputs = ids[:, :-1]
    if tokenizer is None:
        return {"all": torch.ones_like(inputs, dtype=torch.bool)}
    # Byte-level BPE and SentencePiece mark tokens that follow a space; WordPiece marks those that do not.
    vocabulary = tokenizer.get_vocab()
    marks_spaces = "Ġ" in vocabulary or "▁" in vocabulary
    kinds = {i: _role(tokenizer, i, marks_spaces) for i in inputs.unique().tolist()}
    names = ["first", "word", "rest", "number", "other"]
    coded = torch.tensor([[names.index(kinds[i]) for i in row] for row in inputs.tolist()])
    coded[:, 0] = 0
    return {name: coded == code for code, name in enumerate(names)}


def _role(tokenizer: Any, token: int, marks_spaces: bool) -> str:
    """The role of a token id by its text: `word` (the beginning of one), `rest` (of a word), `number` or `other`.

    `marks_spaces`: the tokenizer marks the beginning of words by "Ġ" or "▁", not the rest by "##".
    """
    symbol, text = tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token]).strip()
    if text.isalpha() or text.removeprefix("##").isalpha():
        begins = symbol[:1] in ("Ġ", "▁") if marks_spaces else symbol[:2] != "##"
        return "word" if begins else "rest"
    return "number" if text.isdigit() else "other"
