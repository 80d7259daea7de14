"""Stock checkpoint -> Monarch attention in the same model: no tensor changes, only the configuration field `monarch`.

With N tokens in M = ceil(N / B) blocks of B, softmax attention is approximated by the product of two block-diagonal
factors: attention from each position in a block to the keys of one block, and attention to the blocks. `api.py` and
`README.md` of `kernels/monarch_attention` have the formulas. Source: arXiv:2505.18698, sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_efficient.conversion.families.encoder import longest_input
from hf_efficient.conversion.families.vision import patch_grid
from hf_efficient.conversion.measuring.calibration import Calibration
from hf_efficient.conversion.patch import TensorChanges, bibtex, layer_indices
from hf_efficient.errors import UsageError
from hf_efficient.json_file import is_whole
from hf_efficient.modeling.monarch.default_spec import default_spec
from hf_efficient.modeling.monarch.monarch_spec import PAD_QUERIES, PADS, ROW_AXES, MonarchGridSpec, MonarchSpec

_CHOICES = {"pad": PADS, "pad_queries": PAD_QUERIES, "row_axes": ROW_AXES}
_DROPOUT = "attention_probs_dropout_prob"
_SMALLEST = {"block_size": 2, "num_iters": 1, "min_length": 1, "f_tied": 1, "h_reduce": 1, "w_reduce": 1}


class MonarchMeasurements(TypedDict, total=False):
    """What `Monarch.report` returns: lines for the report's table."""

    summary: dict[str, str]


@dataclass
class Monarch:
    """Options of the Monarch patch; None stands for the default of the model's family, see `choose`.

    Raises:
        UsageError: an option is malformed here, or does not suit the model in `check`.
    """

    name: ClassVar[str] = "monarch"
    needs_calibration: ClassVar[bool] = False
    measures_choice: ClassVar[bool] = False
    # What a model must be for this patch, for the message that refuses another.
    scope: ClassVar[str] = (
        "Monarch attention is for bidirectional self-attention, and a causal mask cuts through its blocks"
    )
    card_note: ClassVar[str] = (
        "Monarch attention (arXiv:2505.18698) approximates softmax attention by a product of two block-diagonal "
        "matrices, in O(N sqrt(N)) for N tokens. The weights are the source's, bit for bit. **The approximation is "
        "lossy** for the lengths at which it runs; `monarch` in config.json has its block size, and the length below "
        "which the attention is exact. With `monarch` set to null the model is the source model again."
    )

    citation: ClassVar[str] = bibtex(
        "yaras2025monarchattention",
        "MonarchAttention: Zero-Shot Conversion to Fast, Hardware-Aware Structured Attention",
        "Yaras, Can and Xu, Alec S. and Abillama, Pierre and Lee, Changwoo and Balzano, Laura",
        "2505.18698",
    )

    block_size: int | None = field(
        default=None,
        metadata={
            "help": "tokens in a block (default: for text a power of two near the root of the longest input, for "
            "images the number of patches in a row)"
        },
    )
    num_iters: int | None = field(default=None, metadata={"help": "steps of the approximation (default: 1)"})
    pad: str | None = field(
        default=None,
        metadata={
            "help": "side on which a sequence is padded to whole blocks: post or pre (default: pre; "
            "of images each block is then a row of patches)"
        },
    )
    pad_queries: str | None = field(
        default=None,
        metadata={
            "help": "what stands for a padding position among the queries of its block: zero, or mean, the mean of the "
            "queries at the same position in other blocks (default: for text mean, for images zero)"
        },
    )
    min_length: int | None = field(
        default=None,
        metadata={
            "help": "sequences of fewer tokens keep softmax attention (default: four blocks of text, two of an image)"
        },
    )
    layers: str | list[int] | None = field(
        default="all", metadata={"help": "layers with Monarch attention, such as 0,1,5, or all"}
    )
    f_tied: int | None = field(default=None, metadata={"help": "video: frames in one tile (default: 1)"})
    h_reduce: int | None = field(
        default=None,
        metadata={"help": "video: tiles into which a frame's height is cut (default: 2; 1 is for fine-tuned weights)"},
    )
    w_reduce: int | None = field(
        default=None, metadata={"help": "video: tiles into which a frame's width is cut (default: 1)"}
    )
    row_axes: str | None = field(
        default=None,
        metadata={"help": f"video: axes of a tile's rows: {', '.join(_CHOICES['row_axes'])} (default: fh)"},
    )

    def __post_init__(self) -> None:
        for name, words in _CHOICES.items():
            if getattr(self, name) not in (None, *words):
                raise UsageError(
                    f"monarch {name}={getattr(self, name)!r} is unknown", f"choose one of {', '.join(words)}"
                )
        for name, smallest in _SMALLEST.items():
            value = getattr(self, name)
            if value is not None and not is_whole(value, smallest):
                raise UsageError(
                    f"monarch {name}={value!r} must be a whole number from {smallest} on",
                    "leave it out for the default",
                )
        self.layers = _parse_layers(self.layers)
        self._summary: dict[str, str] = {}

    def check(self, config: PreTrainedConfig) -> None:
        """Raise `UsageError` for a source that has the patch, an option of other models, or a layer that is missing."""
        if self.name in config.active_patches:
            raise UsageError(
                f"the source has Monarch attention already ({config.model_type})",
                "convert its stock source again, with the options you want",
            )
        kind = _KINDS[config.model_type]
        foreign = [
            each.name for each in fields(self) if each.name not in kind.options and getattr(self, each.name) is not None
        ]
        if foreign:
            raise UsageError(
                f"monarch {foreign[0]}={getattr(self, foreign[0])!r} is no option of a {config.model_type} model",
                f"its options are {', '.join(kind.options)}",
            )
        outside = [index for index in self.layers if index >= config.num_hidden_layers] if self.layers else []
        if outside:
            raise UsageError(
                f"monarch layers {outside} do not exist", f"the model has layers 0 to {config.num_hidden_layers - 1}"
            )
        kind.check(self._spec(config), config)

    def choose(self, config: PreTrainedConfig, calibration: Calibration | None) -> dict[str, Any]:
        """The configuration field `monarch`: the options, with the defaults of the family for those not given.

        | option | text | images | video |
        |---|---|---|---|
        | `block_size` | power of two nearest the root of the longest input | patches in a row | |
        | `pad` | pre | pre: the class token and padding fill block 0, and each other block is a row of patches | |
        | `pad_queries` | mean | zero | |
        | `min_length` | four times `block_size` | None: twice `block_size` | |
        | `h_reduce` | | | 2, as in the paper without training |

        The dropout of attention weights becomes 0, since Monarch attention has none and would refuse to train.
        """
        kind, spec = _KINDS[config.model_type], self._spec(config)
        self._summary = kind.summary(spec, config)
        fields: dict[str, Any] = {"monarch": spec.to_dict()}
        dropout = getattr(config, _DROPOUT, 0.0)
        if dropout:
            fields[_DROPOUT] = 0.0
            self._summary["attention dropout"] = f"0 instead of {dropout:g}: Monarch attention has none"
        return fields

    def changes(self, config: PreTrainedConfig, dtype: torch.dtype) -> TensorChanges:
        """No tensor is added or dropped."""
        return TensorChanges()

    def tensors(self, config: PreTrainedConfig, calibration: Calibration | None) -> Iterator[tuple[str, Tensor]]:
        """Nothing."""
        return iter(())

    def report(self) -> MonarchMeasurements:
        """Lines for the report's table: at which lengths Monarch attention runs, and its cost there."""
        return {"summary": self._summary}

    def _spec(self, config: PreTrainedConfig) -> MonarchSpec | MonarchGridSpec:
        """The given options of the model's family, with its defaults for the others."""
        kind = _KINDS[config.model_type]
        given = {name: getattr(self, name) for name in kind.options if getattr(self, name) is not None}
        return replace(kind.defaults(config, self.block_size), **given)


@dataclass(frozen=True)
class _Kind:
    """The options of one kind of model.

    Attributes:
        spec_class: class whose fields are the options.
        defaults: configuration, block size or None -> the options where none is given.
        check: (options, configuration) -> None; raises `UsageError` for options that do not suit the model.
        summary: (options, configuration) -> lines for the report's table.
    """

    spec_class: type[Any]
    defaults: Callable[[Any, int | None], Any]
    check: Callable[[Any, Any], None]
    summary: Callable[[Any, Any], dict[str, str]]

    @property
    def options(self) -> list[str]:
        """Names of the options."""
        return [each.name for each in fields(self.spec_class)]


def _video_defaults(config: Any, block_size: int | None) -> MonarchGridSpec:
    """Defaults for a video model without training, those of arXiv:2602.12271."""
    return MonarchGridSpec(h_reduce=2)


def _image_length(config: Any) -> int:
    """Tokens of an image: its patches and the class token."""
    return math.prod(patch_grid(config)) + 1


def _sequences(length: Callable[[Any], int]) -> _Kind:
    """The options of models whose input is a sequence of at most `length(config)` tokens."""

    def check(spec: MonarchSpec, config: Any) -> None:
        """Raise `UsageError` if no input is long enough for Monarch attention."""
        longest = length(config)
        if max(spec.least_tokens, spec.block_size) > longest:
            raise UsageError(
                f"monarch attention would never run: it begins at {max(spec.least_tokens, spec.block_size)} tokens "
                f"(min_length, or twice block_size), and the longest input has {longest}",
                "choose a smaller block_size or min_length",
            )

    def summary(spec: MonarchSpec, config: Any) -> dict[str, str]:
        """At which lengths Monarch attention runs, and the share of the FLOPs of softmax attention at the longest."""
        longest = length(config)
        share = _flops(longest, spec.block_size, spec.num_iters) / (4 * longest**2)
        return {
            "monarch runs": f"from {spec.least_tokens} tokens on, in blocks of {spec.block_size}; below, softmax",
            "attention FLOPs": f"{share:.1%} of those of softmax attention at {longest} tokens",
        }

    return _Kind(MonarchSpec, default_spec, check, summary)


def _flops(length: int, block_size: int, num_iters: int) -> int:
    """FLOPs of the products of Monarch attention for each head and channel; those of softmax attention: 4 length^2.

    M blocks of B: the first step takes 2 M B (3 B + 2 M), each further one 2 M B (2 B + 2 M).
    """
    blocks = -(-length // block_size)
    padded = blocks * block_size
    return 2 * padded * ((2 * num_iters + 1) * block_size + 2 * num_iters * blocks)


def _no_check(spec: MonarchGridSpec, config: Any) -> None:
    """Nothing: the size of a video is not in the configuration."""


def _no_summary(spec: MonarchGridSpec, config: Any) -> dict[str, str]:
    """No lines, for the same reason."""
    return {}


_TEXT = _sequences(longest_input)
# Model type -> the options of its models.
_KINDS = {
    "hfe_monarch_bert": _TEXT,
    "hfe_monarch_roberta": _TEXT,
    "hfe_monarch_vit": _sequences(_image_length),
    "hfe_monarch_wan": _Kind(MonarchGridSpec, _video_defaults, _no_check, _no_summary),
}


def _parse_layers(layers: Any) -> list[int] | None:
    """Sorted indices of layers; None for all.

    Raises:
        UsageError: there is none, or one is no integer, is negative or occurs twice.
    """
    if layers is None or (isinstance(layers, str) and layers.strip() == "all"):
        return None
    parsed = layer_indices(layers)
    if not parsed or parsed[0] < 0:
        raise UsageError(
            f"monarch layers={layers!r} must be all, or different whole numbers from 0 on, separated by commas",
            "for example 0,1,5",
        )
    return parsed
