"""The options of a conversion, checked before any source is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hf_efficient.conversion.patch import Patch, VocabularyPatch
from hf_efficient.conversion.reading.hub_files import is_repo_id
from hf_efficient.errors import UsageError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_PATCH_MEMBERS = ("name", "needs_calibration", "measures_choice", "check", "choose", "changes", "tensors", "report")


@dataclass(frozen=True)
class ConversionOptions:
    """Checked options of a conversion, with the meaning of the arguments of `hf_efficient.convert`.

    Raises:
        UsageError: an option is wrong; the message names its value and the rule.
    """

    patches: Sequence[Patch]
    dtype: str | torch.dtype
    max_shard_size: str | int
    device: str | torch.device
    seed: int
    calibration: str | Path | None
    calibration_tokens: int
    evaluate: bool
    base_model: str | None
    license: str | None
    tokenizer: str | Path | None

    def __post_init__(self) -> None:
        _check_patches(self.patches)
        check_device(self.device)
        _ = self.torch_dtype, self.max_shard_bytes  # both raise for a wrong value
        if not -(1 << 63) <= self.seed < 1 << 64:
            raise UsageError(f"seed={self.seed} does not fit into 64 bits", "give a smaller number")
        if self.calibration_tokens < 1:
            raise UsageError(f"calibration_tokens={self.calibration_tokens} must be at least 1", "the default is 18432")
        tokenizer = self.tokenizer
        if tokenizer is not None and not Path(tokenizer).expanduser().is_dir() and not is_repo_id(str(tokenizer)):
            raise UsageError(f"tokenizer={str(tokenizer)!r} is neither a folder nor a Hub id", "name one of the two")
        if self.base_model is not None and not is_repo_id(self.base_model):
            raise UsageError(f"base_model={self.base_model!r} is not a Hub id", "write it as org/name")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype of the result, None for `auto`; `UsageError` for any other than float32, bfloat16 and float16."""
        if self.dtype == "auto":
            return None
        dtype = _DTYPES.get(str(self.dtype).removeprefix("torch."))
        if dtype is None:
            raise UsageError(f"dtype={self.dtype!r} is not known", f"choose auto, {', '.join(_DTYPES)}")
        return dtype

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes, see `size_in_bytes`."""
        return size_in_bytes("max_shard_size", self.max_shard_size)

    def to_dict(self) -> dict[str, Any]:
        """Everything that determines the result, as JSON values; a local path is shortened to its last part."""
        values = {
            name: getattr(self, name)
            for name in (
                "seed",
                "calibration_tokens",
                "evaluate",
                "base_model",
                "license",
                "max_shard_bytes",
            )
        }
        values["dtype"] = str(self.dtype).removeprefix("torch.")
        values["device"] = str(self.device)
        values["calibration"] = None if self.calibration is None else _name_without_folder(self.calibration)
        values["tokenizer"] = None if self.tokenizer is None else _name_without_folder(self.tokenizer)
        values["patches"] = {patch.name: patch_fields(patch) for patch in self.patches}
        return values


def size_in_bytes(name: str, size: str | int) -> int:
    """A size in bytes, from a number or a text such as `5GB` or `2GiB`; any other raises `UsageError` about `name`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if count < 1:
        raise UsageError(f"{name}={size!r} is not a size", "write it like 5GB, 500MB or 2GiB")
    return count


def patch_fields(patch: Any) -> dict[str, Any]:
    """Field -> value of a patch, a dataclass."""
    return asdict(patch)


def _name_without_folder(location: str | Path) -> str:
    """The last part of an existing local path; any other text, such as a Hub id, unchanged."""
    path = Path(location).expanduser()
    return path.resolve().name if path.exists() else str(location)


def _check_patches(patches: Sequence[Patch]) -> None:
    """Raise `UsageError` unless these are instances of different patches, at most one of which adds tokens."""
    if isinstance(patches, str) or not isinstance(patches, Sequence):
        raise UsageError(f"patches={patches!r} must be a list of patches", "for example [Stem(layers=[1, 4])]")
    for patch in patches:
        if isinstance(patch, type) or not all(hasattr(patch, member) for member in _PATCH_MEMBERS):
            raise UsageError(f"{patch!r} is not a patch", "give instances, for example Stem(layers=[1, 4])")
    names = [patch.name for patch in patches]
    if len(set(names)) < len(names):
        raise UsageError(f"patches {', '.join(names)} name one patch twice", "give each patch once")
    adding = [patch.name for patch in patches if isinstance(patch, VocabularyPatch)]
    if len(adding) > 1:
        raise UsageError(f"patches {' and '.join(adding)} both add control tokens", "give one of them")


def check_device(device: str | torch.device) -> None:
    """Raise `UsageError` for a device on which no tensor with data can be created on this machine."""
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it holds no data")
    # torch raises the last one where it was built without CUDA.
    except (RuntimeError, TypeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise UsageError(
            f"device={str(device)!r} cannot be used here ({cause})", "use cpu, or cuda on a machine with a GPU"
        ) from error
