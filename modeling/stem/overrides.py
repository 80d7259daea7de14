"""Transient edits: for a while, chosen positions of a prompt look up the rows of other tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hf_efficient.errors import HFEError
from hf_efficient.modeling.stem.edit_plan import StemEditPlan
from hf_efficient.modeling.stem.token_rows import TokenRows


@dataclass
class Override:
    """A plan at work on one row of the batch.

    Attributes:
        plan: what is replaced.
        row: of the prompts that `generate` or the model is given.
        layers: STEM layers that it acts in.
        acted: whether a call has held any of its positions.
    """

    plan: StemEditPlan
    row: int
    layers: frozenset[int]
    acted: bool = False


@dataclass(frozen=True)
class Replacement:
    """One place of a call that looks up other rows: the mean of those of `tokens`, in `layers`."""

    row: int
    column: int
    tokens: tuple[int, ...]
    layers: frozenset[int]


def replacements_of_call(
    overrides: Iterable[Override],
    token_ids: Tensor,
    prompt_rows: Tensor | None,
    attention_mask: Any,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
) -> list[Replacement]:
    """What the overrides replace in a call for ids [B, S], later ones last; empty where the call holds none of it.

    Args:
        prompt_rows: [B], the prompt that each row is a copy of; None where each row is a prompt.
        attention_mask, position_ids, past_key_values: of the call. They tell how far padding shifts a prompt, and
            which part of it comes in this call.

    Raises:
        HFEError: the batch lacks a row, or another token stands at a position than the plan was made for.
    """
    if torch.compiler.is_compiling() or (token_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        if token_ids.shape[1] > 1:
            raise HFEError("stem_override acts in eager calls only", "call the model uncompiled inside stem_override")
        return []  # a decoding step: what is replaced lies in the prompt
    columns = token_ids.shape[1]
    past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    found = []
    for override in overrides:
        plan = override.plan
        for row in _rows_of_prompt(override.row, len(token_ids), prompt_rows):
            shift = _padding(row, past + columns, attention_mask, position_ids) - past
            for position, source, tokens in zip(plan.positions, plan.source_ids, plan.replacements, strict=True):
                column = position + shift
                if not 0 <= column < columns:
                    continue
                there = int(token_ids[row, column])
                if there != source:
                    raise HFEError(
                        f"row {row} has token {there} at position {position} (column {column + past}), the plan to "
                        f"replace {plan.source!r} by {plan.target!r} expects {source}",
                        "call the model with the prompt that the plan was made for, tokenised the same way",
                    )
                found.append(Replacement(row, column, tokens, override.layers))
                override.acted = True
    return found


def _rows_of_prompt(prompt: int, rows: int, prompt_rows: Tensor | None) -> list[int]:
    """Rows of the batch that are copies of a prompt, as those of its beams are."""
    found = [prompt] if prompt_rows is None else (prompt_rows == prompt).nonzero().flatten().tolist()
    if not found or found[-1] >= rows:
        raise HFEError(f"stem_override names row {prompt}, the batch has {rows} rows", "correct the row")
    return found


def _padding(row: int, length: int, attention_mask: Any, position_ids: Tensor | None) -> int:
    """Columns of padding before the first real token of a row, among `length` columns of cache and call."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return int((attention_mask[row] != 0).to(torch.int8).argmax())
    if position_ids is None:
        return 0
    # Masks made ahead, as for static caches: the last token's position counts the real tokens before it.
    last = int(position_ids[min(row, len(position_ids) - 1), -1])
    return max(length - 1 - last, 0)


class OverriddenRows(TokenRows):
    """`TokenRows` with a row of its own for each place that is replaced.

    What stands there in place of the table's row is looked up with all else: the tokens whose rows it needs are
    appended to the ids of the call.

    Args:
        ids: token ids of the call [B, S].
        replacements: what to replace; later ones win.
        look_up: what begins a look-up of ids, and gives their `TokenRows` or, where rows need no fetching, the ids.
        layer_of: layer of each table module, by `id`.
    """

    def __init__(
        self,
        ids: Tensor,
        replacements: list[Replacement],
        look_up: Callable[[Tensor], Tensor | TokenRows],
        layer_of: dict[int, int],
    ) -> None:
        places = sorted({(r.row, r.column) for r in replacements})
        most = max(len(r.tokens) for r in replacements)
        tokens = [[*r.tokens, *r.tokens[:1] * (most - len(r.tokens))] for r in replacements]
        wanted = torch.tensor(tokens, dtype=ids.dtype, device=ids.device)
        extended = torch.cat((ids.flatten(), wanted.flatten()))
        begun = look_up(extended)
        self._inner = begun if isinstance(begun, TokenRows) else TokenRows(extended)
        self.ids, self.merged, self.distinct = ids, self._inner.merged, self._inner.distinct
        self._layer_of = layer_of

        self._wanted = wanted  # tokens whose rows replace others, in the mean [R, G]
        own, self._picked = self._inner.slots.split((ids.numel(), wanted.numel()))  # their slots, and those of the ids
        counts = torch.tensor([len(r.tokens) for r in replacements], device=ids.device)
        self._counts = counts[:, None]
        self._counted = torch.arange(most, device=ids.device) < self._counts
        self._rows, self._columns = torch.tensor(places, device=ids.device).unbind(1)
        slots = own.view(ids.shape).clone()
        self._own = slots[self._rows, self._columns]  # slots of the places' own rows [P]
        slots[self._rows, self._columns] = len(self.distinct) + torch.arange(len(places), device=ids.device)
        self.slots = slots
        # For each layer the replacement that acts at each place [P], -1 where none does.
        self._acting: dict[int, Tensor] = {}
        for layer in set(layer_of.values()):
            last = {(r.row, r.column): n for n, r in enumerate(replacements) if layer in r.layers}
            self._acting[layer] = torch.tensor([last.get(place, -1) for place in places], device=ids.device)

    def rows(self, table: nn.Embedding) -> Tensor:
        """Rows of `table` [u + P, F]: those of the distinct ids, then one for each place."""
        differentiable = torch.is_grad_enabled() and table.weight.requires_grad
        rows = table(self.distinct) if differentiable and not table.sparse else self._inner.rows(table)
        picked = rows[self._picked].view(*self._wanted.shape, -1)
        return torch.cat((rows, self._replaced(picked, rows[self._own], table)))

    def look_up(self, table: nn.Module) -> Tensor:
        """Rows [B, S, F], by calling the table's module, around which anything may stand."""
        rows = table(self.ids)
        places = (self._rows, self._columns)
        return rows.index_put(places, self._replaced(table(self._wanted), rows[places], table))

    def to(self, device: torch.device | str, **kwargs: Any) -> OverriddenRows:
        """The same on another device, for those who spread a model's layers over several."""
        if self.slots.device == torch.device(device):
            return self
        moved = copy.copy(self)
        moved._inner = copy.copy(self._inner)
        for part in (moved, moved._inner):
            for name, value in vars(part).items():
                if isinstance(value, Tensor):
                    setattr(part, name, value.to(device))
        moved._acting = {layer: acting.to(device) for layer, acting in self._acting.items()}
        return moved

    def _replaced(self, picked: Tensor, own: Tensor, table: nn.Module) -> Tensor:
        """What the places look up in one table [P, F], from the rows that replace [R, G, F] and their own [P, F]."""
        wide = torch.float64 if picked.dtype == torch.float64 else torch.float32
        mean = torch.where(self._counted[..., None], picked, 0).sum(1, dtype=wide) / self._counts
        # A single row is copied, not computed, so that every bit is the table's.
        replacing = torch.where(self._counts == 1, picked[:, 0], mean.to(picked.dtype))
        acting = self._acting[self._layer_of[id(table)]]
        return torch.where((acting >= 0)[:, None], replacing[acting.clamp(min=0)], own)
