"""Makes a class an attribute of `transformers`, where its tools look it up by the name in config.json."""

from __future__ import annotations

import sys
from types import ModuleType


def offer_to_transformers(causal_lm: type) -> None:
    """Set a causal language model of ours as an attribute of `transformers`, for `transformers serve` and pipelines.

    A class that transformers has itself under this name stays.
    """
    for module in _transformers_modules():
        found = getattr(module, causal_lm.__name__, None)
        if found is None or hasattr(found, "model_class"):
            setattr(module, causal_lm.__name__, causal_lm)


def _transformers_modules() -> list[ModuleType]:
    """`transformers` as its importers have it: it runs its `__init__` twice, so there are two, before and after."""
    loaded = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    found = [vars(module).get("transformers") for module in loaded]
    found.append(sys.modules["transformers"])
    return list({id(m): m for m in found if isinstance(m, ModuleType) and m.__name__ == "transformers"}.values())
