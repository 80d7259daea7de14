"""A checkpoint as the converter sees it: a configuration, and tensors that are read one at a time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from hf_efficient.conversion.architecture import architecture_of, architectures, load
from hf_efficient.conversion.families.family import ModelFamily, family_of_config, source_config
from hf_efficient.conversion.reading.checkpoint_files import read_config
from hf_efficient.conversion.reading.gguf_reader import GGUFReader, gguf_special_tokens
from hf_efficient.conversion.reading.hub_files import (
    card_metadata,
    download_checkpoint,
    download_tokenizer,
    gguf_names,
    is_repo_id,
    repo_of_snapshot,
)
from hf_efficient.conversion.reading.release import Release
from hf_efficient.conversion.reading.safetensors_reader import SafetensorsReader
from hf_efficient.conversion.reading.stock_names import with_stock_names
from hf_efficient.conversion.reading.tensor_reader import TensorReader
from hf_efficient.errors import HFEError, error_text


@dataclass(frozen=True)
class Source:
    """A resolved source: Hub id, local folder, GGUF file, or a folder that an architecture's own training code wrote.

    Attributes:
        location: what the user gave.
        files: local folder that holds configuration and tokenizer; for a GGUF file its folder.
        reader: the weights.
        stock_config: transformers' configuration of the source.
        config: the same model as a configuration of ours: see `ModelFamily.own_config`.
        fields: what config.json holds; empty for a source without one.
        gguf_file: name of the GGUF file in `files`; None for a folder.
        tokenizer_files: folder of the tokenizer that the user named in place of the source's own; None without one.
        special_tokens: roles such as `eos_token` and the ids that a GGUF file's metadata gives them.
        weight_files: the files that hold the weights.
        base_model, model_name, license, revision: for the model card; None when the source does not say. Never a path.
        warnings: what the user should know of how it was read.
    """

    location: str
    files: Path
    reader: TensorReader
    stock_config: PreTrainedConfig
    config: PreTrainedConfig
    fields: dict[str, Any] = field(default_factory=dict)
    weight_files: list[Path] = field(default_factory=list)
    gguf_file: str | None = None
    tokenizer_files: Path | None = None
    special_tokens: dict[str, int] = field(default_factory=dict)
    base_model: str | None = None
    model_name: str | None = None
    license: str | None = None
    revision: str | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What a report may call the source: a Hub id as it is, of a path the last part."""
        path = Path(self.location).expanduser()
        return path.resolve().name if path.exists() else self.location

    @property
    def patched(self) -> bool:
        """True for a checkpoint of one of our own architectures."""
        return architecture_of(self.stock_config.model_type) is not None

    @property
    def family(self) -> ModelFamily:
        """The family that the model belongs to."""
        return family_of_config(self.stock_config)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of configuration, tensor headers and file sizes, which identify a source without its weights."""
        fields = {name: value for name, value in self.config.to_dict().items() if name != "transformers_version"}
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
        for path in self.weight_files:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        for path in sorted(self.tokenizer_files.glob("tokenizer*")) if self.tokenizer_files else []:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        for name in self.reader.names():
            digest.update(f"{name} {list(self.reader.shape(name))} {self.reader.dtype(name)}\n".encode())
        return digest.hexdigest()

    def tokenizer(self) -> Any:
        """The tokenizer that the user named, or the source's; of a GGUF file with the tokens that its metadata names.

        Raises:
            HFEError: the source has none that transformers can load.
        """
        try:
            return self._tokenizer
        # transformers raises many kinds of errors for a missing or broken tokenizer.
        except Exception as error:
            cause = error_text(error)
            raise HFEError(
                f"{self.name if self.tokenizer_files is None else self.tokenizer_files.name} has no tokenizer that can "
                f"be loaded ({cause})",
                "put the tokenizer's files in the folder of the weights, or pass a folder or Hub id as tokenizer",
            ) from error

    @cached_property
    def _tokenizer(self) -> Any:
        # Kept, since transformers takes seconds to read one from a GGUF file.
        # False, not None: a checkpoint's own code is never run, nor is the user asked whether it may.
        if self.gguf_file is None or self.tokenizer_files is not None:
            return AutoTokenizer.from_pretrained(self.tokenizer_files or self.files, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(self.files, gguf_file=self.gguf_file, trust_remote_code=False)
        # Some versions of transformers read the end and padding tokens of a GGUF file wrongly.
        for role, token_id in self.special_tokens.items():
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(token_id))
            tokenizer.init_kwargs.pop(f"{role}_id", None)
        return tokenizer


def open_source(
    location: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    tokenizer: str | None = None,
) -> Source:
    """Open a Hub id, a local folder or a local `.gguf` file. Reads configuration and headers, no weight.

    Args:
        location: the source. A path that exists locally is never looked up on the Hub.
        revision, token: of the Hub repository.
        tokenizer: folder or Hub id of a tokenizer to use in place of the source's own.

    Raises:
        HFEError: the source is absent, damaged, or not a checkpoint that a conversion takes.
    """
    source = _open(location, revision, token)
    if tokenizer is not None:
        path = Path(tokenizer).expanduser()
        source = replace(source, tokenizer_files=path if path.is_dir() else download_tokenizer(tokenizer, token=token))
    return source if source.fields or source.gguf_file is not None else _with_special_tokens(source)


def _open(location: str, revision: str | None, token: str | None) -> Source:
    path = Path(location).expanduser()
    if path.is_dir():
        return _open_folder(location, path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise HFEError(
                f"{path.name} is a file but not a .gguf", "name a checkpoint folder, a .gguf file or a Hub repository"
            )
        return _open_gguf(location, path)
    if path.suffix.lower() == ".gguf" or not is_repo_id(location):
        raise HFEError(f"there is no file or folder {location}", "check the path, or name a Hub repository as org/name")
    return _open_folder(location, download_checkpoint(location, revision=revision, token=token))


def _open_folder(location: str, folder: Path) -> Source:
    repo, revision = repo_of_snapshot(folder)
    name = repo or folder.resolve().name
    readers = [load(path) for spec in architectures() for path in spec.release_readers]
    release = next((reader for reader in readers if reader.recognises(folder)), None)
    opened = _open_stock(folder, name) if release is None else release.open(folder, name)
    card = card_metadata(folder)
    return Source(
        location=location,
        files=folder,
        reader=opened.reader,
        stock_config=opened.stock_config,
        config=opened.config,
        fields=opened.fields,
        weight_files=opened.weight_files,
        # A patched checkpoint goes back to the stock model that it was made from.
        base_model=repo if architecture_of(opened.stock_config.model_type) is None else card.get("base_model"),
        license=card.get("license"),
        revision=revision,
        warnings=opened.warnings + _dtype_warning(opened.stock_config, opened.reader),
    )


def _open_stock(folder: Path, name: str) -> Release:
    """A folder in the layout of transformers, of a stock model or of one of our own."""
    fields = read_config(folder, name)
    stock_config = source_config(fields)
    family = family_of_config(stock_config)
    files = family.weight_files(folder, fields, name)
    reader = SafetensorsReader(files)
    warnings = family.check_fields(fields, stock_config)
    config = family.own_config(stock_config)
    return Release(with_stock_names(reader, config), stock_config, config, files, fields, warnings)


def _dtype_warning(config: PreTrainedConfig, reader: TensorReader) -> list[str]:
    """transformers loads a model in the dtype that config.json names, a conversion keeps that of the weights."""
    stored = {dtype for dtype in map(reader.dtype, reader.names()) if dtype.is_floating_point}
    if config.dtype is None or config.dtype in stored or not stored:
        return []
    named, kept = (str(dtype).removeprefix("torch.") for dtype in (config.dtype, min(stored, key=str)))
    return [
        f"the weights are {kept} and stay so; transformers would load them in {named}, which config.json names "
        f"(--dtype {named} gives the same)"
    ]


def _open_gguf(location: str, path: Path) -> Source:
    reader = GGUFReader(path)
    base_model, model_name = gguf_names(reader.file.metadata)
    return Source(
        location=location,
        files=path.parent,
        reader=reader,
        stock_config=reader.config,
        config=family_of_config(reader.config).own_config(reader.config),
        weight_files=[path],
        gguf_file=path.name,
        special_tokens=gguf_special_tokens(reader.file),
        base_model=base_model,
        model_name=model_name,
        license=reader.file.metadata.get("general.license"),
    )


def _with_special_tokens(source: Source) -> Source:
    """A source without config.json with the special tokens of its tokenizer; none if no tokenizer can be loaded."""
    try:
        tokenizer = source.tokenizer()
    except HFEError:
        if source.tokenizer_files is not None:
            raise
        return source
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(source.stock_config, role, getattr(tokenizer, role))
        setattr(source.config, role, getattr(tokenizer, role))
    return source
