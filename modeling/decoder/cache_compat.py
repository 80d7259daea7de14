"""The cache argument under both of its names: transformers renamed it between the supported releases.

The cache of a call is `past_key_values` up to transformers 5.23 and `cache` from 5.24 on: as an argument of every
forward, of `generate` and of the mask functions, and as a field of every output. A forward accepts both names, passes
the one of the installed release to the modules it calls, and raises for a cache, a mask or positions under any other
name: if they were ignored in `kwargs`, the output would be wrong without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from hf_efficient.environment import TESTED_TRANSFORMERS
from hf_efficient.errors import HFEError

# Both names; the older one first.
CACHE_ARGUMENTS = ("past_key_values", "cache")
# The name in the installed release, whose output classes have a field of this name.
CACHE_ARGUMENT = (
    "cache" if any(field.name == "cache" for field in fields(BaseModelOutputWithPast)) else CACHE_ARGUMENTS[0]
)
# Substrings of the names that releases have had for a cache, a mask or positions (`cache_position`, `head_mask`).
_CHECKED_SUBSTRINGS = ("cache", "mask", "mems", "past", "position", "sequence_ids")
# Names with such a substring that layers pass on to the attention implementation, so they are accepted.
_PASSED_TO_ATTENTION = ("cache", "position_ids", "use_cache")


def cache_argument(cache: Any) -> dict[str, Any]:
    """Return ``{name: cache}`` with the name in the installed release: for a call or for an output class."""
    return {CACHE_ARGUMENT: cache}


def cache_of_arguments(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments of a call; None if there is none.

    `past_key_values` if it is not None, else `cache`; that they are not two different caches is not checked.
    """
    return next((arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)


def rename_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of `generate` with the cache under its name in the installed release.

    A `cache` that is a paged cache (see `one_cache`) keeps its name. Without a cache, `arguments` itself is returned.

    Raises:
        HFEError: there are two different caches.
    """
    caches = {name: arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None}
    if not caches:
        return arguments
    others = {name: value for name, value in arguments.items() if name not in CACHE_ARGUMENTS}
    # Before `others` is copied, since `one_cache` puts a paged cache back into it.
    cache = one_cache(caches.get("past_key_values"), caches.get("cache"), others)
    return {**others, **cache_argument(cache)}


def one_cache(past_key_values: Any, cache: Any, kwargs: dict[str, Any]) -> Any:
    """Return the cache that was passed to a forward under either name; None if there is none.

    Before transformers 5.24 `cache` was the paged cache of continuous batching, which the attention implementation
    reads from its keyword arguments: with such a release, a `cache` that is not a `Cache` is added to `kwargs`, and the
    result is None.

    Args:
        past_key_values, cache: the forward's two arguments.
        kwargs: its further keyword arguments; may be changed, see above.

    Raises:
        HFEError: there are two different caches.
    """
    if cache is None or cache is past_key_values:
        return past_key_values
    if past_key_values is not None:
        raise HFEError(
            "a call has both past_key_values and cache, which are two names of one thing",
            "pass one of them; `generate` with PEFT's prefix tuning passes both where PEFT does not know "
            "transformers 5.24 yet: take a newer peft, or a transformers before 5.24",
        )
    if CACHE_ARGUMENT != "cache" and not isinstance(cache, Cache):
        kwargs["cache"] = cache
        return None
    return cache


def check_arguments(module: Any, kwargs: Mapping[str, Any]) -> None:
    """Check that a forward was not given a cache, a mask or positions under an unknown name, which it would ignore.

    Args:
        module: the module that was called, for the message.
        kwargs: keyword arguments that its forward has no parameter for; a value of None is accepted.

    Raises:
        HFEError: a name contains one of `_CHECKED_SUBSTRINGS` and is not one that the attention implementation reads.
    """
    for name, value in kwargs.items():
        if value is not None and name not in _PASSED_TO_ATTENTION and any(part in name for part in _CHECKED_SUBSTRINGS):
            oldest, newest = TESTED_TRANSFORMERS
            raise HFEError(
                f"{type(module).__name__} was given {name}, which it does not know and must not ignore",
                "pass attention_mask, position_ids, and the cache as past_key_values or cache, as transformers "
                f"{oldest} to {newest} do; a newer release of hf_efficient may know more names",
            )


def update_cache(
    cache: Any, keys: Tensor, values: Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Call ``cache.update``: add keys and values to a layer of the cache, and return those to attend to.

    Args:
        cache: the cache.
        keys, values: [B, Hkv, S, D] each, of the S tokens of the call.
        layer_idx: index of the layer.
        kwargs: keyword arguments for the attention implementation; from transformers 5.24 on a paged cache adds to
            them.

    Returns:
        Keys and values, [B, Hkv, L, D] each, with the key-value length L.
    """
    if CACHE_ARGUMENT == "cache":
        return cache.update(keys, values, layer_idx, kwargs=kwargs)
    return cache.update(keys, values, layer_idx)
