"""What every registered configuration adds to transformers' `PreTrainedConfig`."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from transformers.utils import CONFIG_NAME

from hf_efficient.modeling.base.peft_targets import register_peft_targets
from hf_efficient.modeling.base.saved_code import SavedCode, carried_code, is_ours


class RegisteredConfig:
    """Mixin before a `PreTrainedConfig`: saves the code that loads it, and gives PEFT its default target modules."""

    # Attributes of the configuration class that this is mixed into.
    model_type: ClassVar[str]
    to_json_string: ClassVar[Callable[..., str]]

    # Stock model type, such as `llama`, with the same module names; PEFT's default target modules are those of it.
    peft_targets: ClassVar[str]
    # PEFT method, such as `LORA`, -> target modules, if they are not those of the stock model type.
    peft_targets_by_method: ClassVar[dict[str, list[str]]] = {}
    # Returns the code files to save with a configuration of a given class; None to save none. The installed package
    # sets its exporter here; code in a checkpoint copies the files that it was loaded from.
    code_source: ClassVar[Callable[[type], SavedCode | None]] = staticmethod(carried_code)

    @property
    def active_patches(self) -> list[str]:
        """Names of the patches that this configuration has, as in `--patch` of the command line; none by default."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, as in transformers; also registers PEFT's default target modules, if PEFT is imported."""
        # PEFT calls `to_dict` before it looks up its targets, so this needs no import of PEFT.
        register_peft_targets(self.model_type, self.peft_targets, self.peft_targets_by_method)
        return super().to_dict()

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """As in transformers; for a file named `config.json` the code files are written into its folder too.

        `auto_map` in the file then names the classes in them. `save_pretrained` and `push_to_hub` of configuration and
        model call this method.

        Raises:
            HFEError: a code file cannot be read or written.
            OSError: an existing file in the folder cannot be read or removed.
        """
        path = Path(json_file_path)
        code = type(self).code_source(type(self)) if path.name == CONFIG_NAME else None
        if code is None:
            super().to_json_file(json_file_path, use_diff=use_diff)
        else:
            code.write(path.parent, json.loads(self.to_json_string(use_diff=use_diff)))

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """As in transformers for a user's class; nothing for ours, which are always saved with their code."""
        if not is_ours(cls):
            super().register_for_auto_class(auto_class)


__all__ = ["RegisteredConfig"]
