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

from hf_efficient.conversion.families.decoder import decoder_config, expected_tensors
from hf_efficient.conversion.measuring.evaluation import LogitSource
from hf_efficient.conversion.reading.source import Source, TensorReader
from hf_efficient.conversion.reading.tensor_file import CHUNK_ELEMENTS
from hf_efficient.errors import HFEError, error_text
from hf_efficient.modeling.decoder.configuration_decoder import DecoderConfig

# The released code rounds the vocabulary up to a multiple of this.
_MULTIPLE = 64
# A logit that no softmax notices, and of which differences are still numbers.
_IMPOSSIBLE = -1e9


@dataclass(frozen=True)
class VocabularyChange:
    """What becomes of the vocabulary.

    Attributes:
        tokenizer: the source's with the new tokens; None where it stays as it is, file by file.
        token_ids: id of each token that was asked for, new or not.
        old_size, new_size: rows of the embedding, before and after.
        rows: id of each new token -> ids of the tokens whose rows it gets the mean of.
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
        """Ids beyond the source's that no token has."""
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
        """A tensor of the source with a row for each token [old_size, W], with the new rows [new_size, W]."""
        width = reader.shape(name)[1]
        tensor = torch.empty(self.new_size, width, dtype=reader.dtype(name))
        step = max(1, CHUNK_ELEMENTS // width)
        for start in range(0, self.old_size, step):
            stop = min(start + step, self.old_size)
            tensor[start:stop] = reader.read_rows(name, start, stop)
        return self.fill(tensor)

    def fill(self, tensor: Tensor) -> Tensor:
        """Write the new rows into a tensor [new_size, W] that has the source's, and return it."""
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
        """The logits of the tokens that source and result have in common; a new token inside the matrix gets none."""
        inside = [token_id for token_id in self.rows if token_id < self.old_size]

        def shared(ids: Tensor) -> Any:
            for piece in logits(ids):
                piece = piece[:, : self.old_size].clone()
                piece[:, inside] = _IMPOSSIBLE
                yield piece

        return shared


def add_tokens(source: Source, tokens: Sequence[str]) -> VocabularyChange:
    """The vocabulary of `source` with `tokens`, each one token of its own. A token that it has keeps id and row.

    The row of a new token comes from the tokens of its name, which is what its brackets hold: `/Path` of `</Path>`.

    Raises:
        HFEError: the source has no tokenizer, it takes no new tokens, or still splits one of these.
    """
    before = source.tokenizer()
    size = source.config.vocab_size
    known = _single_ids(before, tokens, size)
    if len(known) == len(tokens):
        return VocabularyChange(None, known, size, size, {})
    tokenizer = copy.deepcopy(before)  # the source's own still reads the calibration text
    lacking = [token for token in tokens if token not in known]
    try:
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in lacking], special_tokens=True)
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
    # A token that was in the vocabulary, though no text was ever read as it, has a row already.
    new = [token for token in lacking if token_ids[token] not in taken or token_ids[token] >= size]
    rows = {token_ids[token]: _parts(before, token, size) for token in new}
    longest = max([*taken, *token_ids.values()]) + 1
    rounded = -(-longest // _MULTIPLE) * _MULTIPLE
    return VocabularyChange(tokenizer, token_ids, size, size if longest <= size else rounded, rows)


def _single_ids(tokenizer: Any, tokens: Sequence[str], size: int | None = None) -> dict[str, int]:
    """The ids of those tokens that stay whole wherever they stand; below `size`, where that is given."""
    found = {}
    for token in tokens:
        alone = tokenizer.encode(token, add_special_tokens=False)
        between = tokenizer.encode(f"x\n{token}\n1", add_special_tokens=False)
        whole = len(alone) == 1 and alone[0] in between and alone[0] != getattr(tokenizer, "unk_token_id", None)
        if whole and (size is None or alone[0] < size):
            found[token] = alone[0]
    return found


def _parts(tokenizer: Any, token: str, size: int) -> tuple[int, ...]:
    ids = tuple(tokenizer.encode(token[1:-1], add_special_tokens=False))
    if not ids or max(ids) >= size:
        raise HFEError(
            f"the tokenizer reads {token[1:-1]!r} as {list(ids)}, and the model has the rows 0..{size - 1}",
            "use the tokenizer that belongs to this checkpoint",
        )
    return ids
