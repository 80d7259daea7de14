"""Reads STEM checkpoints of the authors' training code (based on Meta Lingua) with transformers parameter names.

The checkpoint directory of one training step has:

    params.json                               the training configuration; its section `model` is the architecture
    consolidated/consolidated.pth             the backbone: all parameters but the STEM embedding tables; it may also
                                              be consolidated.pth in the directory itself
    stem_shards/stem_model_mp{r}.pt           column shards of the STEM embedding tables, one file for each
                                              tensor-parallel rank r

The weight files are pickles; `reading/torch_file.py` opens them without running code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from hf_efficient.conversion.families.decoder import decoder_config
from hf_efficient.conversion.families.family import source_config
from hf_efficient.conversion.reading.release import Release
from hf_efficient.conversion.reading.rotary_order import to_rotate_half_order
from hf_efficient.conversion.reading.tensor_file import check_finite
from hf_efficient.conversion.reading.torch_file import checked_tensor, load_torch_file
from hf_efficient.errors import HFEError
from hf_efficient.json_file import is_whole, read_json

PARAMS_NAME = "params.json"
_BACKBONE = "consolidated.pth"
_BACKBONE_FOLDER = "consolidated"
_SHARDS_FOLDER = "stem_shards"
_SHARD = re.compile(r"stem_(?:model_)?mp(\d+)\.pt")
# Prefixes that wrappers of the model add to the names of its parameters.
_WRAPPERS = re.compile(r"^(?:(?:_orig_mod|module|model|lm_transformer)\.)+")
_TOP_LEVEL = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "output.tied_module.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_LAYER = re.compile(r"layers\.(\d+)\.([\w.]+)\.(weight)")
_TABLE = re.compile(r"stem_embeddings\.(\d+)\.weight")
# Values in the section `model` above this are rejected as damaged.
_MAX_VALUE = 1 << 24
# Fields of the section `model` that are rejected if set, since the files do not say what effect they had.
_UNSUPPORTED_FIELDS = {
    "rope_scaling": "some versions of the training code scale the rotary frequencies by it and others ignore it",
    "sliding_window": "some of the training code's attentions apply it and others ignore it",
}


@dataclass(frozen=True)
class _ShardedTensor:
    """The column shards of one tensor of the checkpoint (one part if it is not split), and the first one's file."""

    parts: list[Tensor]
    path: Path


class LinguaReader:
    """A `TensorReader` (tensors by name, read one at a time) for a checkpoint directory of one training step.

    Args:
        folder: the checkpoint directory, or the folder `consolidated` in it.
        params: the content of params.json.

    Attributes:
        paths: the files with weights, memory-mapped.
        config: transformers' `LlamaConfig` of the backbone, without special tokens, which the files do not name.
        stem_layers: the layers that have tables, ascending; empty for a dense checkpoint.

    Raises:
        HFEError: a file is missing or damaged, or the files disagree with each other or with params.json.
    """

    def __init__(self, folder: Path, params: dict[str, Any]) -> None:
        backbone = _backbone_file(folder)
        shards = _shard_files(folder)
        self.paths = [backbone, *shards]
        state = _load_tensors(backbone)
        tables = _tables(shards, state, backbone)
        model = _model_section(params)
        self.config = _config(model, vocab_size=_embedding_rows(state, backbone))
        self.stem_layers = _stem_layers(model, len(tables))
        _check_widths(tables, self.config.intermediate_size)
        self._tensors = {transformers_name(name): _ShardedTensor([tensor], backbone) for name, tensor in state.items()}
        for index, layer in enumerate(self.stem_layers):
            self._tensors[f"model.layers.{layer}.mlp.stem_embed.weight"] = tables[index]

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """True for a folder without `config.json` that has any file of this layout; the rest may be missing."""
        marker_files = (PARAMS_NAME, _BACKBONE, f"{_BACKBONE_FOLDER}/{_BACKBONE}", _SHARDS_FOLDER)
        return not (folder / CONFIG_NAME).exists() and any((folder / marker).exists() for marker in marker_files)

    @classmethod
    def open(cls, folder: Path, name: str) -> Release:
        """Open the checkpoint in `folder`; error messages refer to it as `name`.

        Raises:
            HFEError: params.json is missing or not valid, the configuration is not one of our decoder's, or as the
                constructor.
        """
        if not (folder / PARAMS_NAME).is_file():
            raise HFEError(
                f"{name} has no {PARAMS_NAME}, which says what model its weights are",
                f"copy {PARAMS_NAME} from the folder of the training step",
            )
        reader = cls(folder, read_json(folder / PARAMS_NAME))
        config = decoder_config(reader.config)
        config.stem_layers = reader.stem_layers
        # Re-create the configuration, which validates stem_layers.
        return Release(reader, reader.config, decoder_config(config), reader.paths)

    def names(self) -> list[str]:
        """Names of all tensors, as in our decoder's state dict; those that it does not have keep their stored names."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor, its column shards joined."""
        parts = self._tensors[name].parts
        return (*parts[0].shape[:1], sum(part.shape[1] for part in parts)) if len(parts) > 1 else tuple(parts[0].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which the tensor is stored."""
        return self._tensors[name].parts[0].dtype

    def read(self, name: str) -> Tensor:
        """A copy of the tensor `name`; rows of q_proj and k_proj are reordered for transformers' rotary embedding.

        Raises:
            HFEError: it holds NaN or infinity.
        """
        heads = self._interleaved_heads(name)
        tensor = self._columns(name, slice(None))
        return tensor if heads is None else to_rotate_half_order(tensor, heads)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """A copy of ``read(name)[start:stop]``, with its errors; other rows are read only for q_proj and k_proj."""
        if self._interleaved_heads(name) is not None:
            return self.read(name)[start:stop].clone()
        return self._columns(name, slice(start, stop))

    def _columns(self, name: str, rows: slice) -> Tensor:
        """A copy of the `rows` of a tensor, its column shards joined; `HFEError` for NaN or infinity."""
        sharded = self._tensors[name]
        parts = [part[rows] for part in sharded.parts]
        return check_finite(name, torch.cat(parts, dim=1) if len(parts) > 1 else parts[0].clone(), sharded.path)

    def _interleaved_heads(self, name: str) -> int | None:
        """Number of heads of a q_proj or k_proj, whose rows Lingua stores in interleaved order; None for others."""
        if ".self_attn.q_proj." in name:
            return self.config.num_attention_heads
        return self.config.num_key_value_heads if ".self_attn.k_proj." in name else None


def transformers_name(name: str) -> str:
    """The transformers name of a backbone tensor. An unknown name is returned unchanged; `check_source` rejects it."""
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name]
    in_layer = _LAYER.fullmatch(name)
    if in_layer and in_layer[2] in _IN_LAYER:
        return f"model.layers.{in_layer[1]}.{_IN_LAYER[in_layer[2]]}.{in_layer[3]}"
    return name


def _backbone_file(folder: Path) -> Path:
    """The file of the backbone; `HFEError` if it is missing or still a distributed checkpoint."""
    for path in (folder / _BACKBONE_FOLDER / _BACKBONE, folder / _BACKBONE):
        if path.is_file():
            return path
    if any(folder.glob("*.distcp")):
        raise HFEError(
            f"{folder.name} has its backbone as a distributed checkpoint, whose index is a pickle that can execute "
            "arbitrary code when it is opened",
            "if you trust it, run `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{folder.name} {folder.name}/{_BACKBONE}` and convert again",
        )
    raise HFEError(
        f"{folder.name} has {PARAMS_NAME} but no {_BACKBONE}, here or in {_BACKBONE_FOLDER}/",
        "name the folder of one training step, such as checkpoints/0000010000",
    )


def _shard_files(folder: Path) -> list[Path]:
    """The files with column shards of the tables, in the order of their ranks: mp10 comes after mp2.

    An empty list if there is no folder `stem_shards`.

    Raises:
        HFEError: a rank's file is missing, or the folder has none.
    """
    # The user may name the folder of the step or the folder `consolidated` in it.
    places = [folder, *([folder.parent] if folder.name == _BACKBONE_FOLDER else [])]
    shards = next((place / _SHARDS_FOLDER for place in places if (place / _SHARDS_FOLDER).is_dir()), None)
    if shards is None:
        return []
    ranks = {int(match[1]): path for path in shards.iterdir() if (match := _SHARD.fullmatch(path.name))}
    missing = sorted(set(range(max(ranks, default=-1) + 1)) - set(ranks))
    if missing or not ranks:
        raise HFEError(
            f"{_SHARDS_FOLDER} lacks stem_model_mp{missing[0] if missing else 0}.pt: every rank from 0 on has column "
            f"shards of the tables, and {len(ranks)} file(s) are there",
            "copy all of them",
        )
    return [ranks[rank] for rank in sorted(ranks)]


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """Load the tensors, memory-mapped, of a backbone or table shard; their names lose the prefixes of wrappers.

    Raises:
        HFEError: as `load_torch_file` and `checked_tensor`, or two tensors have the same name without prefixes.
    """
    content = load_torch_file(path)
    # The file may also have the state of the optimizer.
    state = content["model"] if isinstance(content.get("model"), dict) else content
    tensors: dict[str, Tensor] = {}
    for stored, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        name = _WRAPPERS.sub("", stored) if isinstance(stored, str) else str(stored)
        if name in tensors:
            raise HFEError(f"{path.name} has the tensor {name} twice, with different prefixes", "save it again")
        tensors[name] = checked_tensor(name, tensor, path)
    return tensors


def _tables(shards: list[Path], state: dict[str, Tensor], backbone: Path) -> dict[int, _ShardedTensor]:
    """The STEM embedding tables, index -> table, from the shards and the backbone; index i is the i-th STEM layer.

    Tables in `state`, the tensors of the backbone's file, are removed from it; the shards take precedence.

    Raises:
        HFEError: a shard cannot be loaded (see `_load_tensors`) or has another tensor than tables, a table is no
            matrix, the shards differ in their tables or numbers of rows, or an index is missing.
    """
    tables: dict[int, _ShardedTensor] = {}
    for name in [name for name in state if _TABLE.fullmatch(name)]:
        tensor = state.pop(name)
        tables[_table_index(name)] = _ShardedTensor([tensor], backbone)
    columns = [{_table_index(name): tensor for name, tensor in _load_tensors(path).items()} for path in shards]
    parts_by_index = [
        (path, index, tensor) for path, part in zip(shards, columns, strict=True) for index, tensor in part.items()
    ]
    parts_by_index += [(backbone, index, table.parts[0]) for index, table in tables.items()]
    for path, index, tensor in parts_by_index:
        if tensor.ndim != 2:
            raise HFEError(f"table {index} in {path.name} has {tensor.ndim} dimensions, not 2", "copy it again")
    for path, part in zip(shards, columns, strict=True):
        if part.keys() != columns[0].keys():
            raise HFEError(
                f"{path.name} has the tables {sorted(part)}, {shards[0].name} the tables {sorted(columns[0])}",
                "use the shards of one training step",
            )
    for index in sorted(columns[0]) if columns else []:
        parts = [part[index] for part in columns]
        rows = {path.name: len(part) for path, part in zip(shards, parts, strict=True)}
        if len(set(rows.values())) > 1:
            odd = next(name for name, count in rows.items() if count != len(parts[0]))
            raise HFEError(
                f"table {index} has {len(parts[0])} rows in {shards[0].name} and {rows[odd]} in {odd}",
                "use the shards of one training step",
            )
        tables[index] = _ShardedTensor(parts, shards[0])
    if sorted(tables) != list(range(len(tables))):
        raise HFEError(
            f"the files have the tables {sorted(tables)}; they must be numbered from 0 without gaps",
            "use the shards of one training step",
        )
    return tables


def _table_index(name: str) -> int:
    """The index of a STEM embedding table, from its tensor's name; `HFEError` for any other name."""
    match = _TABLE.fullmatch(name)
    if match is None:
        raise HFEError(f"a STEM shard has {name!r}, which is not a table", "use the files stem_model_mp*.pt")
    return int(match[1])


def _check_widths(tables: dict[int, _ShardedTensor], intermediate_size: int) -> None:
    """Raise `HFEError` if the columns of a table, over all shards, are not `intermediate_size`."""
    for index, table in tables.items():
        width = sum(part.shape[1] for part in table.parts)
        if width != intermediate_size:
            raise HFEError(
                f"table {index} has {width} columns in {len(table.parts)} shard(s); {PARAMS_NAME} requires a "
                f"feed-forward of {intermediate_size}",
                f"copy all shards, with the {PARAMS_NAME} that belongs to them",
            )


def _embedding_rows(state: dict[str, Tensor], path: Path) -> int:
    """The number of rows of the embedding, the vocabulary size; `HFEError` if it is missing or not a matrix."""
    if "tok_embeddings.weight" not in state:
        raise HFEError(f"{path.name} has no tok_embeddings.weight", "name the folder of a whole checkpoint")
    if state["tok_embeddings.weight"].ndim != 2:
        raise HFEError(f"tok_embeddings.weight in {path.name} is not a matrix", "name the folder of a whole checkpoint")
    return len(state["tok_embeddings.weight"])


def _model_section(params: dict[str, Any]) -> dict[str, Any]:
    """The section `model` of params.json; `HFEError` if missing, not llama, or with one of `_UNSUPPORTED_FIELDS`."""
    model = params.get("model")
    if not isinstance(model, dict):
        raise HFEError(
            f"{PARAMS_NAME} has no section `model`, so this is not a checkpoint of Lingua",
            "convert official Llama checkpoints from their safetensors on the Hub",
        )
    kind = params.get("model_type", "llama")
    if kind != "llama":
        raise HFEError(f"{PARAMS_NAME} names the model type {str(kind)[:80]!r}", "only llama is supported")
    for name, reason in _UNSUPPORTED_FIELDS.items():
        if model.get(name) is not None:
            raise HFEError(
                f"{PARAMS_NAME} sets {name} to {str(model[name])[:80]}; {reason}",
                f"remove {name} from {PARAMS_NAME} if the model was trained without",
            )
    return model


def _config(model: dict[str, Any], vocab_size: int) -> PreTrainedConfig:
    """The backbone's `LlamaConfig`; fields that the section `model` does not have get Lingua's defaults.

    Raises:
        HFEError: a number is missing or not a positive integer, `n_heads` and `head_dim` are both missing,
            `ffn_dim_multiplier` is not a positive number, or transformers rejects the configuration.
    """
    dim, layers = _positive_int(model, "dim"), _positive_int(model, "n_layers")
    head_dim, heads = (_positive_int(model, name, optional=True) for name in ("head_dim", "n_heads"))
    if not (head_dim or heads):
        raise HFEError(f"{PARAMS_NAME} names neither n_heads nor head_dim", "use the file of this training step")
    head_dim = head_dim or dim // heads
    heads = heads or dim // head_dim
    return source_config(
        {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": dim,
            "intermediate_size": feed_forward_width(
                dim, _factor(model), _positive_int(model, "multiple_of", optional=True) or 256
            ),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": _positive_int(model, "n_kv_heads", optional=True) or heads,
            "head_dim": head_dim,
            "rms_norm_eps": model.get("norm_eps", 1e-5),
            "rope_theta": model.get("rope_theta", 10000.0),
            "max_position_embeddings": _positive_int(model, "max_seqlen", optional=True) or 1024,
            "tie_word_embeddings": bool(model.get("weight_tying", False)),
            "bos_token_id": None,
            "eos_token_id": None,
        },
        PARAMS_NAME,
    )


def _positive_int(model: dict[str, Any], name: str, *, optional: bool = False) -> int:
    """The field `name` of the section `model`; 0 if it is `optional` and missing or 0.

    Raises:
        HFEError: it is not an integer from 1 to `_MAX_VALUE`.
    """
    value: Any = model.get(name)
    if optional and (value is None or value == 0):
        return 0
    if not is_whole(value, 1, _MAX_VALUE):
        raise HFEError(f"{PARAMS_NAME} has {name}={str(value)[:80]}, not a positive whole number", "correct the file")
    return value


def _factor(model: dict[str, Any]) -> float | None:
    """`ffn_dim_multiplier` of the section `model`, or None without it.

    Raises:
        HFEError: it is not a positive number below `_MAX_VALUE`.
    """
    value = model.get("ffn_dim_multiplier")
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _MAX_VALUE
    if value is not None and not number:
        raise HFEError(f"{PARAMS_NAME} has ffn_dim_multiplier={str(value)[:80]}, not a number", "correct the file")
    return value


def feed_forward_width(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """The `intermediate_size`: ``int(multiplier * int(2 * 4 * dim / 3))``, rounded up to `multiple_of`."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def _stem_layers(model: dict[str, Any], tables: int) -> list[int]:
    """The layers that have STEM tables, ascending; without `stem_layers` all but layer 0, as in the training code.

    Raises:
        HFEError: the field is not a list of different integers from 0 on, or their number differs from `tables`, the
            number of tables in the files.
    """
    named = model.get("stem_layers")
    if named is None:
        layers = list(range(1, model["n_layers"])) if tables else []
    elif isinstance(named, list) and all(map(is_whole, named)) and len(set(named)) == len(named):
        layers = sorted(named)
    else:
        raise HFEError(f"{PARAMS_NAME} has stem_layers={str(named)[:80]!r}, not a list of layers", "correct the file")
    if len(layers) != tables:
        raise HFEError(
            f"{PARAMS_NAME} has {len(layers)} STEM layers ({layers}), the files have {tables} tables",
            f"copy {_SHARDS_FOLDER} too, with the {PARAMS_NAME} that belongs to it",
        )
    return layers
