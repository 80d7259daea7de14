"""Persistent edits of the rows of STEM embedding tables; an edit can be reverted, saved and loaded.

A STEM layer has an embedding table U with a row ``U[t]`` for each token id t in place of its up-projection. F is the
width of a table, `intermediate_size`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_efficient.editing.stem_tables import check_tokens, read_rows, stem_base_model, table_weights
from hf_efficient.errors import HFEError, error_text

_FORMAT = "hfe_stem_edit"


class EditConflictError(HFEError, RuntimeError):
    """The rows of the tables differ from those that an edit expects."""


def stem_edit_rows(
    model: nn.Module,
    rows: Mapping[int, int | Sequence[int] | Tensor],
    layers: Sequence[int] | None = None,
    scale: float = 1.0,
) -> StemEdit:
    """Replace the table rows of tokens in place, for prompts and generated text, until the edit is reverted.

    ``U[s] += scale * (r - U[s])``, for every layer in `layers`; with the default scale ``U[s] = r``, bit for bit.

    Args:
        model: a STEM model, also inside a PEFT model or with a task head, also of a class that was loaded with
            `trust_remote_code=True`.
        rows: token id s -> r, as a token id, whose row it is; several token ids, whose mean row it is; or a tensor [F],
            or [len(layers), F] with one row for each layer. All are read before any is written, so that two tokens
            can exchange their rows.
        layers: indices of STEM layers; None for all, in ascending order.
        scale: the fraction of the way from U[s] to r, computed in float64; 0 changes nothing.

    Returns:
        The edit, applied; it can be reverted and saved.

    Raises:
        HFEError: `model` is no STEM model, `rows` or a value is empty, a token is outside the vocabulary, a layer has
            no table that can be edited (see `table_weights`), or a tensor has a wrong shape or is not of floats.
    """
    base_model = stem_base_model(model)
    weights = table_weights(base_model, layers)
    ids = check_tokens(base_model, list(rows))
    before = read_rows(weights, ids)
    targets = replacement_rows(base_model, weights, rows)
    after = {
        layer: (row if scale == 1 else torch.lerp(before[layer].double(), row.double(), scale)).to(row.dtype)
        for layer, row in targets.items()
    }
    edit = StemEdit(base_model, ids, before, after, len(next(iter(weights.values()))))
    edit.apply()
    return edit


def stem_inject(
    model: nn.Module, ids: int | Sequence[int], deltas: Tensor, layers: Sequence[int] | None = None
) -> StemEdit:
    """Add vectors to the table rows of tokens in place: ``U[ids] += deltas``; returns the edit, which can be reverted.

    Args:
        model: as for `stem_edit_rows`.
        ids: one token id, or n different ones.
        deltas: floats [F] for all tokens and layers; [n, F] for all layers; or [len(layers), n, F], for n = 1 also
            [len(layers), F]. The sum is computed in float64 and rounded to the table's dtype.
        layers: STEM layers; None for all, in ascending order.

    Raises:
        HFEError: as for `stem_edit_rows`; or a token is named twice.
    """
    base_model = stem_base_model(model)
    weights = table_weights(base_model, layers)
    tokens = check_tokens(base_model, [ids] if isinstance(ids, int) else list(ids))
    if len(set(tokens)) != len(tokens):
        raise HFEError(f"tokens {tokens} must be different", "add the vectors for one token up")
    before = read_rows(weights, tokens)
    added = matrix_for_layers("deltas", deltas, weights, len(tokens))
    after = {layer: (old.double() + added[layer].double()).to(old.dtype) for layer, old in before.items()}
    edit = StemEdit(base_model, tokens, before, after, len(next(iter(weights.values()))))
    edit.apply()
    return edit


def stem_load_edit(model: nn.Module, path: str | Path) -> StemEdit:
    """Load an edit that `StemEdit.save` wrote, for this model. The tables do not change until its `apply` or `revert`.

    Raises:
        HFEError: `model` is no STEM model; the file cannot be read or is not such an edit, or names layers or tokens
            that the model does not have; or a table cannot be edited (see `table_weights`).
    """
    return StemEdit.load(path, stem_base_model(model))


class StemEdit:
    """Rows of the tables before and after an edit; from `stem_edit_rows`, `stem_inject` or `stem_load_edit`.

    Attributes:
        ids: the n token ids whose rows it changes.
        before, after: layer -> the rows [n, F] in the dtype of the table, on the CPU.
        table_rows: number of rows of the whole table.
    """

    def __init__(
        self, base_model: Any, ids: list[int], before: dict[int, Tensor], after: dict[int, Tensor], table_rows: int
    ) -> None:
        self._base_model = base_model
        self.ids, self.before, self.after, self.table_rows = ids, before, after, table_rows

    @property
    def layers(self) -> list[int]:
        """The layers whose tables this edit changes."""
        return list(self.before)

    def revert(self) -> None:
        """Write the old rows back, bit for bit.

        Raises:
            EditConflictError: the tables no longer have the rows that the edit wrote: they were trained, edited again,
                reverted already, resized or cast. Nothing is changed then.
            HFEError: a table can no longer be edited, e.g. after quantization (see `table_weights`).
        """
        self._exchange(self.after, self.before, "revert later edits first, or load the checkpoint again")

    def apply(self) -> None:
        """Write the new rows, after `revert` or for an edit from a file.

        Raises:
            EditConflictError: the tables do not have the rows that the edit was made from. Nothing is changed then.
            HFEError: as for `revert`.
        """
        self._exchange(self.before, self.after, "apply an edit to the rows that it was made from")

    def _exchange(self, expected: dict[int, Tensor], new: dict[int, Tensor], remedy: str) -> None:
        """Replace the rows `expected` by `new`, both by layer [n, F]; errors as for `apply` and `revert`."""
        weights = table_weights(self._base_model, self.layers)
        for layer, found in self._current(weights, remedy).items():
            different = (_bits(found) != _bits(expected[layer])).any(1)
            if different.any():
                tokens = [self.ids[k] for k in different.nonzero().flatten().tolist()]
                raise EditConflictError(
                    f"layer {layer} has other rows at tokens {tokens} than expected: they were trained or edited",
                    remedy,
                )
        index = torch.tensor(self.ids)
        for layer, weight in weights.items():
            if weight.is_pinned():  # kernels of an earlier call may still read it
                torch.cuda.synchronize()
            rows = new[layer].to(weight.device)
            weight.detach().index_copy_(0, index.to(weight.device), rows)
        self._base_model.refresh_rows(index)

    def _current(self, weights: dict[int, nn.Parameter], remedy: str) -> dict[int, Tensor]:
        """Layer -> current rows at `ids` [n, F]; `EditConflictError` if a table has another shape or dtype."""
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
        """Write the edit (the rows before and after, exactly) to the safetensors file `path`, replacing it."""
        tensors = {"ids": torch.tensor(self.ids)}
        for layer in self.layers:
            tensors[f"layers.{layer}.before"] = self.before[layer]
            tensors[f"layers.{layer}.after"] = self.after[layer]
        metadata = {"format": _FORMAT, "layers": json.dumps(self.layers), "table_rows": str(self.table_rows)}
        save_file(tensors, path, metadata)

    @classmethod
    def load(cls, path: str | Path, base_model: Any) -> StemEdit:
        """See `stem_load_edit`, also for errors; `base_model` is the `StemModel`, found by `stem_base_model`."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise HFEError(
                        f"{Path(path).name} is a safetensors file, but not a STEM edit", "name one of save()"
                    )
                layers = json.loads(metadata["layers"])
                before, after = (
                    {layer: file.get_tensor(f"layers.{layer}.{part}") for layer in layers}
                    for part in ("before", "after")
                )
                ids = file.get_tensor("ids").tolist()
                table_rows = int(metadata["table_rows"])
        # Metadata that is missing or malformed gives the last three.
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise HFEError(
                f"cannot read the edit {path}: {error_text(error, named=True)}", "name a file that StemEdit.save wrote"
            ) from None
        table_weights(base_model, layers)
        return cls(base_model, check_tokens(base_model, ids), before, after, table_rows)


def replacement_rows(
    base_model: Any, weights: Mapping[int, Tensor], rows: Mapping[int, int | Sequence[int] | Tensor]
) -> dict[int, Tensor]:
    """Layer -> the rows [n, F] that the n values of `rows` describe (see `stem_edit_rows`), in the dtype of its table.

    `weights` are the tables by layer. Errors as for `stem_edit_rows`.
    """
    result: dict[int, list[Tensor]] = {layer: [] for layer in weights}
    for token, value in rows.items():
        if isinstance(value, Tensor):
            given = matrix_for_layers(f"the row for token {token}", value, weights, 1)
            one = {layer: row[0] for layer, row in given.items()}
        else:
            targets = check_tokens(base_model, list(value) if isinstance(value, Sequence) else [value])
            one = {layer: _mean(several) for layer, several in read_rows(weights, targets).items()}
        for layer, row in one.items():
            result[layer].append(row.to(weights[layer].dtype))
    return {layer: torch.stack(several) for layer, several in result.items()}


def matrix_for_layers(name: str, given: Tensor, weights: Mapping[int, Tensor], n: int) -> dict[int, Tensor]:
    """Layer -> rows [n, F] on the CPU, from `given` [F], [n, F] or [len(layers), n, F]; for n = 1 also
    [len(layers), F].

    Raises:
        HFEError: another shape, or no floating-point dtype; the message calls the tensor `name`.
    """
    width = next(iter(weights.values())).shape[1]
    count = len(weights)
    given = given.detach().cpu()
    shapes = {(width,), (n, width), (count, n, width)} | ({(count, width)} if n == 1 else set())
    if tuple(given.shape) not in shapes or not given.is_floating_point():
        raise HFEError(
            f"{name} is {given.dtype} of shape {list(given.shape)}; expected are floats of one of the shapes "
            f"{sorted(map(list, shapes), key=len)}",
            "correct it",
        )
    if given.shape == (count, width) and n == 1:
        given = given[:, None]
    return dict(zip(weights, given.expand(count, n, width), strict=True))


def _mean(rows: Tensor) -> Tensor:
    """Mean [F] of rows [n, F] in their dtype; a single row is returned as it is, bit for bit."""
    return rows[0] if len(rows) == 1 else rows.mean(0, dtype=torch.float64).to(rows.dtype)


def _bits(rows: Tensor) -> Tensor:
    """The bytes of rows [n, F] as uint8 [n, F * itemsize], to compare NaN and signed zeros exactly."""
    return rows.contiguous().view(torch.uint8)
