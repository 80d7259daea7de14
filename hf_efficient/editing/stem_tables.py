"""Finds the STEM embedding tables of a loaded model, also inside wrappers, and checks the token ids that index them.

A STEM layer has an embedding table with a row for each token id in place of its up-projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.errors import HFEError, TokenIdError


def stem_base_model(model: nn.Module) -> Any:
    """The `StemModel` inside `model`: inside a task head, a PEFT model, a data-parallel wrapper or a compiled model.

    It is recognised by its attribute `row_provider` and not by its class, since a model that was loaded with
    `trust_remote_code=True` has the class of its own folder.

    Raises:
        HFEError: there is none in `model`.
    """
    for module in model.modules():
        if hasattr(type(module), "row_provider"):
            return module
    raise HFEError(
        f"{type(model).__name__} is not a STEM model, or its folder was exported by an older hf_efficient",
        "convert a checkpoint with --patch stem, or run `hf-efficient export` on the older folder",
    )


def table_weights(base_model: Any, layers: Iterable[int] | None) -> dict[int, nn.Parameter]:
    """Layer -> weight [vocab_size, intermediate_size] of its table, also if an adapter wraps the table.

    Args:
        base_model: result of `stem_base_model`.
        layers: indices of STEM layers; None for all.

    Raises:
        HFEError: the model has no STEM layers; `layers` is empty, repeats a layer or names one without a table; a table
            is quantized, distributed, parametrized, on the meta device, or replaced by `modules_to_save` of an adapter.
    """
    stem_layers = base_model.config.stem_layers
    if not stem_layers:
        raise HFEError("the model has no STEM layers, so it has no rows to edit", "convert it with --patch stem")
    chosen = list(stem_layers if layers is None else layers)
    without_table = [layer for layer in chosen if layer not in stem_layers]
    if without_table or not chosen or len(set(chosen)) != len(chosen):
        raise HFEError(f"layers={chosen} must be different ones of the STEM layers {stem_layers}", "correct layers")
    weights = {}
    for layer in chosen:
        table, *copies = (m for m in base_model.layers[layer].mlp.stem_embed.modules() if isinstance(m, nn.Embedding))
        if copies:
            raise HFEError(
                f"the table of layer {layer} is replaced by {len(copies)} of an adapter (modules_to_save)",
                "merge the adapter (merge_and_unload) before editing",
            )
        if type(table.weight) is not nn.Parameter or table.weight.is_meta:
            raise HFEError(
                f"the table of layer {layer} is not an ordinary tensor: quantized, distributed, parametrized or absent",
                "load the checkpoint without quantization or sharding to edit it",
            )
        weights[layer] = table.weight
    return weights


def check_tokens(base_model: Any, tokens: Sequence[int]) -> list[int]:
    """Check token ids; returns them as a list.

    Raises:
        HFEError: `tokens` is empty.
        TokenIdError: one is not an integer inside the vocabulary of the model.
    """
    rows = base_model.vocabulary_rows()
    if not tokens:
        raise HFEError("no token is named", "name one or more token ids")
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool):
            raise TokenIdError(f"token {token!r} is not an int; ids are 0..{rows - 1}", "name a token id of this model")
        if not 0 <= token < rows:
            raise TokenIdError(f"token {token!r} is outside 0..{rows - 1}", "name a token id of this model")
    return list(tokens)


def read_rows(weights: Mapping[int, Tensor], ids: Sequence[int]) -> dict[int, Tensor]:
    """Layer -> copy on the CPU of the rows `ids` [n, intermediate_size] of its table, in the table's dtype.

    `weights` are tables by layer, from `table_weights`; the n ids must be inside the tables.
    """
    index = torch.tensor(ids)
    return {layer: weight.detach()[index.to(weight.device)].cpu() for layer, weight in weights.items()}
