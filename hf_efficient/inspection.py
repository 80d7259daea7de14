"""`inspect`: the architecture and size of a checkpoint, from its configuration and tensor headers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from hf_efficient.conversion.architecture import (
    ArchitectureSpec,
    active_architectures,
    architecture_of,
    architectures_beside,
)
from hf_efficient.conversion.families.tensors import check_tensors
from hf_efficient.conversion.reading.source import Source, open_source


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's architecture and size.

    Attributes:
        model_type: transformers' name of the architecture.
        source: the source as it was passed to `inspect`.
        model: name -> value of the configuration fields of the model's shape, such as `hidden_size`.
        description: label, such as `attention` -> text about the shape.
        patches: names of the patches that are active in the checkpoint; empty for a stock model.
        patch_fields: label -> value of the configuration fields of these patches.
        can_convert_to: names of the patches that a conversion can add.
        parameters: group of tensors -> number of parameters; groups without any are left out. Like the next two, it
            counts the tensors that the model loads, not e.g. a stored copy of a tied head.
        bytes: bytes of the weights in the files' own dtype (GGUF: dequantised).
        dtypes: dtype, such as `bfloat16` -> number of tensors.
        warnings: texts about parts of the source that were ignored.
    """

    source: str
    model_type: str
    model: dict[str, Any]
    description: dict[str, str]
    patches: list[str]
    patch_fields: dict[str, Any]
    can_convert_to: list[str]
    parameters: dict[str, int]
    bytes: int
    dtypes: dict[str, int]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The attributes as JSON values."""
        return asdict(self)

    def table(self) -> str:
        """The inspection as text for a terminal."""
        total = sum(self.parameters.values())
        rows = [
            ("architecture", self.model_type + (f", patched with {', '.join(self.patches)}" if self.patches else "")),
            *self.description.items(),
            *((label, _text(value)) for label, value in self.patch_fields.items()),
            ("parameters", f"{total:,} ({self.bytes / 1e9:.2f} GB, {', '.join(self.dtypes)})"),
            *((f"  {group}", f"{count:,} ({count / total:.1%})") for group, count in self.parameters.items()),
            ("can convert to", ", ".join(self.can_convert_to) or "nothing further"),
            *(("warning", warning) for warning in self.warnings),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def inspect(source: str, *, revision: str | None = None, token: str | None = None) -> Inspection:
    """Describe a checkpoint from its configuration and headers; reads no weights and runs none of its code.

    Args:
        source: Hub id, local folder or local `.gguf` file.
        revision: branch, tag or commit of a Hub repository.
        token: access token for the Hub.

    Raises:
        HFEError: the source is missing, damaged, or of an unsupported family, or its tensors do not match config.json.
        UsageError: the token is malformed.
    """
    opened = open_source(str(source), revision=revision, token=token)
    reader, config = opened.reader, opened.config
    names = reader.names()
    left_out = check_tensors(
        config, {name: reader.shape(name) for name in names}, {name: reader.dtype(name) for name in names}
    )
    active = active_architectures(config)
    groups = _groups(opened, active)
    parameters: dict[str, int] = dict.fromkeys(groups, 0)
    dtypes: dict[str, int] = {}
    size = 0
    for name in names:
        if name in left_out:
            continue
        group = next(group for group, parts in groups.items() if any(part in name for part in parts))
        count, dtype = math.prod(reader.shape(name)), reader.dtype(name)
        parameters[group] += count
        size += count * dtype.itemsize
        label = str(dtype).removeprefix("torch.")
        dtypes[label] = dtypes.get(label, 0) + 1
    return Inspection(
        source=str(source),
        model_type=opened.stock_config.model_type,
        model={field: getattr(config, field) for field in opened.family.inspected_fields},
        description=opened.family.description(config),
        patches=[spec.patch for spec in active if spec.patch],
        patch_fields={
            label: getattr(config, field) for spec in active for field, label in spec.inspected_fields.items()
        },
        can_convert_to=_further_patches(config.model_type, active),
        parameters={group: count for group, count in parameters.items() if count},
        bytes=size,
        dtypes=dtypes,
        warnings=opened.warnings,
    )


def _groups(source: Source, active: list[ArchitectureSpec]) -> dict[str, tuple[str, ...]]:
    """Group of tensors -> parts of their names; the patches' own groups come first, since the first match counts."""
    own = {label: parts for spec in active for label, parts in spec.tensor_groups.items()}
    return {**own, **source.family.tensor_groups}


def _further_patches(model_type: str, active: list[ArchitectureSpec]) -> list[str]:
    """Names of the patches that a conversion can add; a checkpoint may have only one patch that adds tokens."""
    spec = architecture_of(model_type)
    adds_tokens = any(each.adds_tokens for each in active)
    beside = [] if spec is None else architectures_beside(spec)
    return [
        each.patch
        for each in beside
        if each.patch and each.patch_options and each not in active and not (each.adds_tokens and adds_tokens)
    ]


def _text(value: Any) -> str:
    """A value as text; the items of a list, and of a dict those that are not None, separated by commas."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items() if item is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
