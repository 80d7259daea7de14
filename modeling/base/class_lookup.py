"""Sets a class as an attribute of `transformers`, where its tools look it up by the name in config.json."""

from __future__ import annotations

import sys
from types import ModuleType


def offer_to_transformers(causal_lm: type) -> None:
    """Set a causal language model of ours as an attribute of `transformers`, for `transformers serve` and pipelines.

    `transformers` must have been imported. If it has an own class of this name, that one stays; an earlier class of
    ours is replaced.
    """
    for module in _transformers_modules():
        existing = getattr(module, causal_lm.__name__, None)
        if existing is None or hasattr(existing, "model_class"):  # only our classes have `model_class`
            setattr(module, causal_lm.__name__, causal_lm)


def _transformers_modules() -> list[ModuleType]:
    """Return every module object `transformers` that a loaded module has, without duplicates.

    There can be two: transformers replaces its entry in `sys.modules` during its import, and modules that imported it
    before keep the old object.
    """
    loaded = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    candidates = [vars(module).get("transformers") for module in loaded]
    candidates.append(sys.modules["transformers"])
    return list({id(m): m for m in candidates if isinstance(m, ModuleType) and m.__name__ == "transformers"}.values())
