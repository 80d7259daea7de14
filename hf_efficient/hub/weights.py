"""Checks a checkpoint's weights against its configuration, from index and headers; no tensor is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from hf_efficient.conversion.architecture import runtime_fields
from hf_efficient.conversion.families.family import ModelTensors, tensors_of
from hf_efficient.conversion.reading.config_file import checked_fields
from hf_efficient.conversion.reading.safetensors_reader import TensorEntry, parse_header, read_header
from hf_efficient.conversion.writing.known_settings import type_mismatches
from hf_efficient.errors import HFEError, error_text
from hf_efficient.hub.findings import Finding
from hf_efficient.hub.folder import REMEDY, UntrustedFolder
from hf_efficient.hub.weight_names import WeightSet, weight_sets
from hf_efficient.json_file import is_whole, read_weight_map
from hf_efficient.registry import ArchitectureSpec

_COPY_AGAIN = "download or copy the checkpoint again"
_ONE_CONVERSION = "use the configuration and the weights of one conversion"
_SHOWN = 5


class HeaderMetadata(TypedDict, total=False):
    """`__metadata__` in the header of a weight file."""

    format: Literal["pt"]


class HeaderEntry(TypedDict, total=False):
    """A tensor in the header of a weight file."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def check_weights(
    folder: UntrustedFolder,
    names: Sequence[str],
    architecture: ArchitectureSpec,
    fields: dict[str, Any],
    *,
    known: bool,
) -> tuple[int, list[Finding]]:
    """(number of tensors in all weight files, a finding for each fault).

    Args:
        folder: the checkpoint.
        names: its files that are part of the model.
        architecture: the architecture that config.json names.
        fields: the fields of config.json.
        known: True if every field is one of the architecture; otherwise no model is created to compare shapes.
    """
    sets = weight_sets(names)
    if not sets:
        return 0, [Finding(SAFE_WEIGHTS_NAME, "is missing", "add the weights, or convert again")]
    found = [(weight_set, *_stored_tensors(folder, weight_set)) for weight_set in sets]
    count = sum(len(stored) for _, stored, _ in found)
    findings = [finding for _, _, faults in found for finding in faults]
    if findings or not known:
        return count, findings
    try:
        layers: Any = fields.get("num_hidden_layers")
        fewest = min(len(stored) for _, stored, _ in found)
        if is_whole(layers) and layers > fewest:
            raise HFEError(f"num_hidden_layers={layers} calls for more than the {fewest} tensors found")
        expected = _expected_tensors(architecture, fields)
    # transformers and huggingface_hub raise their own error classes for a field of a wrong type or value.
    except Exception as error:
        cause = error_text(error, most=300)
        return count, [Finding(CONFIG_NAME, f"does not describe a {architecture.model_type} model ({cause})")]
    return count, [finding for weight_set, stored, _ in found for finding in _differences(weight_set, expected, stored)]


def _expected_tensors(architecture: ArchitectureSpec, fields: dict[str, Any]) -> ModelTensors:
    """The tensors of the model of the class in `architectures`; raises whatever creating it raises.

    The class is the installed package's, not the checkpoint's.
    """
    # A configuration may name a repository of kernels as its implementation of attention: that must not be fetched.
    # Fields that choose how a loaded model runs change no shape.
    ignored = runtime_fields()
    plain = {
        name: value for name, value in fields.items() if not name.endswith("_implementation") and name not in ignored
    }
    config: PreTrainedConfig = architecture.config_class.from_dict(
        checked_fields(plain, architecture.config_class), attn_implementation="eager"
    )
    by_name = {cls.__name__: cls for cls in architecture.auto_classes.values()}
    named = [by_name[name] for name in fields.get("architectures") or [] if name in by_name]
    model_class: type[PreTrainedModel] = (named or list(architecture.auto_classes.values()))[-1]
    with torch.device("meta"), no_init_weights():
        return tensors_of(model_class(config))


def _stored_tensors(folder: UntrustedFolder, weight_set: WeightSet) -> tuple[dict[str, TensorEntry], list[Finding]]:
    """(tensor name -> header entry, findings about index and headers) of one set of weights."""
    findings: list[Finding] = []
    file_of: dict[str, str] | None = None
    names, index = weight_set.files, weight_set.index
    files = set(names)
    if index in names:
        try:
            file_of = _weight_map(folder.path(index))
        except HFEError as error:
            return {}, [Finding(index, error.problem, error.remedy)]
        files = {*file_of.values(), *names} - {index}
    elif weight_set.single not in names:
        findings.append(Finding(index, "is missing, and shards are there", _COPY_AGAIN))
    stored: dict[str, TensorEntry] = {}
    for name in sorted(files):
        if name not in names:
            findings.append(Finding(name, "is missing", "add the weights, or convert again"))
            continue
        if file_of is not None and name not in file_of.values():
            findings.append(Finding(name, f"is not part of the weights that {index} names", "delete the stale file"))
            continue
        try:
            findings += _header_findings(name, folder.path(name))
            entries = parse_header(folder.path(name))
        except HFEError as error:
            findings.append(Finding(name, error.problem, error.remedy))
            continue
        for tensor in entries:
            if tensor in stored:
                findings.append(Finding(name, f"tensor {tensor} is also in {stored[tensor].path.name}", _COPY_AGAIN))
            if file_of is not None and file_of.get(tensor) != name:
                where = file_of.get(tensor, "nowhere")
                findings.append(
                    Finding(index, f"looks for tensor {tensor} in {where}, but it is in {name}", _COPY_AGAIN)
                )
        stored.update(entries)
    missing = sorted(set(file_of or ()) - set(stored)) if not findings else []
    findings += [
        Finding(index, f"names tensor {tensor}, which no file holds", _COPY_AGAIN) for tensor in missing[:_SHOWN]
    ]
    return stored, findings


def _header_findings(name: str, path: Path) -> list[Finding]:
    """A finding for each of the first unknown keys or wrong types in the header of the weight file `path`.

    `name` is its name in the findings. `HFEError` if the header cannot be read.
    """
    header, _, _ = read_header(path)
    found = list(type_mismatches(header.pop("__metadata__", {}), HeaderMetadata, "__metadata__"))
    found += type_mismatches(header, dict[str, HeaderEntry])
    return [Finding(name, f"{where} {problem}", REMEDY) for where, problem in found[:_SHOWN]]


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index.

    Raises:
        HFEError: the index cannot be read, or a name is not that of a safetensors file in the same folder.
    """
    file_of = read_weight_map(path)
    for name in file_of.values():
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise HFEError(
                f"points at {name!r}; a shard is a .safetensors file beside its index",
                "do not load this checkpoint",
            )
    return file_of


def _differences(weight_set: WeightSet, expected: ModelTensors, stored: dict[str, TensorEntry]) -> list[Finding]:
    """A finding for each tensor that is missing, unknown to the model, or of another shape; at most `_SHOWN` + 1."""
    shapes, tied = expected.shapes, expected.tied
    problems = [f"lacks tensor {name}, which {CONFIG_NAME} calls for" for name in shapes.keys() - stored.keys()]
    problems += [
        f"holds tensor {name}, which {CONFIG_NAME} does not call for"
        for name in stored.keys() - shapes.keys() - tied.keys()
    ]
    problems += [
        f"tensor {name} has shape {list(stored[name].shape)}; {CONFIG_NAME} calls for {list(shape)}"
        for name, shape in [*shapes.items(), *((name, shapes[other]) for name, other in tied.items())]
        if name in stored and stored[name].shape != shape
    ]
    place = "weights" if weight_set.variant is None else f"weights of the variant {weight_set.variant}"
    findings = [Finding(place, problem, _ONE_CONVERSION) for problem in sorted(problems)[:_SHOWN]]
    if len(problems) > _SHOWN:
        findings.append(Finding(place, f"and {len(problems) - _SHOWN} more tensors differ", _ONE_CONVERSION))
    return findings
