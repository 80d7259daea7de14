"""`Source`: an opened checkpoint (configuration, tensors that are read one at a time, tokenizer); and `open_source`.

"Stock" means transformers' own; "a configuration of ours" is one of a registered architecture of this package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from hf_efficient.conversion.architecture import architecture_of, architectures, load
from hf_efficient.conversion.families.family import ModelFamily, family_of_config, model_folder, source_config
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
from hf_efficient.conversion.reading.release import Release, ReleaseReader
from hf_efficient.conversion.reading.safetensors_reader import SafetensorsReader
from hf_efficient.conversion.reading.stock_names import with_stock_names
from hf_efficient.conversion.reading.tensor_reader import TensorReader
from hf_efficient.errors import HFEError, error_text


@dataclass(frozen=True)
class Source:
    """An opened source: a Hub id, a local folder, a GGUF file, or a checkpoint of an architecture's own training code.

    Attributes:
        location: the source as the user named it.
        files: local folder with configuration and tokenizer; for a GGUF file its folder.
        reader: the weights.
        stock_config: transformers' configuration of the source.
        config: the same model as a configuration of ours: see `ModelFamily.own_config`.
        fields: the fields of config.json; empty for a source without one.
        single_file: True if the user named a weight file, not a folder: no other file of its folder is read.
        gguf_file: name of the GGUF file in `files`; None for a folder.
        tokenizer_files: folder of the tokenizer that the user named in place of the source's own; None without one.
        special_tokens: role, such as `eos_token` -> token id, from the metadata of a GGUF file.
        weight_files: the files with the weights.
        base_model, model_name, license, revision: for the model card; None if unknown. Never a path.
        warnings: texts about how the source was read, for the user.
    """

    location: str
    files: Path
    reader: TensorReader
    stock_config: PreTrainedConfig
    config: PreTrainedConfig
    fields: dict[str, Any] = field(default_factory=dict)
    weight_files: list[Path] = field(default_factory=list)
    single_file: bool = False
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
        """Name of the source for reports and messages: its Hub id, or the last part of its path."""
        path = Path(self.location).expanduser()
        return path.resolve().name if path.exists() else self.location

    @property
    def patched(self) -> bool:
        """True if the model type is that of one of our architectures; False for a layout of authors' training code."""
        return architecture_of(self.stock_config.model_type) is not None

    @property
    def family(self) -> ModelFamily:
        """The family that the model belongs to; `HFEError` if no family has its model type."""
        return family_of_config(self.stock_config)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of configuration, tensor headers, and names and sizes of the weight files.

        A tokenizer that the user named contributes the names and sizes of its files `tokenizer*`. Reads no weights, so
        it does not depend on their values.
        """
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
        """Load the tokenizer that the user named, or the source's own; later calls return the same object.

        One from a GGUF file gets the special tokens that the metadata names.

        Raises:
            HFEError: transformers cannot load one.
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
        """See `tokenizer`; raises the errors of transformers. Cached: reading one from a GGUF file takes seconds."""
        # With None instead of False, transformers would ask the user whether to run a checkpoint's own code.
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
    accept: Callable[[dict[str, Any]], None] | None = None,
) -> Source:
    """Open a Hub id, a local folder or a local `.gguf` file. Reads configuration and headers, no weights.

    A Hub source, or a tokenizer named by a Hub id, is downloaded first. The special token ids of a source without
    config.json, other than a GGUF file, are taken from its tokenizer, if it can be loaded.

    Args:
        location: the source. A path that exists locally is never looked up on the Hub.
        revision: branch, tag or commit of a Hub repository.
        token: access token for the Hub.
        tokenizer: folder or Hub id of a tokenizer to use in place of the source's own.
        accept: for a Hub source, called with the fields of config.json before weights are downloaded; may raise.

    Raises:
        HFEError: the source is missing, damaged, cannot be downloaded, or is not supported by conversions; or the named
            tokenizer cannot be downloaded, or not be loaded where special token ids are taken from it.
        UsageError: the token is malformed.
    """
    source = _open(location, revision, token, accept)
    if tokenizer is not None:
        path = Path(tokenizer).expanduser()
        source = replace(source, tokenizer_files=path if path.is_dir() else download_tokenizer(tokenizer, token=token))
    named_tokens = source.fields or source.gguf_file is not None or not source.family.companion_files
    return source if named_tokens else _with_special_tokens(source)


def _open(
    location: str, revision: str | None, token: str | None, accept: Callable[[dict[str, Any]], None] | None
) -> Source:
    """`open_source` without a named tokenizer, with its errors.

    The special tokens of a layout without config.json are not set yet.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        return _open_folder(location, path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _open_gguf(location, path)
        reader = _release_reader(path)
        if reader is None:
            raise HFEError(
                f"{path.name} is a file but not a .gguf", "name a checkpoint folder, a .gguf file or a Hub repository"
            )
        return _source(location, path.parent, reader.open(path, path.name), single_file=True)
    if path.suffix.lower() == ".gguf" or not is_repo_id(location):
        raise HFEError(f"there is no file or folder {location}", "check the path, or name a Hub repository as org/name")
    return _open_folder(location, download_checkpoint(location, revision=revision, token=token, accept=accept))


def _open_folder(location: str, folder: Path) -> Source:
    """Open a checkpoint folder, in the layout of its library or of an architecture's own training code.

    Raises:
        HFEError: a file is missing or damaged, or the model is not supported.
    """
    name = repo_of_snapshot(folder)[0] or folder.resolve().name
    reader = _release_reader(folder)
    opened = _open_stock(model_folder(folder), name) if reader is None else reader.open(folder, name)
    return _source(location, folder, opened)


def _release_reader(path: Path) -> type[ReleaseReader] | None:
    """The reader of an architecture's own training code that recognises a folder or file; None for any other."""
    readers = (load(name) for spec in architectures() for name in spec.release_readers)
    return next((reader for reader in readers if reader.recognises(path)), None)


def _source(location: str, folder: Path, opened: Release, *, single_file: bool = False) -> Source:
    """The source with the weights `opened`; licence and names come from the card in `folder`, if it is the source."""
    repo, revision = repo_of_snapshot(folder)
    card = {} if single_file else card_metadata(folder)
    return Source(
        location=location,
        files=folder,
        single_file=single_file,
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
    """Open a folder with config.json and safetensors of a stock model or of one of ours.

    Raises:
        HFEError: a file is missing or damaged, or the model is not supported.
    """
    fields = read_config(folder, name)
    stock_config = source_config(fields)
    family = family_of_config(stock_config)
    files = family.weight_files(folder, fields, name)
    reader = SafetensorsReader(files)
    warnings = family.check_fields(fields, stock_config)
    config = family.own_config(stock_config)
    return Release(with_stock_names(reader, config), stock_config, config, files, fields, warnings)


def _dtype_warning(config: PreTrainedConfig, reader: TensorReader) -> list[str]:
    """A list of one warning if no weight has the dtype of config.json, since a conversion keeps the weights' dtype.

    Empty if one has it, config.json names none, or no weight is of a floating-point dtype.
    """
    stored = {dtype for dtype in map(reader.dtype, reader.names()) if dtype.is_floating_point}
    if config.dtype is None or config.dtype in stored or not stored:
        return []
    named, kept = (str(dtype).removeprefix("torch.") for dtype in (config.dtype, min(stored, key=str)))
    return [
        f"the weights are {kept} and stay so; transformers would load them in {named}, which config.json names "
        f"(--dtype {named} gives the same)"
    ]


def _open_gguf(location: str, path: Path) -> Source:
    """Open a GGUF file; configuration, licence and names come from its metadata. Errors as for `GGUFReader`."""
    reader = GGUFReader(path)
    base_model, model_name = gguf_names(reader.file.metadata)
    return Source(
        location=location,
        files=path.parent,
        reader=reader,
        stock_config=reader.config,
        config=family_of_config(reader.config).own_config(reader.config),
        weight_files=[path],
        single_file=True,
        gguf_file=path.name,
        special_tokens=gguf_special_tokens(reader.file),
        base_model=base_model,
        model_name=model_name,
        license=reader.file.metadata.get("general.license"),
    )


def _with_special_tokens(source: Source) -> Source:
    """Set the special token ids of a source without config.json to its tokenizer's; none if no tokenizer can be loaded.

    Changes the configurations in place, and returns the source. `HFEError` if a tokenizer that the user named cannot be
    loaded.
    """
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
