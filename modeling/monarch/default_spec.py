"""The settings of Monarch attention that a configuration has, or its default if the configuration has none."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

from hf_efficient.errors import HFEError
from hf_efficient.modeling.monarch.monarch_spec import MonarchSpec

# Names of the longest input in configurations of text and audio.
_LENGTHS = ("max_position_embeddings", "max_source_positions", "n_positions")


def config_spec(config: PreTrainedConfig) -> MonarchSpec:
    """Return the settings in the field `monarch` of a configuration; `default_spec` if it is missing or None.

    Raises:
        HFEError: the field breaks a rule of `MonarchSpec`, or there is no default.
    """
    values = getattr(config, "monarch", None)
    return default_spec(config) if values is None else MonarchSpec.from_dict(values)


def default_spec(config: PreTrainedConfig, block_size: int | None = None) -> MonarchSpec:
    """Return settings that depend on the configuration only, never on the padded length of a batch.

    Images: blocks of one row of patches, padded in front. Text and audio: blocks of the power of two nearest to the
    square root of the longest input, of two equally near ones the larger; padded in front, with the mean of a column's
    queries, which moves embeddings least; from four blocks on, below which little is saved.

    Args:
        config: of any model of transformers.
        block_size: instead of the default, which the other settings then follow.

    Raises:
        HFEError: the configuration has neither the size of an image nor that of the longest input.
    """
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if image is not None and patch is not None:
        return MonarchSpec(block_size=block_size or max(2, _width(image) // _width(patch)), pad="pre")
    for name in _LENGTHS:
        longest = getattr(config, name, None)
        if isinstance(longest, int) and longest > 0:
            size = block_size or max(2, 2 ** math.floor(math.log2(longest) / 2 + 0.5))
            least = max(2 * size, min(4 * size, longest))
            return MonarchSpec(block_size=size, pad="pre", pad_queries="mean", min_length=least)
    raise HFEError(
        f"{type(config).__name__} has neither image_size with patch_size, nor any of {', '.join(_LENGTHS)}, so Monarch "
        "attention has no default block size",
        "choose one: enable_monarch(model, MonarchSpec(block_size=...))",
    )


def _width(size: Any) -> int:
    """Return the width of a size in a configuration: a number, or [height, width]."""
    return int(size) if isinstance(size, int | float) else int(size[-1])
