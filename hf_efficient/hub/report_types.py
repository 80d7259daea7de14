"""Types of the values in `conversion_report.json`, derived from the classes whose values a conversion writes there."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

import torch

from hf_efficient.conversion.measuring.calibration import CalibrationSummary
from hf_efficient.conversion.measuring.evaluation import EvaluationReport
from hf_efficient.conversion.options import ConversionOptions
from hf_efficient.conversion.report import ConversionReport
from hf_efficient.conversion.writing.known_settings import object_type, type_mismatches
from hf_efficient.registry import patch_classes

# Values that a report holds as texts.
_TEXTS = (Path, torch.dtype, torch.device)


def report_mismatches(report: dict[str, Any], config_types: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (path, description) of each key of a report that no conversion writes, and of each value of a wrong type.

    Args:
        report: content of `conversion_report.json`.
        config_types: type of each field that `config.json` may have: a patch's choices are such fields.
    """
    patches = patch_classes()
    yield from type_mismatches(report, _report_type({name: json_type(cls) for name, cls in patches.items()}))
    listed = report.get("patches")
    for i, patch in enumerate(listed if isinstance(listed, list) else ()):
        name = patch.get("name") if isinstance(patch, dict) else None
        cls = patches.get(name) if isinstance(name, str) else None
        if cls is None:
            yield f"patches[{i}].name", f"is {name!r}, which is none of {', '.join(patches)}"
        else:
            yield from type_mismatches(patch, _patch_type(cls, config_types), f"patches[{i}]")


def json_type(hint: Any) -> Any:
    """The type in JSON of a value with this annotation: a `TypedDict` for a dataclass, a list for a tuple.

    A float may be None, which a conversion writes in place of NaN and infinity.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        hints = get_type_hints(hint)
        return object_type(hint.__name__, {field.name: json_type(hints[field.name]) for field in fields(hint)})
    if is_typeddict(hint):
        return object_type(hint.__name__, {name: json_type(value) for name, value in get_type_hints(hint).items()})
    if origin in (Union, types.UnionType):
        return Union[tuple(json_type(each) for each in inner)]  # noqa: UP007 (of a tuple)
    if origin in (tuple, list):
        return list[json_type(inner[0])]  # type: ignore[misc]
    if origin is dict:
        return dict[inner[0], json_type(inner[1])]  # type: ignore[misc, valid-type]
    if hint is float:
        return float | None
    return str if hint in _TEXTS else hint


def _report_type(patch_types: dict[str, Any]) -> Any:
    """Type of the whole report; its patches are any objects, since their types depend on their names.

    `patch_types`: patch name -> type of its options.
    """
    hints = {name: json_type(hint) for name, hint in get_type_hints(ConversionReport).items()}
    options = get_type_hints(ConversionOptions)
    for name in ("patches", "max_shard_size"):
        del options[name]
    options = {name: json_type(hint) for name, hint in options.items()}
    options |= {"max_shard_bytes": int, "patches": object_type("PatchOptions", patch_types)}
    evaluation = get_type_hints(json_type(EvaluationReport)) | {"dtype": str}
    return object_type(
        "Report",
        {
            **hints,
            "patches": list[dict],
            "options": object_type("Options", options),
            "calibration": json_type(CalibrationSummary) | None,
            "evaluation": object_type("Evaluation", evaluation) | None,
        },
    )


def _patch_type(patch: type, config_types: dict[str, Any]) -> Any:
    """Type of one patch's entry in a report; `measured` has the return type of the patch's method `report`."""
    return object_type(
        "PatchReport",
        {
            "name": str,
            "options": json_type(patch),
            "calibrated": bool,
            "choices": object_type("Choices", config_types),
            "measured": json_type(get_type_hints(patch.report)["return"]),  # type: ignore[attr-defined]
        },
    )
