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

    # Of the configuration that this is mixed into.
    model_type: ClassVar[str]
    to_json_string: ClassVar[Callable[..., str]]

    # PEFT's default target modules, for every method, are those of this stock model type: the modules have its names.
    peft_targets: ClassVar[str]
    # PEFT method, such as `LORA` -> target modules, where they are not those of the stock model type.
    peft_targets_by_method: ClassVar[dict[str, list[str]]] = {}
    # The code to save with a configuration of a class. The installed package sets its exporter here.
    code_source: ClassVar[Callable[[type], SavedCode | None]] = staticmethod(carried_code)

    @property
    def active_patches(self) -> list[str]:
        """Names of the patches that this configuration carries, as the command line spells them."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """The fields, as in transformers."""
        # PEFT calls `to_dict` before it looks up its targets, so this needs no import of PEFT.
        register_peft_targets(self.model_type, self.peft_targets, self.peft_targets_by_method)
        return super().to_dict()

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """As in transformers; with a file named `config.json` the code that loads it is written too, and named in it.

        So do `save_pretrained` and `push_to_hub` of configuration and model, which write the file by this method.
        """
        path = Path(json_file_path)
        code = type(self).code_source(type(self)) if path.name == CONFIG_NAME else None
        if code is None:
            super().to_json_file(json_file_path, use_diff=use_diff)
        else:
            code.write(path.parent, json.loads(self.to_json_string(use_diff=use_diff)))

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """As in transformers for a class of the user's own. Ours are saved with their code anyway."""
        if not is_ours(cls):
            super().register_for_auto_class(auto_class)


__all__ = ["RegisteredConfig"]
