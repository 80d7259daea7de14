"""Which modules PEFT adapts where its user names none: for our models those of a stock family."""

from __future__ import annotations

import sys


def register_peft_targets(model_type: str, stock: str) -> None:
    """Give `model_type` the default target modules of the stock model type, for every method that has some for it.

    Nothing happens where PEFT is not loaded; again changes nothing.
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    for name, targets in list(vars(constants).items()):
        if name.startswith("TRANSFORMERS_MODELS_TO_") and stock in targets:
            targets.setdefault(model_type, targets[stock])


__all__ = ["register_peft_targets"]
