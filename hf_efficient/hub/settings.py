"""Checks a checkpoint's JSON files: every key at any depth must be known, and its value of the expected type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Literal, TypedDict

from transformers.modeling_rope_utils import RopeParameters
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from hf_efficient.conversion.report import REPORT_NAME
from hf_efficient.conversion.writing.known_files import settings_type
from hf_efficient.conversion.writing.known_processor import is_image_processor_class
from hf_efficient.conversion.writing.known_sentence_transformers import MODULES_NAME
from hf_efficient.conversion.writing.known_settings import is_tokenizer_class, object_type, type_mismatches
from hf_efficient.errors import HFEError
from hf_efficient.hub.contents import size_limit
from hf_efficient.hub.findings import Finding
from hf_efficient.hub.folder import REMEDY, UntrustedFolder
from hf_efficient.hub.report_types import report_mismatches
from hf_efficient.hub.weight_names import is_index
from hf_efficient.json_file import parse_json, parse_json_list
from hf_efficient.modeling.base.saved_code import CODE_MANIFEST
from hf_efficient.registry import ArchitectureSpec

REMEDY_EXPORT = "if the checkpoint is yours, write its code again with hf-efficient export FOLDER"
_DTYPES = Literal["float32", "float16", "bfloat16", "float64"]
# Fields that every configuration of transformers has; their annotations name types that JSON does not have.
_COMMON: dict[str, Any] = {
    "transformers_version": str | None,
    "architectures": list[str] | None,
    "output_hidden_states": bool | None,
    "output_attentions": bool | None,
    "return_dict": bool | None,
    "dtype": _DTYPES | None,
    "chunk_size_feed_forward": int,
    "is_encoder_decoder": Literal[False],
    "id2label": dict[str, str] | None,
    "label2id": dict[str, int] | None,
    "problem_type": Literal["regression", "single_label_classification", "multi_label_classification"] | None,
}
# Name of a file -> (key that names a class, whether transformers has the class).
_CLASS_NAMES = {
    TOKENIZER_CONFIG_FILE: ("tokenizer_class", is_tokenizer_class),
    IMAGE_PROCESSOR_NAME: ("image_processor_type", is_image_processor_class),
}


class IndexMetadata(TypedDict, total=False):
    """`metadata` in an index of weights; transformers would load them in a `dtype` that it names."""

    total_size: int
    total_parameters: int


class WeightIndex(TypedDict, total=False):
    """An index of sharded weights, such as `model.safetensors.index.json`."""

    metadata: IndexMetadata
    weight_map: dict[str, str]


def read_settings(folder: UntrustedFolder, name: str, findings: list[Finding]) -> Any:
    """The JSON object in a listed file, of `modules.json` the list.

    If it cannot be read, the result is an empty object, and a finding is added to `findings`.
    """
    try:
        parse = parse_json_list if name == MODULES_NAME else parse_json
        return parse(name, folder.read(name, size_limit(name)))
    except HFEError as error:
        findings.append(Finding(name, error.problem, error.remedy))
        return {}


def check_config(config: dict[str, Any], architecture: ArchitectureSpec, auto_map: dict[str, str]) -> list[Finding]:
    """A finding for each key or value of `config.json` that the architecture's configuration does not have."""
    findings = _mismatch_findings(CONFIG_NAME, config, object_type("Config", config_types(architecture)))
    known = {cls.__name__ for name, cls in architecture.auto_classes.items() if name != "AutoConfig"}
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in known:
        findings.append(Finding(CONFIG_NAME, f"architectures is {named!r}; it names one of {sorted(known)}", REMEDY))
    return findings + list(_auto_map_differences(config.get("auto_map"), auto_map))


def config_types(architecture: ArchitectureSpec) -> dict[str, Any]:
    """Type of each key that `config.json` may have for an architecture."""
    config_class = architecture.config_class
    types = {"model_type": str, "auto_map": dict[str, str], **_COMMON, "rope_parameters": RopeParameters | None}
    types |= getattr(config_class, "field_types", {})
    for field in fields(config_class):
        # The annotations of transformers are texts; those of the package are types.
        types.setdefault(field.name, field.type)
    return types


def check_settings(
    folder: UntrustedFolder, names: tuple[str, ...], architecture: ArchitectureSpec | None
) -> list[Finding]:
    """A finding for each unknown key or wrong type in all JSON files but config.json and the manifest.

    Args:
        names: files of the model; others are not read.
        architecture: the architecture of config.json, on which the keys of the conversion report depend; None: the
            report is not checked.
    """
    findings: list[Finding] = []
    for name in names:
        if name.endswith(".json") and name not in (CONFIG_NAME, CODE_MANIFEST):
            value = read_settings(folder, name, findings)
            if name != REPORT_NAME:
                findings += _mismatch_findings(name, value, WeightIndex if is_index(name) else settings_type(name))
            elif architecture is not None:
                found = report_mismatches(value, config_types(architecture))
                findings += [Finding(name, f"{where} {problem}", REMEDY) for where, problem in found]
            findings += _class_findings(name, value)
    return findings


def _class_findings(name: str, value: Any) -> Iterator[Finding]:
    """A finding for the name of a class in the settings `value` of the file `name` that transformers does not have."""
    key, known = _CLASS_NAMES.get(name, ("", None))
    named = value.get(key) if known is not None else None
    if known is not None and isinstance(named, str) and not known(named):
        yield Finding(name, f"{key} is {named!r}, which transformers does not have", REMEDY)


def _mismatch_findings(name: str, value: Any, kind: Any) -> list[Finding]:
    """A finding for each unknown key or wrong type in `value`, the content of the file `name` of the type `kind`."""
    return [Finding(name, f"{where} {problem}", REMEDY) for where, problem in type_mismatches(value, kind)]


def _auto_map_differences(found: Any, expected: dict[str, str]) -> Iterator[Finding]:
    """A finding for each entry of `auto_map` that differs from what the release writes."""
    if not isinstance(found, dict):
        yield Finding(CONFIG_NAME, "has no auto_map", REMEDY_EXPORT)
        return
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            rule = f"{expected[name]!r} is expected" if name in expected else "the release has no such entry"
            yield Finding(CONFIG_NAME, f"auto_map[{name!r}] is {found.get(name)!r}; {rule}", REMEDY_EXPORT)
