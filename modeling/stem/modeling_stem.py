"""STEM: in chosen layers the feed-forward's up-projection is replaced by a row of a table, indexed by the token.

``h + W_down (silu(W_gate x) * U[token])``, arXiv:2601.10639, section 3.
"""

from __future__ import annotations

# ruff: noqa: E402  (an old transformers fails on an import below; this check first names the releases that work)
from hf_efficient.modeling.base.tested_releases import check_transformers

check_transformers()

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin

from hf_efficient.errors import HFEError
from hf_efficient.kernels.stem_gate.api import stem_gate
from hf_efficient.modeling.decoder.fused_steps import SILU, is_bare, linear
from hf_efficient.modeling.decoder.modeling_decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel
from hf_efficient.modeling.decoder.task_heads import (
    DecoderForQuestionAnswering,
    DecoderForSequenceClassification,
    DecoderForTokenClassification,
)
from hf_efficient.modeling.stem.configuration_stem import StemConfig
from hf_efficient.modeling.stem.embedding_match import match_token_ids
from hf_efficient.modeling.stem.stem_table import StemTable, single_device
from hf_efficient.modeling.stem.table_files import find_tensors, hub_arguments
from hf_efficient.modeling.stem.table_offload import TableFetcher
from hf_efficient.modeling.stem.token_rows import TokenRows

# Attention implementations of serving engines, which build models of their own from the configuration.
_ENGINES = ("vllm", "sglang")
_TABLE_KEY = r"\.stem_embed\.weight$"
# Not attributes of the models, because models are copied and pickled, and a CUDA stream can be neither.
_FETCHERS: WeakKeyDictionary[nn.Module, TableFetcher] = WeakKeyDictionary()


class StemMLP(nn.Module):
    """``down(act(gate(x)) * U[token_ids])`` with the table U [vocab_size, intermediate_size].

    With `efficient` set to False the stock path ``down(act(gate(x)) * up(x))`` runs; it needs the up-projection that
    `stem_keep_up_proj` keeps.
    """

    def __init__(self, config: StemConfig) -> None:
        super().__init__()
        self.efficient = True
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.stem_embed = StemTable(
            config.vocab_size, config.intermediate_size, config.stem_sparse_grad, config.stem_offload
        )
        self.up_proj: nn.Linear | None = None
        if config.stem_keep_up_proj:
            self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def _can_fuse(self, token_inputs: Tensor | TokenRows | None) -> bool:
        """True if the fused kernel, which reads the table's weight, may replace the calls of activation and table."""
        table = self.stem_embed
        return (
            is_bare(self.act_fn, SILU)
            and is_bare(table, (StemTable,))
            and type(table.weight) is nn.Parameter  # quantized and distributed weights have other types
            and (not isinstance(token_inputs, Tensor) or table.weight.device == token_inputs.device)
            and not (table.scale_grad_by_freq or table.max_norm or table.padding_idx is not None)
        )

    def forward(
        self, hidden_states: Tensor, token_ids: Tensor | TokenRows | None, residual: Tensor | None = None
    ) -> Tensor:
        """Return the feed-forward's output [B, S, hidden_size], plus `residual` if it is given.

        Args:
            hidden_states: [B, S, hidden_size].
            token_ids: ids [B, S] that index the table, or their rows from `StemModel.begin_lookup`; not read if
                `efficient` is False, otherwise not None.
            residual: [B, S, hidden_size].

        Raises:
            HFEError: `efficient` is False and the checkpoint has no up-projection, or the table has no weight.
        """
        gate = linear(hidden_states, self.gate_proj)
        if not self.efficient:
            gated = self.act_fn(gate) * self._stock_up(hidden_states)
        elif not self._can_fuse(token_ids):
            table = self.stem_embed
            rows = table(token_ids) if isinstance(token_ids, Tensor) else token_ids.look_up(table)
            gated = self.act_fn(gate) * rows.to(gate.dtype)
        elif isinstance(token_ids, Tensor):
            gated = stem_gate(gate, self.stem_embed.weight, token_ids)
        else:
            gated = stem_gate(gate, token_ids.rows(self.stem_embed), token_ids.slots)
        return linear(gated, self.down_proj, residual)

    def _stock_up(self, hidden_states: Tensor) -> Tensor:
        """Return the stock up-projection of [B, S, hidden_size]; `HFEError` if the checkpoint does not have it."""
        if self.up_proj is None:
            raise HFEError(
                "efficient=False needs the stock up-projection, which this checkpoint does not have",
                "convert with --stem-keep-up-proj, or use the source model as the teacher",
            )
        return self.up_proj(hidden_states)


class StemPreTrainedModel(DecoderPreTrainedModel):
    """Initialisation, loading, checks and saving that `StemModel` and the models with a head share."""

    config: StemConfig
    config_class = StemConfig  # set too: transformers does not resolve the string annotation above

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module in place; transformers calls it for those that have no weights in the checkpoint."""
        if not isinstance(module, StemTable):
            super()._init_weights(module)
        elif module.weight is None:
            return
        elif self.config.stem_init_std is None:
            init.xavier_normal_(module.weight)
        else:
            init.normal_(module.weight, std=self.config.stem_init_std)

    def post_init(self) -> None:
        """As in transformers; with `stem_offload="disk"`, loading skips the tables of the checkpoint.

        Raises:
            HFEError: a serving engine loads a model with offloaded tables.
        """
        placement, attention = self.config.stem_offload, self.config._attn_implementation
        if placement != "none" and attention in _ENGINES:
            raise HFEError(
                f"config.json has stem_offload={placement!r}, and {attention} loads and places the tables itself",
                "set it to 'none', as vLLM does with --hf-overrides '{\"stem_offload\": \"none\"}'",
            )
        if placement == "disk":  # the tables have no weight until they are mapped
            self._keys_to_ignore_on_load_unexpected = [_TABLE_KEY]
        super().post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; with `stem_offload`, the tables are never moved to the device of `device_map`.

        Raises:
            HFEError: `stem_offload` together with tensor parallelism, several devices, or weights not in safetensors;
                the checkpoint lacks tables or has tables of another shape; and the errors of `DecoderPreTrainedModel`.
        """
        source = pretrained_model_name_or_path  # the parameter's name is that of transformers, for keyword calls
        placement = cls._requested_placement(source, kwargs)
        if placement == "none":
            return super().from_pretrained(source, *args, **kwargs)
        if kwargs.get("tp_plan") or kwargs.get("distributed_config"):
            raise HFEError(
                f"stem_offload={placement!r} keeps whole tables beside one device, and tensor parallelism splits them",
                "choose one of the two",
            )
        if placement == "disk" and (source is None or kwargs.get("use_safetensors") is False):
            raise HFEError(
                "stem_offload='disk' maps the tables from a checkpoint's safetensors files, and none are loaded here",
                "name a checkpoint with safetensors, or load it with stem_offload='cpu'",
            )
        # With a device map, accelerate's hooks would copy whole tables to the device.
        device = single_device(kwargs.pop("device_map", None))
        loaded = super().from_pretrained(source, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if placement == "disk":
            model._map_tables(source, kwargs)
        if device is not None:
            model.to(device)
        return loaded

    @classmethod
    def _requested_placement(cls, source: Any, arguments: dict[str, Any]) -> str:
        """Return `stem_offload` of the keyword arguments of `from_pretrained`, else of the configuration.

        Without a `config` among them, config.json of `source` is read.
        """
        config = arguments.get("config")
        if "stem_offload" in arguments:
            return arguments["stem_offload"]
        if config is None and source is not None:
            config, _ = cls.config_class.get_config_dict(source, **hub_arguments(arguments))
        return (config.get if isinstance(config, dict) else partial(getattr, config))("stem_offload", "none")

    def _map_tables(self, source: Any, arguments: dict[str, Any]) -> None:
        """Map each table from the files that the rest of the model was loaded from.

        Args:
            source: the first argument of `from_pretrained`.
            arguments: its keyword arguments.

        Raises:
            HFEError: a table is missing (see `find_tensors`) or has another shape (see `StemTable.map_from`).
        """
        tables = {f"{name}.weight": m for name, m in self.base_model.named_modules() if isinstance(m, StemTable)}
        hub, loaded = hub_arguments(arguments), self.config.name_or_path
        if str(source) != str(loaded):  # `source` is an adapter; its revision is not that of the base model
            hub.pop("revision", None)
        fields = {"transformers_weights": getattr(self.config, "transformers_weights", None)}
        for name, place in find_tensors(loaded, tables, fields, arguments.get("variant"), **hub).items():
            tables[name].map_from(*place)

    def check_loaded(self, missing_keys: set[str], unexpected_keys: set[str]) -> None:
        """As in `DecoderPreTrainedModel`; raises `HFEError` also if the checkpoint lacks tables."""
        super().check_loaded(missing_keys, unexpected_keys)
        tables = sorted(key for key in missing_keys if key.endswith(".stem_embed.weight"))
        if tables:
            raise HFEError(
                f"the checkpoint lacks {len(tables)} STEM tables, {tables[0]} first, so it is not a STEM checkpoint",
                "convert the stock model with `hf-efficient convert SOURCE OUTPUT --patch stem` and load OUTPUT",
            )

    def refresh_rows(self, ids: Tensor) -> None:
        """Discard copies of the rows `ids` [n] cached on the device (`stem_cache_rows`).

        Call it after the tables were changed in place there; all other rows are taken to be unchanged.
        """
        fetcher = _FETCHERS.get(self.base_model)
        if fetcher is not None:
            fetcher.drop(ids)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Tables with sparse gradients, which `RowSparseAdamW` averages: DDP cannot reduce sparse tensors with NCCL."""
        names = [f"{name}.weight" for name, m in self.named_modules() if isinstance(m, StemTable) and m.sparse]
        # A PEFT model forwards this attribute, and its parameters have a prefix.
        return [*names, *(f"base_model.model.{name}" for name in names)]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers.

        Raises:
            HFEError: the tables are mapped from files in `save_directory`, which saving would overwrite.
        """
        mapped = {m.file.parent for m in self.modules() if isinstance(m, StemTable) and m.file is not None}
        if Path(save_directory).resolve() in mapped:
            raise HFEError(
                f"the tables of this model are mapped from {save_directory}, which saving would overwrite",
                "save it into another folder",
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; resizes the tables too, see `_resize_tables`.

        Raises:
            HFEError: a table with `stem_offload="disk"` has not been mapped from a file yet.
        """
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self._resize_tables(embeddings.num_embeddings)
        return embeddings

    @torch.no_grad()
    def _resize_tables(self, rows: int) -> None:
        """Resize every table to `rows` rows; a new row is the mean of the old ones.

        A resized table has a new parameter in ordinary memory, also if it was mapped from a file.
        """
        for module in self.modules():
            if isinstance(module, StemTable) and module.num_embeddings != rows:
                old = module.resident_weight
                new = old.mean(0, dtype=torch.float32).to(old.dtype).expand(max(rows - len(old), 0), -1)
                module.weight = nn.Parameter(torch.cat((old[:rows], new)), requires_grad=old.requires_grad)
                module.num_embeddings = rows


class StemModel(StemPreTrainedModel, DecoderModel):
    """Decoder with STEM feed-forwards in `config.stem_layers`.

    `forward` takes the additional argument `stem_input_ids` [B, S]: the ids that index the tables, instead of
    `input_ids` or together with `inputs_embeds`.
    """

    # The one hook for tools such as `hf_efficient.stem_override`: if set, it gives the token inputs of every call.
    row_provider: Callable[..., Any] | None = None

    def build_mlp(self, layer_idx: int) -> nn.Module:
        """As in `DecoderModel`; a `StemMLP` in the STEM layers."""
        return StemMLP(self.config) if layer_idx in self.config.stem_layers else super().build_mlp(layer_idx)

    def resolve_token_ids(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Return the ids [B, S] that index the tables.

        These are `stem_input_ids`, which is removed from `kwargs`, else `input_ids`, else those that `match_token_ids`
        finds for `inputs_embeds` (with `stem_inputs_embeds="match"`). None if there are none and no layer here needs
        them: in a pipeline stage without STEM layers, or in a model without.

        Raises:
            HFEError: there are no ids, they have another shape than the input, an embedding equals no row, or a table
                has another number of rows than the embedding.
        """
        stem_input_ids = kwargs.pop("stem_input_ids", None)
        ids = super().resolve_token_ids(input_ids, inputs_embeds, kwargs) if stem_input_ids is None else stem_input_ids
        if not self.config.stem_layers:
            return ids
        if ids is None and len(here := self.layers_here()) < len(self.layers):
            missed = sorted(set(self.config.stem_layers) & set(here))
            if missed:
                raise HFEError(
                    f"this pipeline stage did not receive the token ids that its STEM layers {missed} need",
                    "serve STEM without pipeline parallelism: tensor parallelism splits its tables too",
                )
            return None
        self._check_tables()
        if ids is None and self.config.stem_inputs_embeds == "match":
            return match_token_ids(inputs_embeds, self.embed_tokens, self.vocabulary_rows())
        if ids is None:
            raise HFEError(
                f"inputs_embeds of shape {tuple(inputs_embeds.shape)} came without the ids that STEM layers need",
                "pass input_ids, pass stem_input_ids beside inputs_embeds, or set config.stem_inputs_embeds to 'match'",
            )
        given = inputs_embeds if input_ids is None else input_ids
        if ids.shape != given.shape[:2]:
            raise HFEError(
                f"stem_input_ids has shape {tuple(ids.shape)}, the input has {tuple(given.shape[:2])}",
                "pass one id for each position of the input",
            )
        return ids

    def prepare_token_inputs(
        self,
        token_ids: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the token inputs of the layers for ids [B, S]: ids, their `TokenRows`, or `row_provider`'s result.

        `stem_prompt_rows` is removed from `kwargs`. Raises as `begin_lookup` does.

        A row provider is called as ``row_provider(model, token_ids, look_up, prompt_rows=, attention_mask=,
        position_ids=, past_key_values=)``. ``look_up(ids)`` gives the ordinary token inputs of any ids, and
        `prompt_rows` [B] the prompt that each batch row was expanded from, None if none was.
        """
        prompt_rows = kwargs.pop("stem_prompt_rows", None)
        arguments = (attention_mask, position_ids, past_key_values, kwargs)
        if self.row_provider is None or token_ids is None:
            return super().prepare_token_inputs(token_ids, *arguments)
        prepare = super().prepare_token_inputs
        return self.row_provider(
            self,
            token_ids,
            lambda ids: prepare(ids, *arguments),
            prompt_rows=prompt_rows,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )

    def begin_lookup(self, token_ids: Tensor | None) -> Tensor | TokenRows | None:
        """Return the ids, or their `TokenRows` if tables are in host memory (prefetched) or get sparse gradients.

        Raises:
            HFEError: a table in host memory would get a dense gradient, or a table has no weight (see
                `StemTable.resident_weight`).
        """
        token_ids = super().begin_lookup(token_ids)
        # A table with a hook, such as accelerate's offloading, has its weight only while the module is called.
        tables = [table for table in self._tables() if is_bare(table, (StemTable,))]
        if token_ids is None or not tables:
            return token_ids
        trained = [t for t in tables if torch.is_grad_enabled() and t.resident_weight.requires_grad]
        # Without `stem_offload`, a table on another device is moved by another library, such as accelerate.
        on_host = tables[0].placement != "none" and tables[0].resident_weight.device != token_ids.device
        if on_host and not all(table.sparse for table in trained):
            raise HFEError(
                "tables in host memory cannot have dense gradients",
                "load the model with stem_sparse_grad=True to train them, or set requires_grad to False for them",
            )
        if on_host:
            return self._fetcher(tables, token_ids.device).begin(token_ids)
        return TokenRows(token_ids) if any(table.sparse for table in trained) else token_ids

    def _fetcher(self, tables: list[StemTable], device: torch.device) -> TableFetcher:
        """Return the `TableFetcher` of this model, which prefetches rows; a new one if tables or device changed."""
        fetcher = _FETCHERS.get(self)
        if fetcher is None or not fetcher.serves(tables, device):
            config = self.config
            pin = tables[0].placement == "cpu"
            fetcher = TableFetcher(tables, device, config.stem_prefetch_layers, config.stem_cache_rows, pin)
            _FETCHERS[self] = fetcher
        return fetcher

    def pin_tables(self) -> None:
        """Pin the tables with `stem_offload="cpu"` now instead of in the first call that needs their rows.

        Nothing unless the rest of the model is on a CUDA device.
        """
        tables = [table for table in self._tables() if table.placement == "cpu"]
        if tables and self.device.type == "cuda" and tables[0].resident_weight.device != self.device:
            self._fetcher(tables, self.device)

    def row_fetches(self) -> dict[str, Any]:
        """Return `TableFetcher.report` of tables in host memory; empty before they were pinned or read."""
        fetcher = _FETCHERS.get(self)
        return {} if fetcher is None else fetcher.report()

    def _tables(self) -> list[StemTable]:
        """Return the tables of this pipeline stage in the order of the layers, without those that an adapter wraps."""
        tables = (getattr(layer.mlp, "stem_embed", None) for layer in self.layers_here().values())
        return [table for table in tables if isinstance(table, StemTable)]

    def _check_tables(self) -> None:
        """Raise `HFEError` if a table has another number of rows than the embedding."""
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
    prompt_arguments = frozenset({"stem_input_ids", "stem_prompt_rows"})

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """As in `CapturedGeneration`; first pins tables in host memory."""
        self.model.pin_tables()  # a decoding step is captured only if its tables are pinned
        return super()._sample(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        stem_input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; `stem_input_ids` [B, S] of the prompt are continued with the generated ids."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if stem_input_ids is None:
            return inputs
        # `stem_input_ids` are the ids of the prompt; generated tokens use their own ids.
        if inputs.get("inputs_embeds") is not None:
            inputs["stem_input_ids"] = stem_input_ids[:, -inputs["inputs_embeds"].shape[1] :]
        elif inputs_embeds is None:
            ids = torch.cat((stem_input_ids, input_ids[:, stem_input_ids.shape[1] :]), dim=1)
            inputs["stem_input_ids"] = ids[:, -inputs["input_ids"].shape[1] :]
        return inputs

    def _expand_inputs_for_generation(self, **inputs: Any) -> Any:
        """As in transformers; with a `row_provider`, adds `stem_prompt_rows` [rows], the prompt's index of each row."""
        if self.model.row_provider is not None and inputs.get("expand_size", 1) > 1:
            ids = inputs["input_ids"]
            inputs["stem_prompt_rows"] = torch.arange(len(ids), device=ids.device)
        return super()._expand_inputs_for_generation(**inputs)


class StemForSequenceClassification(StemPreTrainedModel, DecoderForSequenceClassification):
    """`StemModel` and a classifier of texts."""

    model_class = StemModel


class StemForTokenClassification(StemPreTrainedModel, DecoderForTokenClassification):
    """`StemModel` and a classifier of tokens."""

    model_class = StemModel


class StemForQuestionAnswering(StemPreTrainedModel, DecoderForQuestionAnswering):
    """`StemModel` and scores of where an answer begins and ends."""

    model_class = StemModel


__all__ = [
    "StemConfig",
    "StemForCausalLM",
    "StemForQuestionAnswering",
    "StemForSequenceClassification",
    "StemForTokenClassification",
    "StemModel",
    "StemPreTrainedModel",
]
