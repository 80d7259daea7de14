"""Settings of Monarch attention: `MonarchSpec` for sequences, `MonarchGridSpec` for grids of video tokens.

In a configuration they are a dictionary in the field `monarch`, as `to_dict` returns it; None is softmax attention.
Annotations are evaluated in this file, because the types of the dictionary are checked by them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict, TypeVar

from hf_efficient.errors import HFEError
from hf_efficient.kernels.monarch_attention.layout import PAD_QUERIES, PADS, ROW_AXES, SequenceLayout

SpecT = TypeVar("SpecT", bound="_Spec")


class MonarchFields(TypedDict, total=False):
    """Types of the values in a configuration's field `monarch` of an encoder; see `MonarchSpec`."""

    block_size: int
    num_iters: int
    pad: str
    pad_queries: str
    min_length: int | None
    layers: list[int] | None


class MonarchGridFields(TypedDict, total=False):
    """Types of the values in a configuration's field `monarch` of a video model; see `MonarchGridSpec`."""

    f_tied: int
    h_reduce: int
    w_reduce: int
    row_axes: str
    num_iters: int
    layers: list[int] | None


class _Spec:
    """What both settings share: conversion from and to the dictionary in a configuration, and the rules of `layers`."""

    # Names of the fields; `dataclasses.fields` cannot be traced by torch.compile.
    field_names: ClassVar[tuple[str, ...]]
    layers: tuple[int, ...] | None

    @classmethod
    def from_dict(cls: type[SpecT], values: Mapping[str, Any]) -> SpecT:
        """Return the settings in a configuration's field `monarch`; missing keys take their defaults.

        Raises:
            HFEError: `values` is no mapping, has an unknown key, lacks a required one, or breaks a rule.
        """
        if not isinstance(values, Mapping):
            raise HFEError(f"monarch={values!r} must be a dictionary", "give the settings by name, or None")
        unknown = [str(key) for key in values if key not in cls.field_names]
        if unknown:
            raise HFEError(
                f"monarch has the unknown keys {sorted(unknown)}; its keys are {list(cls.field_names)}",
                "correct the names",
            )
        if "block_size" in cls.field_names and "block_size" not in values:
            raise HFEError(f"monarch={dict(values)!r} has no block_size, which is required", "set block_size")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON types, for a configuration's field `monarch`."""
        values = {name: getattr(self, name) for name in self.field_names}
        return values | {"layers": None if self.layers is None else list(self.layers)}

    def runs_in(self, layer: int) -> bool:
        """True if attention layer number `layer` uses Monarch attention."""
        return self.layers is None or layer in self.layers

    def check_layers(self, num_layers: int) -> None:
        """Check `layers` against the number of layers of a model.

        Raises:
            HFEError: a layer does not exist.
        """
        beyond = [layer for layer in self.layers or () if layer >= num_layers]
        if beyond:
            raise HFEError(
                f"monarch.layers contains {beyond}; the model has layers 0..{num_layers - 1}", "name layers it has"
            )

    def _check_integer(self, name: str, least: int) -> None:
        """Raise `HFEError` unless the field is an integer of at least `least`."""
        value = getattr(self, name)
        if type(value) is not int or value < least:
            raise HFEError(
                f"monarch.{name}={value!r} must be an integer of at least {least}", f"set {name} to {least} or more"
            )

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        """Raise `HFEError` unless the field is one of `choices`."""
        value = getattr(self, name)
        if value not in choices:
            raise HFEError(f"monarch.{name}={value!r} must be one of {list(choices)}", "use one of them")

    def _check_layer_list(self) -> None:
        """Make a list of layers a tuple; raise `HFEError` unless it is sorted, without duplicates and not empty."""
        layers = self.layers
        if layers is None:
            return
        if (
            not isinstance(layers, list | tuple)
            or not layers
            or any(type(layer) is not int or layer < 0 for layer in layers)
            or list(layers) != sorted(set(layers))
        ):
            raise HFEError(
                f"monarch.layers={layers!r} must be a sorted list of different layer numbers from 0 on",
                "name at least one layer; None is all layers, and monarch=None is softmax attention",
            )
        object.__setattr__(self, "layers", tuple(layers))  # the dataclass is frozen


@dataclass(frozen=True)
class MonarchSpec(_Spec):
    """Monarch attention over a sequence, in blocks of `block_size` consecutive tokens.

    Attributes:
        block_size: tokens of a block, at least 2. Vision: the width of the patch grid; text: near the square root of
            the usual number of tokens.
        num_iters: iterations; 1 is the fastest, and more than 3 improve nothing.
        pad: side on which a sequence is filled up to whole blocks: "post" for text; "pre" for an image, whose prefix
            tokens then share the first block with the padding, so that each further block is a row of patches.
        pad_queries: what stands for padding as a query: "zero", or "mean", the mean of the column's valid queries.
        min_length: a sequence with fewer valid tokens uses softmax attention; None is ``2 * block_size``.
        layers: numbers of the attention layers that use Monarch attention; None is all. The others use softmax.

    Raises:
        HFEError: a value has another type or breaks its rule.
    """

    field_names: ClassVar[tuple[str, ...]] = tuple(MonarchFields.__annotations__)
    block_size: int
    num_iters: int = 1
    pad: str = "post"
    pad_queries: str = "zero"
    min_length: int | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._check_integer("block_size", 2)
        self._check_integer("num_iters", 1)
        self._check_choice("pad", PADS)
        self._check_choice("pad_queries", PAD_QUERIES)
        if self.min_length is not None:
            self._check_integer("min_length", 0)
        self._check_layer_list()

    @property
    def least_tokens(self) -> int:
        """Number of valid tokens from which on a sequence uses Monarch attention; at least one block.

        In a single block, Monarch attention and softmax attention are the same.
        """
        return max(self.block_size, 2 * self.block_size if self.min_length is None else self.min_length)

    @property
    def layout(self) -> SequenceLayout:
        """How the tokens are arranged, for the kernel."""
        return SequenceLayout(self.block_size, self.pad, self.pad_queries)

    def check_length(self, most: int, name: str) -> None:
        """Check that blocks fit into the longest sequence of a model.

        Args:
            most: number of tokens of the longest sequence.
            name: what gives it, for the message, such as `max_position_embeddings`.

        Raises:
            HFEError: a block, or `min_length`, is longer than that.
        """
        for field, value in (("block_size", self.block_size), ("min_length", self.min_length or 1)):
            if value > most:
                raise HFEError(
                    f"monarch.{field}={value} must be at most {name}={most}, the longest sequence of the model",
                    f"use a smaller {field}, or monarch=None",
                )


@dataclass(frozen=True)
class MonarchGridSpec(_Spec):
    """Monarch attention over a grid of video tokens in the order (frame, row, column), in tiles.

    Attributes:
        f_tied: frames that share a tile; it divides the number of frames.
        h_reduce, w_reduce: parts into which the height and the width of the grid are cut; they divide it.
        row_axes: axes of the grid that are the rows of a tile, of "f", "h" and "w"; the others are its columns.
        num_iters: iterations; 1 is the fastest, and more than 3 improve nothing.
        layers: numbers of the layers whose self-attention is Monarch attention; None is all. The others use softmax.

    Raises:
        HFEError: a value has another type or breaks its rule.
    """

    field_names: ClassVar[tuple[str, ...]] = tuple(MonarchGridFields.__annotations__)
    f_tied: int = 1
    h_reduce: int = 1
    w_reduce: int = 1
    row_axes: str = "fh"
    num_iters: int = 1
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("f_tied", "h_reduce", "w_reduce", "num_iters"):
            self._check_integer(name, 1)
        self._check_choice("row_axes", ROW_AXES)
        self._check_layer_list()


__all__ = ["MonarchFields", "MonarchGridFields", "MonarchGridSpec", "MonarchSpec"]
