"""Temporary knowledge edits: inside a context, positions of a prompt use the embedding rows of other tokens.

A STEM layer has an embedding table with a row [F] for each token id in place of its up-projection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hf_efficient.editing.stem_edit_plan import StemEditPlan
from hf_efficient.editing.stem_tables import check_tokens, stem_base_model, table_weights
from hf_efficient.errors import HFEError
from hf_efficient.logging import get_logger
from hf_efficient.modeling.stem.token_rows import TokenRows


@contextmanager
def stem_override(
    model: nn.Module, plan: StemEditPlan | Sequence[StemEditPlan], row: int | Sequence[int] | None = None
) -> Iterator[None]:
    """Context: `model` and `generate` use the embedding rows that the plans name; no weight changes.

        with hf_efficient.stem_override(model, plan):
            model.generate(**tokenizer(prompt, return_tensors="pt"))

    A plan changes the prompt only: generated tokens use their own rows. Left padding is accounted for, all beams and
    returned sequences of a prompt are edited, and a prompt may be processed in chunks with a cache. Contexts nest; if
    two plans name the same position, the inner one applies. On exit without an error, a plan that
    no call used is logged as a warning.

    Args:
        model: a STEM model, also inside a PEFT model or with a task head, also of a class that was loaded with
            `trust_remote_code=True`.
        plan: from `stem_edit_plan`; one, or a sequence of them.
        row: batch row of the prompt that the plan is for, 0 by default; for several plans one each, by default 0, 1, 2.

    Raises:
        HFEError: `model` is no STEM model; a plan names a layer outside `config.stem_layers`, no token or one outside
            the vocabulary; a table cannot be used (see `table_weights`); or `row` does not name a row of at least 0
            for each plan. From the forward call: the batch has no such row, another token is at a position, or a prompt
            is processed inside torch.compile or a CUDA graph capture.
    """
    base_model = stem_base_model(model)
    plans = [plan] if isinstance(plan, StemEditPlan) else list(plan)
    rows = [row] if isinstance(row, int) else list(range(len(plans)) if row is None else row)
    if len(rows) != len(plans) or any(r < 0 for r in rows):
        raise HFEError(f"row={row} does not name a row for each of {len(plans)} plans", "give one row for each")
    overrides = tuple(_make_override(base_model, p, r) for p, r in zip(plans, rows, strict=True))
    base_model.row_provider = OverrideProvider((*_active_overrides(base_model), *overrides))
    try:
        yield
    finally:
        # Compared by identity, since equal plans may be open twice.
        remaining = tuple(o for o in _active_overrides(base_model) if not any(o is mine for mine in overrides))
        base_model.row_provider = OverrideProvider(remaining) if remaining else None
    for override in overrides:
        if not override.applied:
            get_logger().warning(
                "no call contained positions %s of row %d, so %r was not replaced",
                list(override.plan.positions),
                override.row,
                override.plan.source,
            )


@dataclass
class Override:
    """A plan that is active on one batch row.

    Attributes:
        plan: what is replaced.
        row: batch row of the prompt, in the call of `generate` or of the model.
        layers: indices of the STEM layers that it applies to.
        applied: set to True when a call contained any of its positions.
    """

    plan: StemEditPlan
    row: int
    layers: frozenset[int]
    applied: bool = False


def _make_override(base_model: Any, plan: StemEditPlan, row: int) -> Override:
    """The override of a plan on batch row `row`; `HFEError` as `check_tokens` (replacements) and `table_weights`."""
    check_tokens(base_model, [token for tokens in plan.replacements for token in tokens])
    return Override(plan, row, frozenset(table_weights(base_model, plan.layers)))


def _active_overrides(base_model: Any) -> tuple[Override, ...]:
    """The overrides that are active on a `StemModel`, outermost first."""
    return () if base_model.row_provider is None else base_model.row_provider.overrides


@dataclass(frozen=True)
class OverrideProvider:
    """The `row_provider` of a `StemModel` inside `stem_override`: a callable that gives the layers their token inputs.

    Attributes:
        overrides: the active overrides; a later one replaces earlier ones at the same position.
    """

    overrides: tuple[Override, ...]

    def __call__(
        self,
        base_model: Any,
        token_ids: Tensor,
        look_up: Callable[[Tensor], Any],
        *,
        prompt_rows: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
    ) -> Any:
        """The token inputs of the layers in this call, for ids [B, S]: `OverriddenRows`, or the ordinary ones.

        Args:
            base_model: the `StemModel` that is called.
            look_up: starts the ordinary look-up of ids; returns the ids, or a `TokenRows` if rows are prefetched.
            prompt_rows: [B], index of the prompt that each batch row is a copy of; None if each row is a prompt.
            attention_mask, position_ids, past_key_values: arguments of the model's call.

        Raises:
            HFEError: see `replacements_of_call`.
        """
        replacements = replacements_of_call(
            self.overrides, token_ids, prompt_rows, attention_mask, position_ids, past_key_values
        )
        if not replacements:
            return look_up(token_ids)
        layer_of = {id(base_model.layers[i].mlp.stem_embed): i for i in base_model.config.stem_layers}
        return OverriddenRows(token_ids, replacements, look_up, layer_of)


@dataclass(frozen=True)
class Replacement:
    """One edited element of a call: at `(row, index)` of the ids [B, S], `layers` use the mean row of `tokens`."""

    row: int
    index: int
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
    """The replacements of a call for ids [B, S], and marks their overrides as applied; empty if it has no position.

    Args:
        overrides: the active overrides; the result has their order.
        prompt_rows: [B], index of the prompt that each row is a copy of; None if each row is a prompt.
        attention_mask, position_ids, past_key_values: arguments of the call, from which the left padding and the part
            of the prompt in this call follow.

    Raises:
        HFEError: the batch does not have the row, a position has another token than in the plan, or more than one token
            is processed inside torch.compile or a CUDA graph capture.
    """
    if torch.compiler.is_compiling() or (token_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        if token_ids.shape[1] > 1:
            raise HFEError(
                "stem_override works in eager calls only", "call the model without torch.compile inside stem_override"
            )
        return []  # a decoding step; only prompts are edited
    length = token_ids.shape[1]
    past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    result = []
    for override in overrides:
        plan = override.plan
        for row in _rows_of_prompt(override.row, len(token_ids), prompt_rows):
            shift = _padding(row, past + length, attention_mask, position_ids) - past
            for position, source, tokens in zip(plan.positions, plan.source_ids, plan.replacements, strict=True):
                index = position + shift
                if not 0 <= index < length:
                    continue
                actual = int(token_ids[row, index])
                if actual != source:
                    raise HFEError(
                        f"row {row} has token {actual} at position {position} (index {index + past} with padding), the "
                        f"plan to replace {plan.source!r} by {plan.target!r} expects {source}",
                        "call the model with the prompt that the plan was made for, tokenised the same way",
                    )
                result.append(Replacement(row, index, tokens, override.layers))
                override.applied = True
    return result


def _rows_of_prompt(prompt: int, rows: int, prompt_rows: Tensor | None) -> list[int]:
    """Batch rows that are copies of a prompt, such as its beams; `HFEError` if there are none."""
    result = [prompt] if prompt_rows is None else (prompt_rows == prompt).nonzero().flatten().tolist()
    if not result or result[-1] >= rows:
        raise HFEError(f"stem_override names row {prompt}, the batch has {rows} rows", "correct the row")
    return result


def _padding(row: int, length: int, attention_mask: Any, position_ids: Tensor | None) -> int:
    """Number of left padding tokens of a batch row; `length` is the number of tokens in the cache and the call."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return int((attention_mask[row] != 0).to(torch.int8).argmax())
    if position_ids is None:
        return 0
    # A 4D mask, as prepared for static caches: the position of the last token is the number of tokens before it.
    last = int(position_ids[min(row, len(position_ids) - 1), -1])
    return max(length - 1 - last, 0)


class OverriddenRows(TokenRows):
    """`TokenRows` (the distinct ids of a call, and for each id its slot among them) with replaced rows.

    Each replaced element of the ids gets a slot of its own. The tokens whose rows replace others are appended to the
    ids of the call, so that they are fetched together.

    Shapes: P elements are replaced by R replacements, each the mean of at most G tokens; u distinct ids.

    Args:
        ids: token ids of the call [B, S].
        replacements: a later one applies in place of earlier ones at the same element and layer.
        look_up: starts the ordinary look-up of ids; returns the ids, or a `TokenRows` if rows are prefetched.
        layer_of: `id(table module)` -> index of its layer.
    """

    def __init__(
        self,
        ids: Tensor,
        replacements: list[Replacement],
        look_up: Callable[[Tensor], Any],
        layer_of: dict[int, int],
    ) -> None:
        places = sorted({(r.row, r.index) for r in replacements})
        max_tokens = max(len(r.tokens) for r in replacements)
        tokens = [[*r.tokens, *r.tokens[:1] * (max_tokens - len(r.tokens))] for r in replacements]
        wanted = torch.tensor(tokens, dtype=ids.dtype, device=ids.device)
        extended = torch.cat((ids.flatten(), wanted.flatten()))
        fetched = look_up(extended)
        # Not tested by class: a model that was loaded with trust_remote_code=True has a TokenRows of its own.
        self._inner = TokenRows(extended) if isinstance(fetched, Tensor) else fetched
        self.ids, self.merged, self.distinct = ids, self._inner.merged, self._inner.distinct
        self._layer_of = layer_of

        self._wanted = wanted  # [R, G]
        own, self._wanted_slots = self._inner.slots.split((ids.numel(), wanted.numel()))
        counts = torch.tensor([len(r.tokens) for r in replacements], device=ids.device)
        self._counts = counts[:, None]
        self._counted = torch.arange(max_tokens, device=ids.device) < self._counts  # [R, G], False for filled-up tokens
        self._rows, self._indices = torch.tensor(places, device=ids.device).unbind(1)
        slots = own.view(ids.shape).clone()
        self._own = slots[self._rows, self._indices]  # slots of the places' own rows [P]
        slots[self._rows, self._indices] = len(self.distinct) + torch.arange(len(places), device=ids.device)
        self.slots = slots
        # By layer, the replacement that applies at each place [P], -1 where none does.
        self._applied: dict[int, Tensor] = {}
        for layer in set(layer_of.values()):
            last = {(r.row, r.index): n for n, r in enumerate(replacements) if layer in r.layers}
            self._applied[layer] = torch.tensor([last.get(place, -1) for place in places], device=ids.device)

    def rows(self, table: nn.Embedding) -> Tensor:
        """Rows of `table` [u + P, F], indexed by `slots`: those of the distinct ids, then of each replaced element."""
        differentiable = torch.is_grad_enabled() and table.weight.requires_grad
        rows = table(self.distinct) if differentiable and not table.sparse else self._inner.rows(table)
        wanted = rows[self._wanted_slots].view(*self._wanted.shape, -1)
        return torch.cat((rows, self._replaced(wanted, rows[self._own], table)))

    def look_up(self, table: nn.Module) -> Tensor:
        """Rows [B, S, F], by calling the table's module, so that adapters and hooks on it take effect."""
        rows = table(self.ids)
        places = (self._rows, self._indices)
        return rows.index_put(places, self._replaced(table(self._wanted), rows[places], table))

    def to(self, device: torch.device | str, **kwargs: Any) -> OverriddenRows:
        """A copy on another device, which accelerate's hooks request for layers on other devices; ignores `kwargs`."""
        if self.slots.device == torch.device(device):
            return self
        moved = copy.copy(self)
        moved._inner = copy.copy(self._inner)
        for part in (moved, moved._inner):
            for name, value in vars(part).items():
                if isinstance(value, Tensor):
                    setattr(part, name, value.to(device))
        moved._applied = {layer: applied.to(device) for layer, applied in self._applied.items()}
        return moved

    def _replaced(self, wanted: Tensor, own: Tensor, table: nn.Module) -> Tensor:
        """The rows of the replaced elements in one table [P, F], from replacing rows [R, G, F] and own rows [P, F].

        An element without a replacement in the table's layer keeps its own row.
        """
        wide = torch.float64 if wanted.dtype == torch.float64 else torch.float32
        mean = torch.where(self._counted[..., None], wanted, 0).sum(1, dtype=wide) / self._counts
        # A single row is copied, not computed, so that it equals the table's bit for bit.
        replacing = torch.where(self._counts == 1, wanted[:, 0], mean.to(wanted.dtype))
        applied = self._applied[self._layer_of[id(table)]]
        return torch.where((applied >= 0)[:, None], replacing[applied.clamp(min=0)], own)
