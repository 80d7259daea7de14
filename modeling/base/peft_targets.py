"""Registers the modules that PEFT adapts by default in our models: as in a stock model type, or a list per method."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

_MAPPING = "TRANSFORMERS_MODELS_TO_{}_TARGET_MODULES_MAPPING"


def register_peft_targets(model_type: str, stock: str, by_method: Mapping[str, Sequence[str]]) -> None:
    """Register PEFT's default target modules for `model_type`, in the tables of `peft.utils.constants`.

    Nothing happens if PEFT is not imported; an existing entry of `model_type` stays.

    Args:
        model_type: the model type of our model.
        stock: stock model type, such as `llama`, whose defaults it gets, for every method that has defaults for it.
        by_method: PEFT method, such as `LORA`, -> target modules in place of the stock ones.
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    own = {_MAPPING.format(method): list(modules) for method, modules in by_method.items()}
    for name, targets in list(vars(constants).items()):
        if name in own:
            targets.setdefault(model_type, own[name])
        elif name.startswith("TRANSFORMERS_MODELS_TO_") and stock in targets:
            targets.setdefault(model_type, targets[stock])


__all__ = ["register_peft_targets"]
