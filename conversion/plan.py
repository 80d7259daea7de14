"""The plan of a conversion: how each tensor is produced, and the disk and memory needed, before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_efficient.conversion.architecture import ArchitectureSpec
from hf_efficient.conversion.families.family import model_tensors, skeleton
from hf_efficient.conversion.families.tensors import check_tensors
from hf_efficient.conversion.patch import NewTensor, Patch
from hf_efficient.conversion.reading.source import Source
from hf_efficient.conversion.reading.tensor_file import CHUNK_ELEMENTS
from hf_efficient.conversion.reading.tensor_reader import TensorReader
from hf_efficient.conversion.writing.shard_writer import Shard, StoredTensor, split_into_shards
from hf_efficient.errors import HFEError

# Fields of a configuration that describe the file or the class, and are set anew for the result.
_FILE_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "dtype")


@dataclass(frozen=True)
class ModelSize:
    """Size of a model.

    Attributes:
        parameters: number of stored parameters; a tied head counts once.
        bytes: bytes of the stored tensors.
        flops_per_token: ``2 * (parameters of linear layers, the head included)``: one multiplication and one addition
            for each in a forward pass. Table and embedding look-ups cost none. Attention scores, whose cost grows with
            the context, are not counted.
    """

    parameters: int
    bytes: int
    flops_per_token: int

    @classmethod
    def of(cls, config: PreTrainedConfig, tensors: Sequence[StoredTensor]) -> ModelSize:
        """The size of the model of `config` whose stored tensors are `tensors`; creates it on the meta device."""
        linear = (m.weight.numel() for m in skeleton(config).modules() if isinstance(m, nn.Linear))
        return cls(sum(t.elements for t in tensors), sum(t.bytes for t in tensors), 2 * sum(linear))


@dataclass(frozen=True)
class ConversionPlan:
    """How each tensor of the result is produced, and which tensors of the source are not used.

    Attributes:
        config: configuration of the result.
        shards: weight files of the result, in the order in which they are written.
        copied: names of the tensors that are copied from the source, those of wider dtypes first.
        computed: patch name -> tensor name -> shape, dtype and origin of the tensor that the patch computes.
        dropped: names of the source tensors that a patch replaces.
        left_out: source tensor that the model does not load, e.g. a stored copy of a tied head -> reason.
        before, after: size of source and result.
    """

    config: PreTrainedConfig
    shards: list[Shard]
    copied: list[str]
    computed: dict[str, dict[str, NewTensor]]
    dropped: list[str]
    left_out: dict[str, str]
    before: ModelSize
    after: ModelSize

    @property
    def disk_bytes(self) -> int:
        """Size of the weight files in bytes, headers included."""
        return sum(len(shard.header()) + shard.data_bytes for shard in self.shards)

    @property
    def peak_memory_bytes(self) -> int:
        """Peak bytes of weights in memory: the largest tensor in fp32, and two chunks of `CHUNK_ELEMENTS` elements.

        Not counted: calibration needs the weights of one layer and the hidden states of its text.
        """
        largest = max(tensor.elements for shard in self.shards for tensor in shard.tensors)
        return (largest + 2 * CHUNK_ELEMENTS) * torch.float32.itemsize


def check_source(source: Source) -> dict[str, str]:
    """Compare a source's tensors with its configuration; returns the tensors to leave out, name -> reason.

    Reads no weights, except that a stored copy of a tied tensor is compared with the tensor it is tied to.

    Raises:
        HFEError: a tensor is missing, unknown, of another shape or quantised, or a stored head cannot be read or
            differs from the embedding although config.json ties them.
    """
    reader, config = source.reader, source.config
    names = reader.names()
    left_out = check_tensors(config, {n: reader.shape(n) for n in names}, {n: reader.dtype(n) for n in names})
    for name, owner in model_tensors(config).tied.items() if left_out else ():
        if name in left_out:
            _check_tied(reader, name, owner)
    return left_out


def plan_conversion(
    source: Source,
    patches: Sequence[Patch[Any]],
    choices: dict[str, Any],
    target: ArchitectureSpec,
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    left_out: dict[str, str],
) -> ConversionPlan:
    """Plan the conversion of a source that `check_source` accepted. Reads no weights.

    Args:
        choices: configuration fields that the patches chose, name -> value.
        target: architecture of the result.
        dtype: dtype of the result, except of tensors that the model has in float32 always; None keeps each source
            tensor's own, and gives new tensors the dtype of most source elements.
        max_shard_bytes: largest size of a weight file.
        left_out: the result of `check_source`.

    Raises:
        HFEError: a tensor of the result is neither copied nor computed, one of the source is neither used nor dropped,
            or a patch computes a tensor that the model does not have, or drops one that it uses.
    """
    reader = source.reader
    main_dtype = dtype or _main_dtype(reader, left_out)
    fields = {name: value for name, value in source.config.to_dict().items() if name not in _FILE_FIELDS}
    config = target.config_class(**{**fields, **choices}, dtype=main_dtype)
    config.architectures = [target.auto_classes[source.family.auto_class(source.stock_config)].__name__]
    changes = {patch.name: patch.changes(config, main_dtype) for patch in patches}
    computed = {name: change.added for name, change in changes.items()}
    added = [tensor for tensors in computed.values() for tensor in tensors]
    dropped = [name for change in changes.values() for name in change.dropped]

    tensors = model_tensors(config)
    expected = tensors.shapes
    copied = [name for name in expected if name not in added]
    _check_every_tensor_planned(reader, expected, copied, added, dropped, left_out)
    kept = dict.fromkeys(tensors.float32, torch.float32) if dtype is not None else {}
    dtypes = {name: kept.get(name, dtype or reader.dtype(name)) for name in copied}
    # Wider elements first, so that every tensor in a file is aligned to its element size.
    copied.sort(key=lambda name: -dtypes[name].itemsize)
    stored = [StoredTensor(name, expected[name], dtypes[name]) for name in copied]
    stored += [StoredTensor(n, t.shape, t.dtype) for tensors in computed.values() for n, t in tensors.items()]
    in_source = [StoredTensor(n, reader.shape(n), reader.dtype(n)) for n in reader.names() if n not in left_out]
    return ConversionPlan(
        config=config,
        shards=split_into_shards(stored, max_shard_bytes),
        copied=copied,
        computed=computed,
        dropped=dropped,
        left_out=left_out,
        before=ModelSize.of(source.config, in_source),
        after=ModelSize.of(config, stored),
    )


def _main_dtype(reader: TensorReader, left_out: dict[str, str]) -> torch.dtype:
    """The dtype of most elements of the source, not counting the tensors in `left_out`.

    Of two dtypes with equally many, that of the tensor that comes first.
    """
    elements: dict[torch.dtype, int] = {}
    for name in reader.names():
        if name not in left_out:
            count = torch.Size(reader.shape(name)).numel()
            elements[reader.dtype(name)] = elements.get(reader.dtype(name), 0) + count
    return max(elements, key=lambda dtype: elements[dtype])


def _check_every_tensor_planned(
    reader: TensorReader,
    expected: dict[str, tuple[int, ...]],
    copied: list[str],
    added: list[str],
    dropped: list[str],
    left_out: dict[str, str],
) -> None:
    """Raise `HFEError` unless the plan covers each tensor of source and result.

    Each tensor of the result (`expected`, name -> shape) is copied or computed, and each of the source is copied,
    dropped or left out. A computed tensor must be one of the result, and no dropped one may be copied.
    """
    names = set(reader.names())
    problems = {
        "neither copied nor computed": [name for name in copied if name not in names],
        "computed but unknown to the model": [name for name in added if name not in expected],
        "neither used nor dropped": sorted(names - {*copied, *dropped, *left_out}),
        "dropped but used": sorted({*dropped} & {*copied}),
    }
    for problem, tensors in problems.items():
        if tensors:
            raise HFEError(f"tensor {tensors[0]} is {problem}", "this is an error in the patch; please report it")


def _check_tied(reader: TensorReader, name: str, owner: str) -> None:
    """Raise `HFEError` unless the stored tensor `name` equals `owner`, which it is tied to; compared in row chunks.

    Errors in reading them, such as NaN, are `HFEError` too.
    """
    shape = reader.shape(owner)
    step = max(1, CHUNK_ELEMENTS // torch.Size(shape[1:]).numel())
    for start in range(0, shape[0], step):
        if not torch.equal(reader.read_rows(name, start, start + step), reader.read_rows(owner, start, start + step)):
            raise HFEError(
                f"config.json ties the head to the embedding, but {name} differs from {owner}",
                "set tie_word_embeddings to false in config.json, or remove the head from the checkpoint",
            )
