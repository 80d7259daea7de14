"""A data collator for structured texts, and the function that marks a model as trained on them.

A structured text is divided by control tokens (tags such as `<Path>`, each one token) into parallel paths or steps. Its
topology (`Topology`) consists of segments, runs of consecutive tokens between the points where the text forks or joins:
a token may attend to the tokens before it in its own segment and to all tokens of the segment's ancestors. Forced
tokens are those that parallel generation appends without sampling. B is the batch size, S the row length, N the number
of segments, and W that of 64-bit words in a bitmap of segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_efficient.errors import HFEError, UsageError
from hf_efficient.modeling.topology.generation.limits import is_integer
from hf_efficient.modeling.topology.grammar.control_tokens import (
    Decode,
    check_grammar,
    control_token_ids,
    decode_function,
)
from hf_efficient.modeling.topology.grammar.topology import Topology

# Label of tokens without a loss, as in transformers.
IGNORED = -100
_LABEL_MODES = ("topology", "reference")
_BACKENDS = ("topology", "sdpa")


class _Row(NamedTuple):
    """One text, or with packing several texts in one row.

    Attributes:
        ids: token ids, int64 [S].
        has_loss: bool [S], true where the token is a label.
        topology: segments and positions of these tokens.
    """

    ids: np.ndarray
    has_loss: np.ndarray
    topology: Topology


@dataclass
class TopologyDataCollator:
    """Collates structured texts into batches for a Multiverse or MedVerse model.

        collator = TopologyDataCollator(tokenizer, "multiverse", max_length=2048)
        trainer = Trainer(model, args, data_collator=collator, …)  # args: remove_unused_columns=False

    A sample is `{"prompt", "completion"}` or `{"input_ids", "labels"?}`. The prompt is a text, or messages for the
    tokenizer's chat template; it has no loss, and the EOS token is appended to the completion. Of given
    `labels` only -100 is used, which marks tokens without a loss.

    A batch contains `input_ids`, `labels` and `position_ids`, int64 [B, S], `segment_ids`, int32 [B, S], and
    `segment_visibility`, int64 [B, N, W]: see `TopologyBatch`. Texts are padded on the right.

    Labels: transformers' loss predicts token i from the token before it in the row. The first token of a segment
    continues another token than that, so its label is -100. By default the labels of forced tokens are -100 as well:
    path and step headers, separators, and the control tokens around a join.

    Args:
        tokenizer: a tokenizer with the grammar's control tokens.
        grammar, mode: those of the model's `config.topology`.
        max_length: truncate longer texts to this number of tokens, possibly inside a block; None for no limit.
        mask_forced: no loss on forced tokens; only for ``label_mode="topology"``.
        label_mode: `topology`, as above; `reference`, every token of the completion (or of given labels other than
            -100), as in the released code.
        packing: put several texts into one row of at most `max_length` tokens. Tokens may not attend to other texts.
        pad_to_multiple_of: pad rows to a multiple of this length; None, as transformers' collators take it, is 1.
        backend: `topology`; or `sdpa`, for models of transformers: the batch then contains `attention_mask`, bool
            [B, 1, S, S], instead of `segment_ids` and `segment_visibility`.
        strict: raise for a malformed text; otherwise ignore or repair malformed control tokens, as generation does.

    Raises:
        UsageError: an option is invalid, or `tokenizer` is not a tokenizer.
        TopologyError: the tokenizer does not encode each control token as one token.
    """

    tokenizer: Any
    grammar: str
    mode: str = "dag"
    max_length: int | None = None
    mask_forced: bool = True
    label_mode: str = "topology"
    packing: bool = False
    pad_to_multiple_of: int = 1
    backend: str = "topology"
    strict: bool = True

    def __post_init__(self) -> None:
        check_grammar(self.grammar, self.mode)
        for name, words in (("label_mode", _LABEL_MODES), ("backend", _BACKENDS)):
            if getattr(self, name) not in words:
                raise UsageError(f"{name}={getattr(self, name)!r} is unknown", f"choose one of {', '.join(words)}")
        if self.max_length is not None and (not is_integer(self.max_length) or self.max_length < 1):
            raise UsageError(
                f"max_length={self.max_length!r} must be an integer of at least 1", "leave it out for no limit"
            )
        if self.packing and self.max_length is None:
            raise UsageError("packing needs the length of a row", "pass max_length")
        if self.pad_to_multiple_of is None:
            self.pad_to_multiple_of = 1
        if not is_integer(self.pad_to_multiple_of) or self.pad_to_multiple_of < 1:
            raise UsageError(
                f"pad_to_multiple_of={self.pad_to_multiple_of!r} must be an integer of at least 1", "leave it out"
            )
        _ = self._token_ids  # raises now if the tokenizer lacks a control token

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of these samples; see the class for its tensors.

        Raises:
            HFEError: there is no sample, a sample is empty, or a field is missing or invalid.
            TopologyError: a text is malformed, and `strict` is set; the message names the sample by its index.
        """
        if not features:
            raise HFEError("there are no samples to make a batch of", "pass at least one")
        rows = [self._row(feature, place) for place, feature in enumerate(features)]
        if self.packing:
            rows = self._packed(rows)
        longest = max(len(row.ids) for row in rows)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        topologies = [row.topology for row in rows]
        batch = Topology.stack(topologies, pad_to=width)
        pad = self.tokenizer.pad_token_id
        filled = {
            "input_ids": _padded([row.ids for row in rows], width, 0 if pad is None else pad),
            "labels": _padded([np.where(row.has_loss, row.ids, IGNORED) for row in rows], width, IGNORED),
            "position_ids": batch.position_ids,
        }
        if self.backend == "sdpa":
            return {**filled, "attention_mask": _dense_masks(topologies, width)}
        return {**filled, "segment_ids": batch.segment_ids, "segment_visibility": batch.segment_visibility}

    @cached_property
    def _token_ids(self) -> dict[str, int]:
        """Control token -> id; `TopologyError` if the tokenizer lacks one."""
        return control_token_ids(self.tokenizer, self.grammar)

    @cached_property
    def _decode(self) -> Decode:
        """Function from token ids to text."""
        return decode_function(self.tokenizer)

    def _row(self, feature: Mapping[str, Any], place: int) -> _Row:
        """Encode one sample, read its topology, truncate both, and choose the tokens with a loss.

        Args:
            feature: the sample.
            place: its index in the batch, for messages.

        Raises:
            HFEError, TopologyError: as for `__call__`.
        """
        ids, has_loss = self._tokens(feature, place)
        topology = Topology.from_token_ids(
            ids,
            self.grammar,
            self._token_ids,
            mode=self.mode,
            strict=self.strict,
            decode=self._decode,
            row=place,
        )
        if self.max_length is not None and len(ids) > self.max_length:
            # Truncate after reading the topology, so that a step whose header is truncated keeps its number.
            ids, has_loss = ids[: self.max_length], has_loss[: self.max_length]
            topology = _truncated(topology, self.max_length)
        if self.label_mode == "topology":
            has_loss = has_loss & ~topology.forced if self.mask_forced else has_loss.copy()
            has_loss[1:] &= topology.segment_ids[1:] == topology.segment_ids[:-1]
        return _Row(ids, has_loss, topology)

    def _tokens(self, feature: Mapping[str, Any], place: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of a sample before truncation, int64 [S], and whether each has a loss, bool [S].

        Args:
            feature: the sample.
            place: its index in the batch, for messages.

        Raises:
            HFEError: the sample is empty, or a field is missing or invalid. Errors of the tokenizer and of its chat
            template are raised as they are.
        """
        if "input_ids" in feature:
            ids = _vector(feature["input_ids"], f"input_ids of sample {place}")
            labels = ids if feature.get("labels") is None else _vector(feature["labels"], f"labels of sample {place}")
            if len(labels) != len(ids):
                raise HFEError(
                    f"sample {place} has {len(ids)} input_ids and {len(labels)} labels", "give one label for each id"
                )
            has_loss = labels != IGNORED
        elif "prompt" in feature and "completion" in feature:
            if not isinstance(feature["prompt"], Sequence) or not isinstance(feature["completion"], str):
                raise HFEError(
                    f"sample {place} has a prompt that is a {type(feature['prompt']).__name__} and a completion that "
                    f"is a {type(feature['completion']).__name__}",
                    "give a text or messages as the prompt, and a text as the completion",
                )
            prompt, completion = self._prompt_ids(feature["prompt"]), self._completion_ids(feature["completion"])
            ids = np.array([*prompt, *completion], dtype=np.int64)
            has_loss = np.arange(len(ids)) >= len(prompt)
        else:
            raise HFEError(
                f"sample {place} has the fields {', '.join(feature) or 'none'}",
                "give prompt and completion, or input_ids; Trainer keeps them with remove_unused_columns=False",
            )
        if not len(ids):
            raise HFEError(f"sample {place} is empty", "leave it out")
        return ids, has_loss

    def _prompt_ids(self, prompt: Any) -> list[int]:
        """Return the ids of a prompt: of a str with special tokens, of messages by the chat template."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt).input_ids
        text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _completion_ids(self, completion: str) -> list[int]:
        """Return the ids of a completion and the EOS token, if the tokenizer has one."""
        end = self.tokenizer.eos_token_id
        return [*self.tokenizer(completion, add_special_tokens=False).input_ids, *([] if end is None else [end])]

    def _packed(self, rows: Sequence[_Row]) -> list[_Row]:
        """Pack texts into rows of at most `max_length` tokens by first fit: each goes into the first row with room."""
        bins: list[list[_Row]] = []
        for row in rows:
            # `__post_init__` requires `max_length` for packing, which mypy cannot know.
            remaining = self.max_length - len(row.ids)  # type: ignore[operator]
            target = next((packed for packed in bins if sum(len(other.ids) for other in packed) <= remaining), None)
            if target is None:
                bins.append(target := [])
            target.append(row)
        return [_joined(packed) for packed in bins]


def mark_topology_trained(model: Any) -> None:
    """Mark a model as trained to generate control tokens, so that `generate` allows them and decodes in parallel.

    Sets ``config.topology["trained"]`` and removes the control tokens from ``generation_config.suppress_tokens``. Call
    it on the trained model before saving it.

    Args:
        model: a Multiverse or MedVerse model; wrappers of PEFT, Accelerate and `torch.compile` are unwrapped.

    Raises:
        HFEError: the model is not a Multiverse or MedVerse model.
    """
    while (inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None)) is not None:
        model = inner
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    topology = getattr(model.config, "topology", None)
    if not topology:
        raise HFEError(
            f"{type(model).__name__} has no topology in its configuration",
            "convert the model with `hf-efficient convert --patch multiverse` or `--patch medverse`",
        )
    model.config.topology = {**topology, "trained": True}
    control = set(topology["token_ids"].values())
    kept = [token_id for token_id in model.generation_config.suppress_tokens or [] if token_id not in control]
    model.generation_config.suppress_tokens = kept or None


def _truncated(topology: Topology, length: int) -> Topology:
    """Return the topology of the first `length` tokens, which does not depend on later ones; without warnings."""
    segments = topology.segment_ids[:length]
    count = int(segments.max(initial=-1)) + 1
    return Topology(
        segments,
        topology.position_ids[:length],
        topology.parents[:count],
        topology.labels[:count],
        topology.forced[:length],
    )


def _joined(rows: Sequence[_Row]) -> _Row:
    """Return several texts as one row.

    The first token of each text but the first has no loss, since the token before it belongs to another text.
    """
    has_loss = [row.has_loss.copy() for row in rows]
    for flags in has_loss[1:]:
        flags[0] = False
    ids = np.concatenate([row.ids for row in rows])
    return _Row(ids, np.concatenate(has_loss), Topology.pack([row.topology for row in rows]))


def _vector(values: Any, name: str) -> np.ndarray:
    """Return a list or tensor of integers as int64 [S].

    Args:
        values: the integers.
        name: names them in messages.

    Raises:
        HFEError: `values` is not one-dimensional, or not of integers.
    """
    try:
        vector = np.asarray(values.tolist() if isinstance(values, Tensor) else values)
    except ValueError:  # a ragged list
        raise HFEError(f"{name} are lists of different lengths", "pass one list of integers") from None
    if vector.ndim != 1 or (vector.size and vector.dtype.kind not in "iu"):
        raise HFEError(f"{name} are {vector.dtype} of shape {list(vector.shape)}", "pass one list of integers")
    return vector.astype(np.int64)


def _padded(rows: Sequence[np.ndarray], width: int, value: int) -> Tensor:
    """Return rows, each int64 [S] with S ≤ `width`, padded with `value` on the right: int64 [B, width]."""
    filled = torch.full((len(rows), width), value, dtype=torch.int64)
    for target, row in zip(filled, rows, strict=True):
        target[: len(row)] = torch.from_numpy(row)
    return filled


def _dense_masks(topologies: Sequence[Topology], width: int) -> Tensor:
    """Return the mask bool [B, 1, width, width], true where a token may attend to another.

    Padding attends to itself: the softmax of a fully masked query is NaN.
    """
    masks = torch.eye(width, dtype=torch.bool).repeat(len(topologies), 1, 1, 1)
    for mask, topology in zip(masks, topologies, strict=True):
        mask[0, : len(topology), : len(topology)] = topology.dense_mask()
    return masks


__all__ = ["IGNORED", "TopologyDataCollator", "mark_topology_trained"]
