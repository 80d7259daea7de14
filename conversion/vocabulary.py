"""Tokens that a conversion adds: to the tokenizer, and as rows of every tensor that has a row for each token.

The row of a new token is the mean of the rows of the tokens that make up its name. The vocabulary never shrinks, and
the rows of the source's tokens stay as they are. Where the matrix is longer than the tokenizer needs, the rows beyond
are the mean of all of the source's: the logit of such a row is the mean of the source's logits, so that it is never
likelier than the average token.
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

# The released code rounds the vocabulary up to a multiple of this.
_MULTIPLE = 64
# A logit whose probability is zero; finite, so that the difference of two is no NaN.
_MASKED_LOGIT = -1e9


@dataclass(frozen=True)
class VocabularyChange:
    """How a conversion changes the vocabulary.

    Attributes:
        tokenizer: the source's with the new tokens; None if its files are copied unchanged.
        token_ids: id of each requested token, new or not.
        old_size, new_size: rows of the embedding, before and after.
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
        """Ids from `old_size` on that belong to no token."""
        return [token_id for token_id in range(self.old_size, self.new_size) if token_id not in self.rows]

    def token_tensors(self, config: DecoderConfig) -> set[str]:
        """Names of the tensors of the result that have a row for each token."""
        if not self.rows:
            return set()
        wider = decoder_config(config)
        wider.vocab_size += 1
        shapes = expected_tensors(config)
        return {name for name, shape in expected_tensors(wider).items() if shape != shapes[name]}

    def read(self, reader: TensorReader, name: str) -> Tensor:
        """A tensor of the source that has a row for each token [old_size, W], extended to [new_size, W]."""
        width = reader.shape(name)[1]
        tensor = torch.empty(self.new_size, width, dtype=reader.dtype(name))
        step = max(1, CHUNK_ELEMENTS // width)
        for start in range(0, self.old_size, step):
            stop = min(start + step, self.old_size)
            tensor[start:stop] = reader.read_rows(name, start, stop)
        return self.fill(tensor)

    def fill(self, tensor: Tensor) -> Tensor:
        """Compute the rows of new tokens and unused ids of a tensor [new_size, W] in place, and return it."""
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
        """`logits` of the first `old_size` ids; new tokens among these get probability zero."""
        inside = [token_id for token_id in self.rows if token_id < self.old_size]

        def shared(ids: Tensor) -> Any:
            for piece in logits(ids):
                piece = piece[:, : self.old_size].clone()
                piece[:, inside] = _MASKED_LOGIT
                yield piece

        return shared


def add_tokens(source: Source, tokens: Sequence[str]) -> VocabularyChange:
    """The vocabulary of `source` in which each string of `tokens` is one token. Existing tokens keep their id and row.

    The row of a new token is the mean of the rows of the tokens of its name without brackets: `/Path` for `</Path>`.

    Raises:
        HFEError: the source has no tokenizer, or its tokenizer refuses new tokens or still splits one of them.
    """
    before = source.tokenizer()
    size = source.config.vocab_size
    known = _single_ids(before, tokens, size)
    if len(known) == len(tokens):
        return VocabularyChange(None, known, size, size, {})
    tokenizer = copy.deepcopy(before)  # the source's own tokenizes the calibration text
    missing = [token for token in tokens if token not in known]
    try:
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in missing], special_tokens=True)
    # Tokenizers of other libraries raise errors of their own.
    except Exception as error:
        cause = error_text(error) or type(error).__name__
        raise HFEError(
            f"the tokenizer of {source.name}, a {type(before).__name__}, takes no new tokens ({cause})",
            "name a folder or Hub id with a tokenizer.json as tokenizer",
        ) from error
    token_ids = _single_ids(tokenizer, tokens)
    split = [token for token in tokens if token not in token_ids]
    if split:
        pieces = len(tokenizer.encode(split[0], add_special_tokens=False))
        raise HFEError(
            f"the tokenizer of {source.name}, a {type(before).__name__}, still reads {' '.join(split)} as several "
            f"tokens once they were added ({split[0]}: {pieces})",
            "name a folder or Hub id with a tokenizer.json as tokenizer",
        )
    taken = set(before.get_vocab().values())
    # A token of the vocabulary that the tokenizer never produced from text already has a row.
    new = [token for token in missing if token_ids[token] not in taken or token_ids[token] >= size]
    rows = {token_ids[token]: _parts(before, token, size) for token in new}
    longest = max([*taken, *token_ids.values()]) + 1
    rounded = -(-longest // _MULTIPLE) * _MULTIPLE
    return VocabularyChange(tokenizer, token_ids, size, size if longest <= size else rounded, rows)


def _single_ids(tokenizer: Any, tokens: Sequence[str], size: int | None = None) -> dict[str, int]:
    """Token -> id of the tokens that are encoded as one id, alone and within text; with `size`, of ids below it."""
    found = {}
    for token in tokens:
        alone = tokenizer.encode(token, add_special_tokens=False)
        between = tokenizer.encode(f"x\n{token}\n1", add_special_tokens=False)
        whole = len(alone) == 1 and alone[0] in between and alone[0] != getattr(tokenizer, "unk_token_id", None)
        if whole and (size is None or alone[0] < size):
            found[token] = alone[0]
    return found


def _parts(tokenizer: Any, token: str, size: int) -> tuple[int, ...]:
    """Ids of the tokens of a new token's name; `HFEError` where one has no row."""
    ids = tuple(tokenizer.encode(token[1:-1], add_special_tokens=False))
    if not ids or max(ids) >= size:
        raise HFEError(
            f"the tokenizer reads {token[1:-1]!r} as {list(ids)}, and the model has the rows 0..{size - 1}",
            "use the tokenizer that belongs to this checkpoint",
        )
    return ids
