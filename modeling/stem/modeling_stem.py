"""STEM: in chosen layers the feed-forward's up-projection is a row of a table, indexed by the token.

``h + W_down (silu(W_gate x) * U[token])``, arXiv:2601.10639, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin

from hf_efficient.errors import HFEError
from hf_efficient.kernels.stem_gate.api import stem_gate
from hf_efficient.modeling.decoder.fused_steps import SILU, is_bare, linear
from hf_efficient.modeling.decoder.modeling_decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel
from hf_efficient.modeling.stem.configuration_stem import StemConfig
from hf_efficient.modeling.stem.embedding_match import match_token_ids
from hf_efficient.modeling.stem.token_rows import TokenRows


class StemTable(nn.Embedding):
    """Table [vocab_size, intermediate_size] of one STEM layer; row t stands in for the up-projection at token t.

    Where `sparse` is True, as for any embedding, its gradient is a sparse tensor of the rows that were looked up.
    """


class StemMLP(nn.Module):
    """``down(act(gate(x)) * U[token_ids])``, plus `residual` where given.

    With `efficient` set to False the stock path ``down(act(gate(x)) * up(x))`` runs, where `stem_keep_up_proj` kept it.
    """

    def __init__(self, config: StemConfig) -> None:
        super().__init__()
        self.efficient = True
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.stem_embed = StemTable(config.vocab_size, config.intermediate_size, sparse=config.stem_sparse_grad)
        self.up_proj: nn.Linear | None = None
        if config.stem_keep_up_proj:
            self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def _can_fuse(self) -> bool:
        """True when the kernel, which reads the table's weight, does all that calling the two modules would do."""
        table = self.stem_embed
        return (
            is_bare(self.act_fn, SILU)
            and is_bare(table, (StemTable,))
            and type(table.weight) is nn.Parameter  # quantised and distributed weights have types of their own
            and not (table.scale_grad_by_freq or table.max_norm or table.padding_idx is not None)
        )

    def forward(
        self, hidden_states: Tensor, token_ids: Tensor | TokenRows | None, residual: Tensor | None = None
    ) -> Tensor:
        gate = linear(hidden_states, self.gate_proj)
        if not self.efficient:
            gated = self.act_fn(gate) * self._stock_up(hidden_states)
        elif not self._can_fuse():
            ids = token_ids.ids if isinstance(token_ids, TokenRows) else token_ids
            gated = self.act_fn(gate) * self.stem_embed(ids).to(gate.dtype)
        elif isinstance(token_ids, TokenRows):
            gated = stem_gate(gate, token_ids.rows(self.stem_embed), token_ids.slots)
        else:
            gated = stem_gate(gate, self.stem_embed.weight, token_ids)
        return linear(gated, self.down_proj, residual)

    def _stock_up(self, hidden_states: Tensor) -> Tensor:
        if self.up_proj is None:
            raise HFEError(
                "efficient=False needs the stock up-projection, which this checkpoint does not carry",
                "convert with --stem-keep-up-proj, or use the source model as the teacher",
            )
        return self.up_proj(hidden_states)


class StemPreTrainedModel(DecoderPreTrainedModel):
    config: StemConfig
    config_class = StemConfig  # transformers reads annotations unevaluated, so it is named here too

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, StemTable):
            super()._init_weights(module)
        elif self.config.stem_init_std is None:
            init.xavier_normal_(module.weight)
        else:
            init.normal_(module.weight, std=self.config.stem_init_std)

    def check_loaded(self, missing_keys: set[str], unexpected_keys: set[str]) -> None:
        super().check_loaded(missing_keys, unexpected_keys)
        tables = sorted(key for key in missing_keys if key.endswith(".stem_embed.weight"))
        if tables:
            raise HFEError(
                f"the checkpoint lacks {len(tables)} STEM tables, {tables[0]} first, so it is not a STEM checkpoint",
                "convert the stock model with `hf-efficient convert SOURCE OUTPUT --patch stem` and load OUTPUT",
            )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self._resize_tables(embeddings.num_embeddings)
        return embeddings

    @torch.no_grad()
    def _resize_tables(self, rows: int) -> None:
        """Give every table `rows` rows; a new row is the mean of the old ones."""
        for module in self.modules():
            if isinstance(module, StemTable) and module.num_embeddings != rows:
                old = module.weight
                new = old.mean(0, dtype=torch.float32).to(old.dtype).expand(max(rows - len(old), 0), -1)
                module.weight = nn.Parameter(torch.cat((old[:rows], new)), requires_grad=old.requires_grad)
                module.num_embeddings = rows


class StemModel(StemPreTrainedModel, DecoderModel):
    """Decoder with STEM feed-forwards in `config.stem_layers`.

    `forward` takes one more argument, `stem_input_ids` [B, S]: the ids to look up in place of `input_ids`, or beside
    `inputs_embeds`.
    """

    def build_mlp(self, layer_idx: int) -> nn.Module:
        return StemMLP(self.config) if layer_idx in self.config.stem_layers else super().build_mlp(layer_idx)

    def resolve_token_ids(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor | None:
        stem_input_ids = kwargs.pop("stem_input_ids", None)
        ids = super().resolve_token_ids(input_ids, inputs_embeds, kwargs) if stem_input_ids is None else stem_input_ids
        if not self.config.stem_layers:
            return ids
        self._check_tables()
        if ids is None and self.config.stem_inputs_embeds == "match":
            return match_token_ids(inputs_embeds, self.embed_tokens, self.vocabulary_rows())
        if ids is None:
            raise HFEError(
                f"inputs_embeds of shape {tuple(inputs_embeds.shape)} came without the ids that STEM layers look up",
                "pass input_ids, pass stem_input_ids beside inputs_embeds, or set config.stem_inputs_embeds to 'match'",
            )
        given = inputs_embeds if input_ids is None else input_ids
        if ids.shape != given.shape[:2]:
            raise HFEError(
                f"stem_input_ids has shape {tuple(ids.shape)}, the input has {tuple(given.shape[:2])}",
                "pass one id for each position of the input",
            )
        return ids

    def begin_lookup(self, token_ids: Tensor | None) -> Tensor | TokenRows | None:
        token_ids = super().begin_lookup(token_ids)
        tables = self._tables()
        if token_ids is None or not tables:
            return token_ids
        trained = torch.is_grad_enabled() and any(table.weight.requires_grad and table.sparse for table in tables)
        return TokenRows(token_ids) if trained else token_ids

    def _tables(self) -> list[StemTable]:
        """The tables in the order of the layers, those under an adapter left out."""
        tables = (getattr(layer.mlp, "stem_embed", None) for layer in self.layers)
        return [table for table in tables if isinstance(table, StemTable)]

    def _check_tables(self) -> None:
        rows = self.vocabulary_rows()
        for table in self._tables():
            if table.num_embeddings != rows:
                raise HFEError(
                    f"a STEM table has {table.num_embeddings} rows and the embedding has {rows}",
                    "change the vocabulary with model.resize_token_embeddings, which resizes the tables too",
                )


class StemForCausalLM(StemPreTrainedModel, DecoderForCausalLM, GenerationMixin):
    """`StemModel` and a language-model head."""

    model_class = StemModel
    prompt_arguments = frozenset({"stem_input_ids"})

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        stem_input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if stem_input_ids is None:
            return inputs
        # The ids that came with the prompt belong to it; what is generated is looked up by its own ids.
        if inputs.get("inputs_embeds") is not None:
            inputs["stem_input_ids"] = stem_input_ids[:, -inputs["inputs_embeds"].shape[1] :]
        elif inputs_embeds is None:
            ids = torch.cat((stem_input_ids, input_ids[:, stem_input_ids.shape[1] :]), dim=1)
            inputs["stem_input_ids"] = ids[:, -inputs["input_ids"].shape[1] :]
        return inputs


__all__ = ["StemConfig", "StemForCausalLM", "StemModel", "StemPreTrainedModel"]
