"""Persistent edits of table rows, which know the rows before and after, so that they can be taken back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_efficient.errors import HFEError, TokenIdError

_FORMAT = "hfe_stem_edit"


class EditConflictError(HFEError, RuntimeError):
    """The tables hold other rows than the edit knows."""


class StemEdit:
    """Rows of the tables before and after an edit; from `stem_edit_rows`, `stem_inject` or `stem_load_edit`.

    Attributes:
        ids: the tokens whose rows it changes [n].
        before, after: by layer, the rows [n, F] in the dtype of the table, on the CPU.
        table_rows: rows of the whole table.
    """

    def __init__(
        self, model: Any, ids: list[int], before: dict[int, Tensor], after: dict[int, Tensor], table_rows: int
    ) -> None:
        self._model = model
        self.ids, self.before, self.after, self.table_rows = ids, before, after, table_rows

    @property
    def layers(self) -> list[int]:
        """The layers whose tables it changes."""
        return list(self.before)

    def revert(self) -> None:
        """Put the old rows back, bit for bit.

        Raises:
            EditConflictError: the rows are not those that the edit wrote, since they were trained, edited again,
                reverted already, or the tables resized or cast; nothing is changed then.
        """
        self._exchange(self.after, self.before, "revert later edits first, or load the checkpoint again")

    def apply(self) -> None:
        """Write the new rows: again after `revert`, or of an edit from a file. Raises as `revert` does."""
        self._exchange(self.before, self.after, "apply an edit to the rows that it was made from")

    def _exchange(self, expected: dict[int, Tensor], wanted: dict[int, Tensor], remedy: str) -> None:
        weights = table_weights(self._model, self.layers)
        for layer, found in self._current(weights, remedy).items():
            different = (_bits(found) != _bits(expected[layer])).any(1)
            if different.any():
                tokens = [self.ids[k] for k in different.nonzero().flatten().tolist()]
                raise EditConflictError(
                    f"layer {layer} has other rows at tokens {tokens} than the edit knows: they were trained or edited",
                    remedy,
                )
        index = torch.tensor(self.ids)
        for layer, weight in weights.items():
            if weight.is_pinned():  # the device may still be reading for an earlier call
                torch.cuda.synchronize()
            rows = wanted[layer].to(weight.device)
            weight.detach().index_copy_(0, index.to(weight.device), rows)
        self._model.refresh_rows(index)

    def _current(self, weights: dict[int, nn.Parameter], remedy: str) -> dict[int, Tensor]:
        for layer, weight in weights.items():
            before = self.before[layer]
            now, then = (len(weight), weight.shape[1], weight.dtype), (self.table_rows, before.shape[1], before.dtype)
            if now != then:
                raise EditConflictError(
                    f"the table of layer {layer} is {list(now[:2])} {now[2]}, for the edit {list(then[:2])} {then[2]}",
                    remedy,
                )
        return read_rows(weights, self.ids)

    def save(self, path: str | Path) -> None:
        """Write the edit to a safetensors file: the rows before and after, with all their bits."""
        tensors = {"ids": torch.tensor(self.ids)}
        for layer in self.layers:
            tensors[f"layers.{layer}.before"] = self.before[layer]
            tensors[f"layers.{layer}.after"] = self.after[layer]
        metadata = {"format": _FORMAT, "layers": json.dumps(self.layers), "table_rows": str(self.table_rows)}
        save_file(tensors, path, metadata)

    @classmethod
    def load(cls, path: str | Path, model: Any) -> StemEdit:
        """The edit in a file, for `model`; nothing is changed yet."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise HFEError(f"{Path(path).name} is a safetensors file, but no STEM edit", "name one of save()")
                layers = json.loads(metadata["layers"])
                before, after = (
                    {layer: file.get_tensor(f"layers.{layer}.{part}") for layer in layers}
                    for part in ("before", "after")
                )
                ids = file.get_tensor("ids").tolist()
        except (OSError, SafetensorError) as error:
            raise HFEError(f"cannot read the edit {path}: {error}", "name a file that StemEdit.save wrote") from None
        table_weights(model, layers)
        return cls(model, check_tokens(model, ids), before, after, int(metadata["table_rows"]))


def table_weights(model: Any, layers: Iterable[int] | None) -> dict[int, nn.Parameter]:
    """Weight [V, F] of the table of each layer, under an adapter too.

    Args:
        model: base model.
        layers: None for all STEM layers.
    """
    stem_layers = model.config.stem_layers
    if not stem_layers:
        raise HFEError("the model has no STEM layers, so it has no rows to edit", "convert it with --patch stem")
    chosen = list(stem_layers if layers is None else layers)
    foreign = [layer for layer in chosen if layer not in stem_layers]
    if foreign or not chosen or len(set(chosen)) != len(chosen):
        raise HFEError(f"layers={chosen} must be different ones of the STEM layers {stem_layers}", "correct layers")
    weights = {}
    for layer in chosen:
        table, *copies = (m for m in model.layers[layer].mlp.stem_embed.modules() if isinstance(m, nn.Embedding))
        if copies:
            raise HFEError(
                f"the table of layer {layer} stands beside {len(copies)} of an adapter (modules_to_save), which acts "
                "in its place",
                "merge the adapter (merge_and_unload) before editing",
            )
        if type(table.weight) is not nn.Parameter or table.weight.is_meta:
            raise HFEError(
                f"the table of layer {layer} is not an ordinary tensor: quantised, distributed, parametrised or absent",
                "edit the checkpoint as loaded plainly",
            )
        weights[layer] = table.weight
    return weights


def check_tokens(model: Any, tokens: Sequence[int]) -> list[int]:
    """The tokens; an error where there is none, or one outside the vocabulary."""
    rows = model.vocabulary_rows()
    if not tokens:
        raise HFEError("no token is named", "name one or more token ids")
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < rows:
            raise TokenIdError(f"token {token!r} is outside 0..{rows - 1}", "name a token id of this model")
    return list(tokens)


def read_rows(weights: Mapping[int, Tensor], ids: Sequence[int]) -> dict[int, Tensor]:
    """Copies of the rows `ids` of each layer [n, F], on the CPU."""
    index = torch.tensor(ids)
    return {layer: weight.detach()[index.to(weight.device)].cpu() for layer, weight in weights.items()}


def replacement_rows(
    model: Any, weights: Mapping[int, Tensor], rows: Mapping[int, int | Sequence[int] | Tensor]
) -> dict[int, Tensor]:
    """For each layer the rows [n, F] that the values of `rows` name, in the dtype of its table."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in weights}
    for token, value in rows.items():
        if isinstance(value, Tensor):
            given = matrix_for_layers(f"the row for token {token}", value, weights, 1)
            one = {layer: row[0] for layer, row in given.items()}
        else:
            targets = check_tokens(model, list(value) if isinstance(value, Sequence) else [value])
            one = {layer: _mean(token_inputs) for layer, token_inputs in read_rows(weights, targets).items()}
        for layer, row in one.items():
            found[layer].append(row.to(weights[layer].dtype))
    return {layer: torch.stack(several) for layer, several in found.items()}


def matrix_for_layers(name: str, given: Tensor, weights: Mapping[int, Tensor], n: int) -> dict[int, Tensor]:
    """`given` [F], [n, F] or [len(layers), n, F] (for n = 1 also [len(layers), F]) as rows [n, F] of each layer."""
    width = next(iter(weights.values())).shape[1]
    count = len(weights)
    given = given.detach().cpu()
    shapes = {(width,), (n, width), (count, n, width)} | ({(count, width)} if n == 1 else set())
    if tuple(given.shape) not in shapes or not given.is_floating_point():
        raise HFEError(
            f"{name} is {given.dtype} of shape {list(given.shape)}; wanted are floats of one of the shapes "
            f"{sorted(map(list, shapes), key=len)}",
            "correct it",
        )
    if given.shape == (count, width) and n == 1:
        given = given[:, None]
    return dict(zip(weights, given.expand(count, n, width), strict=True))


def _mean(rows: Tensor) -> Tensor:
    """Mean [F] of rows [n, F], in their dtype; of one row the row itself, with all its bits."""
    return rows[0] if len(rows) == 1 else rows.mean(0, dtype=torch.float64).to(rows.dtype)


def _bits(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)
