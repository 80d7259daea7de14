"""Checks that a source has the tensors that its configuration describes."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from hf_efficient.conversion.families.family import family_of_config, model_tensors
from hf_efficient.conversion.reading.safetensors_reader import DTYPES
from hf_efficient.errors import HFEError

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensors(
    config: PreTrainedConfig, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]
) -> dict[str, str]:
    """Compare a source's tensors with its configuration; returns the tensors to leave out, name -> reason.

    A tensor may be left out if the model does not have it and it is tied to another one, a buffer, or part of a head
    that the model's class does not have.

    Args:
        config: the source's configuration as one of ours, see `ModelFamily.own_config`.
        shapes, dtypes: shape and dtype of each of the source's tensors, by its name in our model.

    Raises:
        HFEError: there are fewer tensors than layers, or a tensor is missing, is one that the model does not have and
            that may not be left out, or has another shape or not a float dtype.
    """
    # Checked first, so that no model with absurdly many layers is built.
    if config.num_hidden_layers > len(shapes):
        raise HFEError(
            f"the checkpoint holds {len(shapes)} tensors, and config.json calls for {config.num_hidden_layers} layers",
            "use the whole checkpoint, with the config.json that belongs to it",
        )
    family, tensors = family_of_config(config), model_tensors(config)
    expected, tied = tensors.shapes, tensors.tied
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise HFEError(
            f"the checkpoint lacks {_list(missing)}, which config.json calls for",
            "use the whole checkpoint, with the config.json that belongs to it",
        )
    left_out = {
        name: f"tied to {tied[name]}" if name in tied else family.reason_to_leave_out(name)
        for name in shapes
        if name not in expected
    }
    unknown = [name for name, reason in left_out.items() if not reason]
    if unknown:
        raise HFEError(
            f"the checkpoint holds {_list(unknown)}, which the model that config.json describes does not have",
            "use the config.json that belongs to the checkpoint; a task head or an adapter must be removed first",
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise HFEError(
                f"tensor {name} has shape {list(shapes[name])}; config.json calls for {list(shape)}",
                "use the config.json that belongs to the checkpoint",
            )
        if dtypes[name] not in _FLOATS:
            kind = next(label for label, dtype in DTYPES.items() if dtype == dtypes[name])
            raise HFEError(
                f"tensor {name} has dtype {kind}; weights must be F32, F16, BF16 or F64",
                "use the unquantised checkpoint",
            )
    return left_out


def _list(names: list[str], limit: int = 3) -> str:
    """`tensor a, b, c and 7 more`."""
    shown = ", ".join(names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{'tensor' if len(names) == 1 else 'the tensors'} {shown}{more}"
