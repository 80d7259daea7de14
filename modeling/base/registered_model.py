"""What every registered model adds to transformers' `PreTrainedModel`."""

from __future__ import annotations

import sys
from typing import Any

from hf_efficient.logging import warn_once
from hf_efficient.modeling.base.saved_code import is_ours


class RegisteredModel:
    """Mixin to list before a `PreTrainedModel`."""

    # Attribute of the model that this is mixed into.
    config: Any

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """As in transformers for a user's class; nothing for ours, whose code the configuration always saves.

        transformers would copy single files, and name another file for the configuration than for the model.
        """
        if not is_ours(cls):
            super().register_for_auto_class(auto_class)

    def train(self, mode: bool = True) -> Any:
        """As in PyTorch; warns once in training mode if Liger is imported, which has no patches for our models."""
        if mode and "liger_kernel.transformers.monkey_patch" in sys.modules:
            warn_once(
                f"use_liger_kernel changes nothing in {self.config.model_type} models: Liger has no patches for them, "
                "so they train on their own modules and kernels"
            )
        return super().train(mode)


__all__ = ["RegisteredModel"]
