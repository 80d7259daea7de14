"""What a cache offers so that decoding steps over it can be captured in CUDA graphs.

A captured step reads and writes fixed memory. Three facts about a cache decide how it may be used:

- where its memory is (`memory`): a step belongs to the cache only while none of these tensors moves;
- what one step overwrites (`state_tensors`): running a step without keeping its token, as the warm-up before a
  capture does, must leave these as they were. A key-value cache has its length there, and the slot behind the length
  is written again by the next step; a recurrent cache has its whole state there;
- whether tokens can be removed again (`can_truncate`, `truncate`): a key-value cache forgets its last tokens by its
  length alone; a recurrent state has absorbed them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from hf_efficient.errors import HFEError


class CapturableCache(ABC):
    """Mixin before a `Cache` that decoding steps can be captured over.

    A model names its class in `cache_class`, which is called as ``cache_class(config, batch_size, capacity, dtype,
    device)`` and allocates all memory there.

    Attributes:
        can_truncate: True when `truncate` can remove tokens; False for recurrent state.
    """

    can_truncate: ClassVar[bool] = True
    # Of the `Cache` that this is mixed into: the number of cached tokens.
    get_seq_length: Callable[..., int]

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Number of sequences."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Tokens that the cache has room for."""

    @abstractmethod
    def memory(self) -> list[Tensor]:
        """Every tensor that a step reads or writes, the first of them on the model's device."""

    @abstractmethod
    def state_tensors(self) -> list[Tensor]:
        """The tensors of `memory` that a step changes so that running it again would give something else."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens.

        Raises:
            HFEError: the cache cannot be truncated.
        """

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Move to memory for `capacity` tokens and keep all that is stored; steps captured before no longer fit.

        Raises:
            HFEError: the cache has a fixed size.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget all tokens, in the same memory."""

    def addresses(self) -> tuple[int, ...]:
        """Address of each tensor of `memory`."""
        return tuple(tensor.data_ptr() for tensor in self.memory())

    def nbytes(self) -> int:
        """Bytes of `memory`."""
        return sum(tensor.nbytes for tensor in self.memory())

    def ensure_capacity(self, tokens: int) -> None:
        """Have room for `tokens` tokens in all."""
        if tokens > self.capacity:
            self.grow(round_capacity(tokens))


class RecurrentCache(CapturableCache):
    """Mixin for a cache with state that each token overwrites: it cannot be truncated."""

    can_truncate = False

    @property
    def is_croppable(self) -> bool:
        """False, which transformers asks before it runs a token ahead of its own stop check."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Zero tokens can be removed; others raise as `truncate` does."""
        if tokens_to_remove:
            self.truncate(tokens_to_remove)

    def truncate(self, length: int) -> None:
        raise HFEError(
            f"a {type(self).__name__} holds recurrent state, from which tokens cannot be removed (asked for {length})",
            "copy the cache before the tokens that may be removed again",
        )


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give these tensors their values back on leaving the block, after an error too."""
    saved = StateSnapshot(tensors)
    try:
        yield
    finally:
        saved.restore()


class StateSnapshot:
    """Values of a fixed list of tensors, to be put back later; saved again, it uses the same memory."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        with torch.inference_mode(False), torch.no_grad():  # the snapshot may outlive the caller's inference mode
            self._values = [tensor.clone() for tensor in self._tensors]

    @torch.no_grad()
    def save(self) -> None:
        """Remember the values of now."""
        for value, tensor in zip(self._values, self._tensors, strict=True):
            value.copy_(tensor)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the remembered values back, in place."""
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.copy_(value)


# Capacities are rounded up, so that prompts of similar lengths share a cache and its capture.
_MIN_CAPACITY = 256
_STEPS_PER_DOUBLING = 8


def round_capacity(tokens: int) -> int:
    """The capacity given to a cache that needs room for `tokens`: 256, or at most an eighth more than needed."""
    if tokens <= _MIN_CAPACITY:
        return _MIN_CAPACITY
    step = (1 << (tokens - 1).bit_length()) // (2 * _STEPS_PER_DOUBLING)
    return -(-tokens // step) * step
