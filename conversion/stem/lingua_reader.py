"""STEM checkpoints of the authors' training code, which is based on Meta Lingua, read as stock checkpoints.

The folder of one training step has:

    params.json                               the training configuration; its section `model` is the architecture
    consolidated/consolidated.pth             the backbone; or consolidated.pth in the folder itself
    stem_shards/stem_model_mp{r}.pt           columns of every table, one file for each tensor-parallel rank r

These are pickles. They are opened by `torch.load` with `weights_only=True`, which creates only tensors and plain
containers, and with `mmap=True`, so that only the tensors that are read take memory.
"""

from __future__ import annotations

import pickle
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
from hf_efficient.conversion.reading.safetensors_reader import DTYPES
from hf_efficient.conversion.reading.tensor_file import check_finite
from hf_efficient.errors import HFEError, error_text
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
# Upper bound of the numbers in the section `model`.
_LARGEST = 1 << 24
# Fields of the section `model` whose effect cannot be known from the files.
_MUST_BE_EMPTY = {
    "rope_scaling": "some versions of the training code scale the rotary frequencies by it and others ignore it",
    "sliding_window": "some of the training code's attentions apply it and others ignore it",
}


@dataclass(frozen=True)
class _Piece:
    """The column slices that make up one tensor of the checkpoint, and the file of the first slice."""

    parts: list[Tensor]
    path: Path


class LinguaReader:
    """A `TensorReader` for the files of a training step, with stock names.

    Attributes:
        paths: the files with weights.
        config: transformers' configuration of the backbone, without special tokens, which the files do not name.
        stem_layers: the layers that have tables; empty for a dense checkpoint.

    Raises:
        HFEError: a file is missing or damaged, or the files disagree with each other or with params.json.
    """

    def __init__(self, folder: Path, params: dict[str, Any]) -> None:
        backbone = _backbone_file(folder)
        shards = _shard_files(folder)
        self.paths = [backbone, *shards]
        state = _backbone(backbone)
        tables = _tables(shards, state, backbone)
        model = _model_section(params)
        self.config = _config(model, vocab_size=_embedding_rows(state, backbone))
        self.stem_layers = _stem_layers(model, len(tables))
        _check_widths(tables, self.config.intermediate_size)
        self._pieces = {stock_name(name): _Piece([tensor], backbone) for name, tensor in state.items()}
        for position, index in enumerate(self.stem_layers):
            self._pieces[f"model.layers.{index}.mlp.stem_embed.weight"] = tables[position]

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """True for a folder that holds a checkpoint of this layout, complete or not, and no `config.json`."""
        signs = (PARAMS_NAME, _BACKBONE, f"{_BACKBONE_FOLDER}/{_BACKBONE}", _SHARDS_FOLDER)
        return not (folder / CONFIG_NAME).exists() and any((folder / sign).exists() for sign in signs)

    @classmethod
    def open(cls, folder: Path, name: str) -> Release:
        """The checkpoint in `folder`, which error messages call `name`."""
        if not (folder / PARAMS_NAME).is_file():
            raise HFEError(
                f"{name} has no {PARAMS_NAME}, which says what model its weights are",
                f"copy {PARAMS_NAME} from the folder of the training step",
            )
        reader = cls(folder, read_json(folder / PARAMS_NAME))
        config = decoder_config(reader.config)
        config.stem_layers = reader.stem_layers
        # Built again, so that the configuration checks the field that was added.
        return Release(reader, reader.config, decoder_config(config), reader.paths)

    def names(self) -> list[str]:
        return list(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        parts = self._pieces[name].parts
        return (*parts[0].shape[:1], sum(part.shape[1] for part in parts)) if len(parts) > 1 else tuple(parts[0].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._pieces[name].parts[0].dtype

    def read(self, name: str) -> Tensor:
        """The tensor `name`; rows of q_proj and k_proj are reordered for transformers' rotary embedding."""
        heads = self._interleaved_heads(name)
        tensor = self._columns(name, slice(None))
        return tensor if heads is None else to_rotate_half_order(tensor, heads)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Entries `start` to `stop` of the first dimension of the tensor `name`."""
        if self._interleaved_heads(name) is not None:
            return self.read(name)[start:stop].clone()
        return self._columns(name, slice(start, stop))

    def _columns(self, name: str, rows: slice) -> Tensor:
        """The `rows` of a tensor, its column slices joined; `HFEError` for NaN or infinity."""
        piece = self._pieces[name]
        parts = [part[rows] for part in piece.parts]
        return check_finite(name, torch.cat(parts, dim=1) if len(parts) > 1 else parts[0].clone(), piece.path)

    def _interleaved_heads(self, name: str) -> int | None:
        """The number of heads of a q_proj or k_proj, which Lingua stores in interleaved rotary order; else None."""
        if ".self_attn.q_proj." in name:
            return self.config.num_attention_heads
        return self.config.num_key_value_heads if ".self_attn.k_proj." in name else None


def stock_name(name: str) -> str:
    """The stock name of a backbone tensor; an unknown name is returned unchanged and reported as unknown later."""
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
            f"{folder.name} has its backbone as a distributed checkpoint, whose index is a pickle that can run any "
            "code when it is opened",
            "if you trust it, run `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{folder.name} {folder.name}/{_BACKBONE}` and convert again",
        )
    raise HFEError(
        f"{folder.name} has {PARAMS_NAME} but no {_BACKBONE}, here or in {_BACKBONE_FOLDER}/",
        "name the folder of one training step, such as checkpoints/0000010000",
    )


def _shard_files(folder: Path) -> list[Path]:
    """The files of the tables' columns, in the order of their ranks: mp10 comes after mp2; empty if there are none."""
    # The user may name the folder of the step or the folder `consolidated` in it.
    places = [folder, *([folder.parent] if folder.name == _BACKBONE_FOLDER else [])]
    shards = next((place / _SHARDS_FOLDER for place in places if (place / _SHARDS_FOLDER).is_dir()), None)
    if shards is None:
        return []
    ranks = {int(match[1]): path for path in shards.iterdir() if (match := _SHARD.fullmatch(path.name))}
    missing = sorted(set(range(max(ranks, default=-1) + 1)) - set(ranks))
    if missing or not ranks:
        raise HFEError(
            f"{_SHARDS_FOLDER} lacks stem_model_mp{missing[0] if missing else 0}.pt: every rank from 0 on has columns "
            f"of the tables, and {len(ranks)} file(s) are there",
            "copy all of them",
        )
    return [ranks[rank] for rank in sorted(ranks)]


def _load(path: Path) -> dict[str, Any]:
    """The dictionary in a file, with memory-mapped tensors; `HFEError` if the file is damaged or has other objects."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise HFEError(
            f"{path.name} has more than tensors and plain containers, so it is not opened: that could run any code",
            "if you trust it, load it and save its tensors again with torch.save",
        ) from error
    # A damaged pickle can raise any exception.
    except Exception as error:
        cause = error_text(error, named=True)
        raise HFEError(f"{path.name} cannot be read ({cause})", "copy it again") from error
    if not isinstance(content, dict):
        raise HFEError(f"{path.name} has a {type(content).__name__}, not tensors by name", "copy it again")
    return content


def _backbone(path: Path) -> dict[str, Tensor]:
    """The tensors in the file of a backbone or of table shards, by their names without wrappers' prefixes."""
    content = _load(path)
    # The file may also have the state of the optimizer.
    state = content["model"] if isinstance(content.get("model"), dict) else content
    tensors: dict[str, Tensor] = {}
    for stored, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        name = _WRAPPERS.sub("", stored) if isinstance(stored, str) else str(stored)
        if name in tensors:
            raise HFEError(f"{path.name} has the tensor {name} twice, with different prefixes", "save it again")
        tensors[name] = _checked(name, tensor, path)
    return tensors


def _checked(name: str, tensor: Tensor, path: Path) -> Tensor:
    """`tensor`, detached; `HFEError` unless it is dense, contiguous, of a known dtype and not larger than the file."""
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or not tensor.is_contiguous() or tensor.dtype not in DTYPES.values():
        raise HFEError(
            f"tensor {name} in {path.name} is a {tensor.dtype} tensor of layout {tensor.layout} on {tensor.device}, or "
            "not contiguous; a checkpoint needs contiguous dense tensors",
            "save it again with torch.save, each tensor as .contiguous()",
        )
    if tensor.numel() * tensor.itemsize > path.stat().st_size:
        raise HFEError(f"tensor {name} in {path.name} claims more bytes than the file has", "copy it again")
    return tensor.detach()


def _tables(shards: list[Path], state: dict[str, Tensor], backbone: Path) -> dict[int, _Piece]:
    """The tables by their position among the STEM layers, from the shards and the backbone.

    Tables in `state`, the tensors of the backbone's file, are removed from it.

    Raises:
        HFEError: the shards do not have the same tables with the same number of rows, or positions are missing.
    """
    tables: dict[int, _Piece] = {}
    for name in [name for name in state if _TABLE.fullmatch(name)]:
        tensor = state.pop(name)
        tables[_position(name)] = _Piece([tensor], backbone)
    columns = [{_position(name): tensor for name, tensor in _backbone(path).items()} for path in shards]
    pieces = [
        (path, position, tensor)
        for path, part in zip(shards, columns, strict=True)
        for position, tensor in part.items()
    ]
    pieces += [(backbone, position, piece.parts[0]) for position, piece in tables.items()]
    for path, position, tensor in pieces:
        if tensor.ndim != 2:
            raise HFEError(f"table {position} in {path.name} has {tensor.ndim} dimensions, not 2", "copy it again")
    for path, part in zip(shards, columns, strict=True):
        if part.keys() != columns[0].keys():
            raise HFEError(
                f"{path.name} has the tables {sorted(part)}, {shards[0].name} the tables {sorted(columns[0])}",
                "use the shards of one training step",
            )
    for position in sorted(columns[0]) if columns else []:
        parts = [part[position] for part in columns]
        rows = {path.name: len(part) for path, part in zip(shards, parts, strict=True)}
        if len(set(rows.values())) > 1:
            odd = next(name for name, count in rows.items() if count != len(parts[0]))
            raise HFEError(
                f"table {position} has {len(parts[0])} rows in {shards[0].name} and {rows[odd]} in {odd}",
                "use the shards of one training step",
            )
        tables[position] = _Piece(parts, shards[0])
    if sorted(tables) != list(range(len(tables))):
        raise HFEError(
            f"the files have the tables {sorted(tables)}; they must be numbered from 0 without gaps",
            "use the shards of one training step",
        )
    return tables


def _position(name: str) -> int:
    """The number of a table, from the name of its tensor."""
    match = _TABLE.fullmatch(name)
    if match is None:
        raise HFEError(f"a STEM shard has {name!r}, which is not a table", "use the files stem_model_mp*.pt")
    return int(match[1])


def _check_widths(tables: dict[int, _Piece], intermediate_size: int) -> None:
    """Raise `HFEError` if the columns of a table, over all shards, are not `intermediate_size`."""
    for position, piece in tables.items():
        width = sum(part.shape[1] for part in piece.parts)
        if width != intermediate_size:
            raise HFEError(
                f"table {position} has {width} columns in {len(piece.parts)} shard(s); {PARAMS_NAME} requires a "
                f"feed-forward of {intermediate_size}",
                f"copy all shards, with the {PARAMS_NAME} that belongs to them",
            )


def _embedding_rows(state: dict[str, Tensor], path: Path) -> int:
    """The number of rows of the embedding, which is the vocabulary size."""
    if "tok_embeddings.weight" not in state:
        raise HFEError(f"{path.name} has no tok_embeddings.weight", "name the folder of a whole checkpoint")
    if state["tok_embeddings.weight"].ndim != 2:
        raise HFEError(f"tok_embeddings.weight in {path.name} is not a matrix", "name the folder of a whole checkpoint")
    return len(state["tok_embeddings.weight"])


def _model_section(params: dict[str, Any]) -> dict[str, Any]:
    """The section `model`; `HFEError` if it is missing, of another model type, or sets a field of unknown effect."""
    model = params.get("model")
    if not isinstance(model, dict):
        raise HFEError(
            f"{PARAMS_NAME} has no section `model`, so this is not a checkpoint of Lingua",
            "convert Meta's own releases from their safetensors on the Hub",
        )
    kind = params.get("model_type", "llama")
    if kind != "llama":
        raise HFEError(f"{PARAMS_NAME} names the model type {str(kind)[:80]!r}", "only llama is supported")
    for name, reason in _MUST_BE_EMPTY.items():
        if model.get(name) is not None:
            raise HFEError(
                f"{PARAMS_NAME} sets {name} to {str(model[name])[:80]}; {reason}",
                f"remove {name} from {PARAMS_NAME} if the model was trained without",
            )
    return model


def _config(model: dict[str, Any], vocab_size: int) -> PreTrainedConfig:
    """The backbone's configuration; fields that the section leaves out get Lingua's defaults."""
    dim, layers = _whole_number(model, "dim"), _whole_number(model, "n_layers")
    head_dim, heads = (_whole_number(model, name, optional=True) for name in ("head_dim", "n_heads"))
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
                dim, _factor(model), _whole_number(model, "multiple_of", optional=True) or 256
            ),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": _whole_number(model, "n_kv_heads", optional=True) or heads,
            "head_dim": head_dim,
            "rms_norm_eps": model.get("norm_eps", 1e-5),
            "rope_theta": model.get("rope_theta", 10000.0),
            "max_position_embeddings": _whole_number(model, "max_seqlen", optional=True) or 1024,
            "tie_word_embeddings": bool(model.get("weight_tying", False)),
            "bos_token_id": None,
            "eos_token_id": None,
        },
        PARAMS_NAME,
    )


def _whole_number(model: dict[str, Any], name: str, *, optional: bool = False) -> int:
    """A positive integer of the section; with `optional`, 0 if it is missing or 0."""
    value: Any = model.get(name)
    if optional and (value is None or value == 0):
        return 0
    if not is_whole(value, 1, _LARGEST):
        raise HFEError(f"{PARAMS_NAME} has {name}={str(value)[:80]}, not a positive whole number", "correct the file")
    return value


def _factor(model: dict[str, Any]) -> float | None:
    """`ffn_dim_multiplier` of the section, a positive number or None."""
    value = model.get("ffn_dim_multiplier")
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LARGEST
    if value is not None and not number:
        raise HFEError(f"{PARAMS_NAME} has ffn_dim_multiplier={str(value)[:80]}, not a number", "correct the file")
    return value


def feed_forward_width(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """The feed-forward's width in Lingua: ``int(multiplier * int(2 * 4 * dim / 3))``, rounded up to `multiple_of`."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def _stem_layers(model: dict[str, Any], tables: int) -> list[int]:
    """The layers that have tables, in order; without the field all but the first, as in the training code."""
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
