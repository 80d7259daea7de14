"""Samplers of parallel generation: greedy search, and sampling with transformers' logits processors.

A branch is a part of a sequence that is decoded in parallel with others; n is the number of branches that need a token
in a step, V the vocabulary size. Sampling uses one random number in [0, 1) for each token. It is a function of the
seed, the batch row, the path of the branch and the token's index in the branch, so a branch samples the same tokens
whatever other branches run.
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

# Processors that ignore the ids, so one call processes all branches; others are called once for each branch.
_SCORES_ONLY = (
    *(EpsilonLogitsWarper, EtaLogitsWarper, InfNanRemoveLogitsProcessor, LogitNormalization, MinPLogitsWarper),
    *(SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper),
)
_MASK_64 = (1 << 64) - 1


def branch_key(seed: int, row: int, path: BranchPath) -> int:
    """Return the key of a branch's random numbers: a 64-bit hash of seed, batch row and path of the branch."""
    name = f"{seed}/{row}/" + "/".join(f"{fork}:{label}" for fork, label in path)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def uniform(key: int, index: int) -> float:
    """Return a random number in [0, 1) with 53 bits: output `index` of the generator splitmix64 with state `key`."""
    x = (key + (index + 1) * 0x9E3779B97F4A7C15) & _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return ((x ^ (x >> 31)) >> 11) * 2.0**-53


class Choice(NamedTuple):
    """Chosen tokens and their log-probabilities under the distribution that they were chosen from.

    Attributes:
        tokens: token ids, int64 [...].
        logprobs: log-probability of each, float32 [...].
    """

    tokens: Tensor
    logprobs: Tensor


def most_likely(logits: Tensor) -> Choice:
    """Return the choice of greedy search, [...], from logits [..., V] of any floating-point dtype."""
    logits = logits.float()
    best, tokens = logits.max(dim=-1)
    return Choice(tokens, best - logits.logsumexp(dim=-1))


class Sampler:
    """Greedy search; the base class of samplers.

    Args:
        suppressed: token ids that are never chosen.

    Attributes:
        needs_logits: True if the decoding loop must call `choose` after each step. Otherwise it uses the most likely
            tokens, which the step computes on the device, with the ids `suppressed` left out.
    """

    needs_logits = False
    suppressed: tuple[int, ...] = ()

    def __init__(self, suppressed: Iterable[int] = ()) -> None:
        self.suppressed = tuple(suppressed)

    def choose(self, branches: Sequence[Branch], logits: Tensor) -> Choice:
        """Return the next token of each of n branches, as a `Choice` of tensors [n], from logits [n, V].

        The logits, of any floating-point dtype, are not changed.
        """
        if self.suppressed:
            ids = torch.tensor(self.suppressed, device=logits.device)
            logits = logits.index_fill(-1, ids, float("-inf"))
        return most_likely(logits)

    def finalize(self, branches: Sequence[Branch], tokens: list[int]) -> list[int]:
        """Return the tokens to append in place of the chosen ones; called on the host after each step.

        Args:
            branches: the n branches.
            tokens: their chosen token ids, which this class returns unchanged.
        """
        return tokens

    def propose(self, branches: Sequence[Branch]) -> list[int] | None:
        """Return the next token of each branch if it is known before the step that computes it; None if it is not.

        The decoding loop uses the tokens in a speculative step. With None, this step takes the most likely tokens on
        the device, except for a sampler that overrides `finalize`, for which no speculative step is dispatched.
        """
        return None


class ProcessedSampler(Sampler):
    """Greedy search or sampling from logits that transformers' logits processors have changed.

    Args:
        processors: applied in order. Those that read ids are called once for each branch, with the ids, int64 [1, L],
            that the branch may attend to.
        do_sample: sample from the distribution; otherwise choose its maximum.
        seed: seed of the random numbers.
        disallowed: place in the text (a value of `Branch.context`: `outside`, `branch`, `path` or `block`) -> token ids
            that a branch may not choose there.
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
        """Mask disallowed ids, apply the processors in float32, and choose; see `Sampler.choose`."""
        scores = logits.to(copy=True, dtype=torch.float32)
        for i, branch in enumerate(branches):
            ids = self.disallowed.get(branch.context)
            if ids:
                scores[i, list(ids)] = float("-inf")
        scores = self._process(branches, scores)
        if not self.do_sample:
            return most_likely(scores)
        numbers = torch.tensor([self._random_number(branch) for branch in branches], dtype=torch.float64)
        return sample(scores, numbers.to(scores.device))

    def _random_number(self, branch: Branch) -> float:
        """Return the random number in [0, 1) for the branch's next token; caches the key in the branch."""
        if branch.rng_key is None:
            branch.rng_key = branch_key(self.seed, branch.row, branch.path)
        return uniform(branch.rng_key, branch.num_sampled_tokens)

    def _process(self, branches: Sequence[Branch], scores: Tensor) -> Tensor:
        """Return the scores [n, V] of n branches after all processors, which may change `scores` in place."""
        ids: list[Tensor] = []
        for processor in self.processors:
            if isinstance(processor, _SCORES_ONLY):
                scores = processor(None, scores)
                continue
            if not ids:
                ids = [torch.tensor([branch.visible_ids()], device=scores.device) for branch in branches]
            scores = torch.cat(
                [
                    _for_row(processor, branch.row)(visible, scores[i : i + 1])
                    for i, (branch, visible) in enumerate(zip(branches, ids, strict=True))
                ]
            )
        return scores


def _for_row(processor: Any, row: int) -> Any:
    """Return the processor to use for one batch row.

    The number of prompt ids that a repetition penalty ignores, `prompt_ignore_length`, may be a tensor [B]. The
    processor is then copied, with the entry of this row alone; other processors are returned as they are.
    """
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor) or ignored.ndim == 0:
        return processor
    processor = copy.copy(processor)
    processor.prompt_ignore_length = ignored[row : row + 1]
    return processor


def sample(scores: Tensor, numbers: Tensor) -> Choice:
    """Sample one token from each row of ``softmax(scores)`` by inverse transform sampling.

    Args:
        scores: float32 [n, V].
        numbers: float64 [n] in [0, 1), the random numbers.

    Returns:
        The tokens, int64 [n], and their log-probabilities, float32 [n].
    """
    logprobs = scores.log_softmax(dim=-1)
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    # The last sum is not exactly 1, so the numbers are scaled to it; `right` skips tokens of probability 0.
    points = numbers[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, points, right=True).clamp_(max=scores.shape[-1] - 1)
    return Choice(tokens[:, 0], logprobs.gather(1, tokens)[:, 0])
