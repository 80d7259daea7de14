"""Adds tokens to the tokenizer of a source, and a row for each to every tensor with a row for each token.

The row of a new token is the mean of the rows of the tokens that make up its name. The vocabulary never shrinks, and
the rows of the source's tokens do not change. If the matrix is rounded up beyond the tokenizer's last id, each further
row is the mean of all rows of the source: its logit is the mean of the source's logits, so an id without a token is
never more probable than the average token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AddedToken

from hf_efficient.conversion.families.decoder import decoder_config
from hf_efficient.conversion.families.family import expected_tensors
from hf_efficient.conversion.measuring.evaluation import LogitSource
from hf_efficient.conversion.reading.source import Source
from hf_efficient.conversion.reading.tensor_file import CHUNK_ELEMENTS
from hf_efficient.conversion.reading.tensor_reader import TensorReader
from hf_efficient.errors import HFEError, error_text
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig

# The vocabulary is rounded up to a multiple of this, as in the released code of Multiverse and MedVerse.
_MULTIPLE = 64
# A logit with probability zero; finite, so that the difference of two is not NaN.
_MASKED_LOGIT = -1e9


@dataclass(frozen=True)
class VocabularyChange:
    """The change of the vocabulary by a conversion, and how the rows of new tokens are computed.

    Attributes:
        tokenizer: the source's with the new tokens; None if its files are copied unchanged.
        token_ids: id of each requested token, new or not.
        old_size, new_size: number of rows of the embedding, before and after.
        rows: id of each new token -> ids of the tokens whose rows are averaged for it.
        suppressed: ids that the result's generation settings suppress.
    """

    tokenizer: Any
    token_ids: dict[str, int]
    old_size: int
    new_size: int
    rows: dict[int, tuple[int, ...]]
    suppressed: tuple[int, ...] = ()

    @property
    def unused(self) -> list[int]:
        """Ids from `old_size` to `new_size` - 1 that belong to no token."""
        return [token_id for token_id in range(self.old_size, self.new_size) if token_id not in self.rows]

    def token_tensors(self, config: DecoderConfig) -> set[str]:
        """Names of the result's tensors that have a row for each token; empty if no token gets a new row.

        They are those whose shape changes with `vocab_size`.
        """
        if not self.rows:
            return set()
        wider = decoder_config(config)
        wider.vocab_size += 1
        shapes = expected_tensors(config)
        return {name for name, shape in expected_tensors(wider).items() if shape != shapes[name]}

    def read(self, reader: TensorReader, name: str) -> Tensor:
        """Read a tensor [old_size, W] with a row for each token, and extend it to [new_size, W] by `fill`.

        Raises:
            HFEError: it holds NaN or infinity, or the file cannot be read or is truncated.
        """
        width = reader.shape(name)[1]
        tensor = torch.empty(self.new_size, width, dtype=reader.dtype(name))
        step = max(1, CHUNK_ELEMENTS // width)
        for start in range(0, self.old_size, step):
            stop = min(start + step, self.old_size)
            tensor[start:stop] = reader.read_rows(name, start, stop)
        return self.fill(tensor)

    def fill(self, tensor: Tensor) -> Tensor:
        """Set the rows of new tokens and of unused ids of a tensor [new_size, W] in place, and return the tensor.

        Means (see the module's docstring) are computed in fp64 and rounded to the tensor's dtype.
        """
        unused = self.unused
        if unused:
            total = torch.zeros(tensor.shape[1], dtype=torch.float64)
            for rows in tensor[: self.old_size].split(max(1, CHUNK_ELEMENTS // tensor.shape[1])):
                total += rows.sum(0, dtype=torch.float64)
            tensor[unused] = (total / self.old_size).to(tensor.dtype)
        for token_id, parts in self.rows.items():
            tensor[token_id] = tensor[list(parts)].double().mean(0).to(tensor.dtype)
        return tensor

    def shared_logits(self, logits: LogitSource) -> LogitSource:
        """`logits` [n, V] cut to the first `old_size` ids; new tokens among these get probability zero.

        Both models of an evaluation are thus compared over the source's tokens.
        """
        masked = [token_id for token_id in self.rows if token_id < self.old_size]

        def shared(ids: Tensor) -> Any:
            for chunk in logits(ids):
                chunk = chunk[:, : self.old_size].clone()
                chunk[:, masked] = _MASKED_LOGIT
                yield chunk

        return shared


def add_tokens(source: Source, tokens: Sequence[str]) -> VocabularyChange:
    """The vocabulary of `source` in which each string of `tokens` is one token; existing tokens keep their id and row.

    The row of a new token is the mean of the rows of the tokens of its name without brackets: `/Path` for `</Path>`.
    The source's own tokenizer is not changed. If every string is one token already, nothing is added, and `tokenizer`
    is None.

    Raises:
        HFEError: the source has no tokenizer that can be loaded, or the tokenizer rejects new tokens, still splits one
            of them, or gives no id or one outside the model's vocabulary for a part of a name.
    """
    before = source.tokenizer()
    size = source.config.vocab_size
    existing = _single_ids(before, tokens, size)
    if len(existing) == len(tokens):
        return VocabularyChange(None, existing, size, size, {})
    tokenizer = copy.deepcopy(before)  # the calibration text is tokenized without the new tokens
    missing = [token for token in tokens if token not in existing]
    try:
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in missing], special_tokens=True)
    # Tokenizers of other libraries raise their own error classes.
    except Exception as error:
        cause = error_text(error) or type(error).__name__
        raise HFEError(
            f"the tokenizer of {source.name}, a {type(before).__name__}, supports no new tokens ({cause})",
            "name a folder or Hub id with a tokenizer.json as tokenizer",
        ) from error
    token_ids = _single_ids(tokenizer, tokens)
    split = [token for token in tokens if token not in token_ids]
    if split:
        parts = len(tokenizer.encode(split[0], add_special_tokens=False))
        raise HFEError(
            f"the tokenizer of {source.name}, a {type(before).__name__}, still reads {' '.join(split)} as several "
            f"tokens once they were added ({split[0]}: {parts})",
            "name a folder or Hub id with a tokenizer.json as tokenizer",
        )
    used_ids = set(before.get_vocab().values())
    # A token of the vocabulary that the tokenizer never produced from text already has a row.
    new = [token for token in missing if token_ids[token] not in used_ids or token_ids[token] >= size]
    rows = {token_ids[token]: _parts(before, token, size) for token in new}
    longest = max([*used_ids, *token_ids.values()]) + 1
    rounded = -(-longest // _MULTIPLE) * _MULTIPLE
    return VocabularyChange(tokenizer, token_ids, size, size if longest <= size else rounded, rows)


def _single_ids(tokenizer: Any, tokens: Sequence[str], size: int | None = None) -> dict[str, int]:
    """Token -> id, for the tokens that are encoded as a single id, alone and within text.

    With `size`, only ids below it; the unknown token's id does not count.
    """
    ids = {}
    for token in tokens:
        alone = tokenizer.encode(token, add_special_tokens=False)
        between = tokenizer.encode(f"x\n{token}\n1", add_special_tokens=False)
        is_one_token = len(alone) == 1 and alone[0] in between and alone[0] != getattr(tokenizer, "unk_token_id", None)
        if is_one_token and (size is None or alone[0] < size):
            ids[token] = alone[0]
    return ids


def _parts(tokenizer: Any, token: str, size: int) -> tuple[int, ...]:
    """Ids of the tokens of a new token's name without brackets; `HFEError` if there are none or one has no row."""
    ids = tuple(tokenizer.encode(token[1:-1], add_special_tokens=False))
    if not ids or max(ids) >= size:
        raise HFEError(
            f"the tokenizer reads {token[1:-1]!r} as {list(ids)}, and the model has the rows 0..{size - 1}",
            "use the tokenizer that belongs to this checkpoint",
        )
    return ids
