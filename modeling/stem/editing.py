"""Knowledge editing and injection: rows of the STEM tables replaced for a while, or until the edit is reverted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_efficient.errors import HFEError
from hf_efficient.logging import get_logger
from hf_efficient.modeling.stem.edit_plan import StemEditPlan, stem_edit_plan
from hf_efficient.modeling.stem.overrides import OverriddenRows, Override, replacements_of_call
from hf_efficient.modeling.stem.row_edit import (
    StemEdit,
    check_tokens,
    matrix_for_layers,
    read_rows,
    replacement_rows,
    table_weights,
)


class StemEditing:
    """Mixin of `StemModel` and `StemForCausalLM`: transient overrides, and edits that stay."""

    # Of the model that this is mixed into.
    config: Any
    base_model: Any
    layers: Any
    begin_lookup: Any

    stem_edit_plan = staticmethod(stem_edit_plan)

    # Of the base model, while a `stem_override` is open.
    _overrides: tuple[Override, ...] = ()

    @contextmanager
    def stem_override(
        self, plan: StemEditPlan | Sequence[StemEditPlan], row: int | Sequence[int] | None = None
    ) -> Iterator[None]:
        """Within this context calls of the model and `generate` look up what the plans say, and no weight changes.

            with model.stem_override(plan):
                model.generate(**tokenizer(prompt, return_tensors="pt"))

        A plan acts on the prompt alone: what is generated looks up its own rows. Padding is accounted for, beams and
        several returned sequences of a prompt are edited alike, and a prompt may come in pieces after a cache.
        Contexts nest; at a position that two plans name, the inner one acts.

        Args:
            plan: from `stem_edit_plan`; several at once as a sequence.
            row: the prompt of the batch that the plan is for, by default the first; for several plans one each, by
                default the first prompts in order.

        Raises:
            HFEError: a layer that is none of `config.stem_layers`, a token outside the vocabulary; and from the call,
                when the batch lacks the row or another token stands at a position.
        """
        plans = [plan] if isinstance(plan, StemEditPlan) else list(plan)
        rows = [row] if isinstance(row, int) else list(range(len(plans)) if row is None else row)
        if len(rows) != len(plans) or any(r < 0 for r in rows):
            raise HFEError(f"row={row} does not name a row for each of {len(plans)} plans", "give one row for each")
        opened = tuple(self._override(p, r) for p, r in zip(plans, rows, strict=True))
        base = self.base_model
        base._overrides = (*base._overrides, *opened)
        try:
            yield
        finally:
            # By identity: equal plans may be open twice.
            base._overrides = tuple(o for o in base._overrides if not any(o is mine for mine in opened))
        for override in opened:
            if not override.acted:
                get_logger().warning(
                    "no call held positions %s of row %d, so %r was not replaced",
                    list(override.plan.positions),
                    override.row,
                    override.plan.source,
                )

    def _override(self, plan: StemEditPlan, row: int) -> Override:
        check_tokens(self.base_model, [token for tokens in plan.replacements for token in tokens])
        return Override(plan, row, frozenset(table_weights(self.base_model, plan.layers)))

    def prepare_token_inputs(
        self,
        token_ids: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """What the layers of this call look up; see `DecoderModel.prepare_token_inputs`."""
        prompt_rows = kwargs.pop("stem_prompt_rows", None)
        if not self._overrides or token_ids is None:
            return self.begin_lookup(token_ids)
        replacements = replacements_of_call(
            self._overrides, token_ids, prompt_rows, attention_mask, position_ids, past_key_values
        )
        if not replacements:
            return self.begin_lookup(token_ids)
        layer_of = {id(self.layers[i].mlp.stem_embed): i for i in self.config.stem_layers}
        return OverriddenRows(token_ids, replacements, self.begin_lookup, layer_of)

    def stem_edit_rows(
        self,
        rows: Mapping[int, int | Sequence[int] | Tensor],
        layers: Sequence[int] | None = None,
        scale: float = 1.0,
    ) -> StemEdit:
        """Give tokens other rows, wherever they stand, also where they are generated, until the edit is reverted.

        ``U[s] += scale * (r - U[s])``, for every layer in `layers`; with the default scale ``U[s] = r``, bit for bit.

        Args:
            rows: token s -> what gives r: a token, whose row it is; several tokens, whose mean; or a tensor [F], or
                [len(layers), F] with one row for each layer. All are read before any is written, so that two tokens
                can exchange their rows.
            layers: STEM layers; None for all, in ascending order.
            scale: how far to go; 0 changes nothing.

        Returns:
            The edit, which can be reverted, and saved.

        Raises:
            HFEError: a token outside the vocabulary, a tensor of another shape, a layer without a table.
        """
        weights = table_weights(self.base_model, layers)
        ids = check_tokens(self.base_model, list(rows))
        before = read_rows(weights, ids)
        targets = replacement_rows(self.base_model, weights, rows)
        after = {
            layer: (row if scale == 1 else torch.lerp(before[layer].double(), row.double(), scale)).to(row.dtype)
            for layer, row in targets.items()
        }
        edit = StemEdit(self.base_model, ids, before, after, len(next(iter(weights.values()))))
        edit.apply()
        return edit

    def stem_inject(self, ids: int | Sequence[int], deltas: Tensor, layers: Sequence[int] | None = None) -> StemEdit:
        """Add vectors to the rows of tokens: ``U[ids] += deltas``, until the edit is reverted.

        Args:
            ids: one token, or n different ones.
            deltas: [F] for all tokens and layers; [n, F] for all layers; or [len(layers), n, F].
            layers: STEM layers; None for all, in ascending order.

        Raises: as `stem_edit_rows`.
        """
        weights = table_weights(self.base_model, layers)
        tokens = check_tokens(self.base_model, [ids] if isinstance(ids, int) else list(ids))
        if len(set(tokens)) != len(tokens):
            raise HFEError(f"tokens {tokens} must be different", "add the vectors for one token up")
        before = read_rows(weights, tokens)
        added = matrix_for_layers("deltas", deltas, weights, len(tokens))
        after = {layer: (old.double() + added[layer].double()).to(old.dtype) for layer, old in before.items()}
        edit = StemEdit(self.base_model, tokens, before, after, len(next(iter(weights.values()))))
        edit.apply()
        return edit

    def _expand_inputs_for_generation(self, **inputs: Any) -> Any:
        """As in transformers; copies of a prompt, such as its beams, know which prompt they are of."""
        if self.base_model._overrides and inputs.get("expand_size", 1) > 1:
            ids = inputs["input_ids"]
            inputs["stem_prompt_rows"] = torch.arange(len(ids), device=ids.device)
        return super()._expand_inputs_for_generation(**inputs)

    def stem_load_edit(self, path: Any) -> StemEdit:
        """An edit that `StemEdit.save` wrote, for this model: `apply` does it, `revert` takes it back.

        Raises:
            HFEError: the file is no such edit, or of a model with other tables.
        """
        return StemEdit.load(path, self.base_model)
