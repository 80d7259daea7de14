"""What a checkpoint is, read from its configuration and headers alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from hf_efficient.conversion.families.decoder import check_tensors
from hf_efficient.conversion.reading.source import open_source
from hf_efficient.modeling.topology.grammar.control_tokens import CONTROL_TOKENS
from hf_efficient.registry import ARCHITECTURES

# Groups of parameters in the order of a table, each with the parts of a tensor's name that put it there.
_GROUPS = {
    "embeddings and head": ("embed_tokens", "lm_head"),
    "STEM tables": ("stem_embed",),
    "attention": ("self_attn",),
    "feed-forward": (".mlp.",),
    "norms": ("norm",),
}


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's architecture and size.

    Attributes:
        model_type: transformers' name of the architecture.
        patches: our patches it carries; empty for a stock model.
        can_convert_to: patches that a conversion could still add.
        parameters: number of parameters by group.
        bytes: bytes of the weights in the files' own dtype (GGUF: dequantised).
        dtypes: number of tensors by dtype.
        warnings: what was passed over in reading it.
    """

    source: str
    model_type: str
    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    heads: str
    tied_embeddings: bool
    stem_layers: list[int]
    patches: list[str]
    can_convert_to: list[str]
    parameters: dict[str, int]
    bytes: int
    dtypes: dict[str, int]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """The inspection as text for a terminal."""
        total = sum(self.parameters.values())
        rows = [
            ("architecture", self.model_type + (f", patched with {', '.join(self.patches)}" if self.patches else "")),
            ("shape", f"{self.layers} layers, hidden {self.hidden_size}, feed-forward {self.intermediate_size}"),
            ("attention", self.heads),
            ("vocabulary", f"{self.vocab_size:,}, embeddings {'tied' if self.tied_embeddings else 'untied'}"),
            *([("STEM layers", ", ".join(map(str, self.stem_layers)))] if self.stem_layers else []),
            ("parameters", f"{total:,} ({self.bytes / 1e9:.2f} GB, {', '.join(self.dtypes)})"),
            *((f"  {group}", f"{count:,} ({count / total:.1%})") for group, count in self.parameters.items()),
            ("can convert to", ", ".join(self.can_convert_to) or "nothing further"),
            *(("warning", warning) for warning in self.warnings),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def inspect(source: str, *, revision: str | None = None, token: str | None = None) -> Inspection:
    """Describe a checkpoint from its configuration and headers; no weight is read, no code of its is run.

    Args:
        source: Hub id, local folder or local `.gguf` file.
        revision, token: of a Hub repository.

    Raises:
        HFEError: the source is absent, damaged, or of a family that a conversion does not take.
    """
    opened = open_source(str(source), revision=revision, token=token)
    reader, config = opened.reader, opened.config
    names = reader.names()
    left_out = check_tensors(
        config, {name: reader.shape(name) for name in names}, {name: reader.dtype(name) for name in names}
    )
    parameters: dict[str, int] = dict.fromkeys(_GROUPS, 0)
    dtypes: dict[str, int] = {}
    size = 0
    for name in names:
        if name in left_out:
            continue
        group = next(group for group, marks in _GROUPS.items() if any(mark in name for mark in marks))
        count, dtype = math.prod(reader.shape(name)), reader.dtype(name)
        parameters[group] += count
        size += count * dtype.itemsize
        label = str(dtype).removeprefix("torch.")
        dtypes[label] = dtypes.get(label, 0) + 1
    patches = config.active_patches
    return Inspection(
        source=str(source),
        model_type=opened.stock_config.model_type,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        heads=f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value heads of {config.head_dim}",
        tied_embeddings=config.tie_word_embeddings,
        stem_layers=list(config.stem_layers or []),
        patches=patches,
        can_convert_to=_further_patches(patches),
        parameters={group: count for group, count in parameters.items() if count},
        bytes=size,
        dtypes=dtypes,
        warnings=opened.warnings,
    )


def _further_patches(patches: list[str]) -> list[str]:
    """What a conversion could add; of the patches that bring control tokens a checkpoint takes one."""
    taken = {*patches, *(CONTROL_TOKENS if CONTROL_TOKENS.keys() & set(patches) else ())}
    return [each.patch for each in ARCHITECTURES if each.patch and each.patch not in taken]
