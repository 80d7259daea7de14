"""Reads the checkpoints of Self-Forcing's training code: one file of `torch.save` with the weights of a generator.

The file holds a dict with the weights under `generator_ema` (their moving average), `generator` or `model`, or is
itself the dict of weights. Names are those of the original layout, behind prefixes of wrappers. No configuration is
stored: it follows from the shapes of the tensors. The model is causal: chunks of frames attend to earlier ones.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_efficient.conversion.families.family import family_of_config, source_config
from hf_efficient.conversion.reading.release import Release
from hf_efficient.conversion.reading.stock_names import with_stock_names
from hf_efficient.conversion.reading.torch_file import TorchFileReader, checked_tensor, load_torch_file
from hf_efficient.conversion.wan.stock_config import CAUSAL_CLASS
from hf_efficient.conversion.wan.tensor_names import check_no_image_tensors
from hf_efficient.errors import HFEError

_SUFFIX = ".pt"
# Keys of the weights, the preferred one first: the moving average is what the authors sample from.
_STATES = ("generator_ema", "generator", "model")
# What wrappers of modules add to names, anywhere in them, and before them.
_WRAPPERS = re.compile(r"\b(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_PREFIXES = re.compile(r"^(?:(?:model|module)\.)+")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
# Channels of a head in every Wan model.
_HEAD_DIM = 128


class TrainingFileReader:
    """A `ReleaseReader` for one file of the training code, with the suffix `.pt`, that the user named."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """True for a file with the suffix `.pt`. Folders are not searched for such files, which are pickles."""
        return path.suffix.lower() == _SUFFIX and path.is_file()

    @classmethod
    def open(cls, path: Path, name: str) -> Release:
        """Open the file; error messages refer to it as `name`.

        Raises:
            HFEError: the file is damaged, holds anything but tensors by name, or is not a text-to-video model.
        """
        content = load_torch_file(path)
        key = next((each for each in _STATES if isinstance(content.get(each), dict) and content[each]), None)
        tensors = _tensors(content if key is None else content[key], path)
        check_no_image_tensors(set(tensors))
        fields = _fields({each: tuple(tensor.shape) for each, tensor in tensors.items()}, name)
        stock = source_config(fields, name)
        config = family_of_config(stock).own_config(stock)
        reader = with_stock_names(TorchFileReader(tensors, path), config)
        warnings = [] if key in (None, _STATES[0]) else [f"{name} has no {_STATES[0]}; the weights are those of {key}"]
        return Release(reader, stock, config, [path], fields, warnings)


def _tensors(state: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of `state` by their names without wrappers, memory-mapped.

    Raises:
        HFEError: a value is not a tensor or not one of `checked_tensor`, a key is no text, or two names are the same
            without their wrappers.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            keys = ", ".join(map(str, list(state)[:5]))
            raise HFEError(
                f"{path.name} has a {type(value).__name__} under {str(key)[:80]!r}, not a tensor (its keys: {keys})",
                f"the file must be a dict of tensors, or hold one under {', '.join(_STATES)}",
            )
        name = _PREFIXES.sub("", _WRAPPERS.sub("", str(key)))
        if name in tensors:
            raise HFEError(f"{path.name} has the tensor {name[:80]} twice, with different prefixes", "save it again")
        tensors[name] = checked_tensor(name, value, path)
    return tensors


def _fields(shapes: dict[str, tuple[int, ...]], name: str) -> dict[str, Any]:
    """The configuration in the form of the original config.json, from the shapes of the tensors.

    Raises:
        HFEError: a tensor that determines a field is missing or has another number of dimensions, or the channels are
            no multiple of those of a head.
    """

    def shape(tensor: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(tensor)
        if found is None or len(found) != dimensions:
            has = "no" if found is None else f"the shape {list(found)} for"
            raise HFEError(
                f"{name} has {has} tensor {tensor}; a Wan transformer has one of {dimensions} dimensions",
                "name a checkpoint of Self-Forcing's generator, such as self_forcing_dmd.pt",
            )
        return found

    dim, channels, *patch = shape("patch_embedding.weight", 5)
    if dim % _HEAD_DIM:
        raise HFEError(
            f"{name} has {dim} channels, not a multiple of {_HEAD_DIM}, the channels of a head of a Wan transformer",
            "name a checkpoint of Self-Forcing's generator",
        )
    blocks = [int(match[1]) for match in map(_BLOCK.match, shapes) if match]
    return {
        "_class_name": CAUSAL_CLASS,
        "model_type": "t2v",
        "dim": dim,
        "in_dim": channels,
        "patch_size": patch,
        "num_heads": dim // _HEAD_DIM,
        "num_layers": 1 + max(blocks, default=0),
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "out_dim": shape("head.head.weight", 2)[0] // max(math.prod(patch), 1),
    }
