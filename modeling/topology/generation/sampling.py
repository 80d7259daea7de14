"""How a branch's next token is chosen: the most likely one, a sample, or what a script says.

A sample takes one number from [0, 1) for each token, computed from the seed, the row, the branch's path of labels and
the token's index in the branch. So a branch draws the same tokens whatever runs beside it, and in whatever order.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hf_efficient.modeling.topology.generation.branches import Branch, BranchPath

# These look at the scores of a row alone, so they take all branches at once; others get a branch's ids, one at a time.
_BLIND_TO_IDS = (
    *(EpsilonLogitsWarper, EtaLogitsWarper, InfNanRemoveLogitsProcessor, LogitNormalization, MinPLogitsWarper),
    *(SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper),
)
_MASK = (1 << 64) - 1


def branch_key(seed: int, row: int, path: BranchPath) -> int:
    """64 bits that tell a branch from all others of all rows and seeds."""
    name = f"{seed}/{row}/" + "/".join(f"{block}:{label}" for block, label in path)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def uniform(key: int, index: int) -> float:
    """The number in [0, 1) of token `index` in the branch of this key: splitmix64, of which 53 bits are used."""
    x = (key + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((x ^ (x >> 31)) >> 11) * 2.0**-53


class Choice(NamedTuple):
    """Token ids [n] and their log-probabilities [n], float32, under the distribution that they were chosen from."""

    tokens: Tensor
    logprobs: Tensor


def most_likely(logits: Tensor) -> Choice:
    """The choice of greedy search from logits [n, V]."""
    logits = logits.float()
    best, tokens = logits.max(dim=-1)
    return Choice(tokens, best - logits.logsumexp(dim=-1))


class Sampler:
    """Greedy search: the most likely token. Subclasses choose in another way.

    Args:
        suppressed: ids that are never chosen.

    Attributes:
        needs_logits: True when `choose` must see the logits; otherwise the step's own choice of the most likely tokens
            is taken, and the logits stay where they are.
    """

    needs_logits = False
    suppressed: tuple[int, ...] = ()

    def __init__(self, suppressed: Iterable[int] = ()) -> None:
        self.suppressed = tuple(suppressed)

    def choose(self, branches: Sequence[Branch], logits: Tensor) -> Choice:
        """The next token of each branch from its row of logits [n, V]."""
        if self.suppressed:
            ids = torch.tensor(self.suppressed, device=logits.device)
            logits = logits.index_fill(-1, ids, float("-inf"))
        return most_likely(logits)

    def finalize(self, branches: Sequence[Branch], tokens: list[int]) -> list[int]:
        """The last word on chosen tokens, once they have reached the host."""
        return tokens

    def propose(self, branches: Sequence[Branch]) -> list[int] | None:
        """What `finalize` will say, where that does not depend on the model; else None."""
        return None


class ProcessedSampler(Sampler):
    """Greedy search or sampling after transformers' logits processors.

    Args:
        processors: applied in order, to each branch alone where they read ids: those that the branch sees.
        do_sample: draw from the distribution; otherwise take its maximum.
        seed: of the draws.
        disallowed: ids that the branch may not choose now, for each set of tags that `Branch.context` names.
    """

    needs_logits = True

    def __init__(
        self,
        processors: LogitsProcessorList,
        do_sample: bool,
        seed: int = 0,
        disallowed: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.processors = processors
        self.do_sample = do_sample
        self.seed = seed
        self.disallowed = disallowed or {}

    def choose(self, branches: Sequence[Branch], logits: Tensor) -> Choice:
        scores = logits.to(copy=True, dtype=torch.float32)
        for i, branch in enumerate(branches):
            ids = self.disallowed.get(branch.context)
            if ids:
                scores[i, list(ids)] = float("-inf")
        scores = self._process(branches, scores)
        if not self.do_sample:
            return most_likely(scores)
        numbers = torch.tensor([self._number(branch) for branch in branches], dtype=torch.float64)
        return draw(scores, numbers.to(scores.device))

    def _number(self, branch: Branch) -> float:
        if branch.rng_key is None:
            branch.rng_key = branch_key(self.seed, branch.row, branch.path)
        return uniform(branch.rng_key, branch.num_sampled_tokens)

    def _process(self, branches: Sequence[Branch], scores: Tensor) -> Tensor:
        ids: list[Tensor] = []
        for processor in self.processors:
            if isinstance(processor, _BLIND_TO_IDS):
                scores = processor(None, scores)
                continue
            if not ids:
                ids = [torch.tensor([branch.visible_ids()], device=scores.device) for branch in branches]
            scores = torch.cat(
                [
                    _of_row(processor, branch.row)(seen, scores[i : i + 1])
                    for i, (branch, seen) in enumerate(zip(branches, ids, strict=True))
                ]
            )
        return scores


def _of_row(processor: Any, row: int) -> Any:
    """A processor as it is for one row: transformers gives that for repetitions each row's padding."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor) or ignored.ndim == 0:
        return processor
    processor = copy.copy(processor)
    processor.prompt_ignore_length = ignored[row : row + 1]
    return processor


def draw(scores: Tensor, numbers: Tensor) -> Choice:
    """Tokens of the distributions ``softmax(scores)`` [n, V] at these points [n] of [0, 1), by the inverse CDF."""
    logprobs = scores.log_softmax(dim=-1)
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    # Rounding leaves the last sum beside 1; and where it is reached, no token of probability 0 may be taken.
    points = numbers[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, points, right=True).clamp_(max=scores.shape[-1] - 1)
    return Choice(tokens[:, 0], logprobs.gather(1, tokens)[:, 0])
