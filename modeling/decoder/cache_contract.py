"""`CapturableCache`: the interface of a cache over which decoding steps can be captured in CUDA graphs.

A captured step reads and writes fixed memory. Three properties of a cache decide how it may be used:

- where its memory is (`memory`): a captured step is valid only while all these tensors keep their addresses;
- what one step overwrites (`state_tensors`): a step whose token is discarded, such as the warm-up run before a
  capture, must restore these. For a key-value cache this is its length, since the next step overwrites the slot after
  the last token; for a recurrent cache it is the whole state;
- whether tokens can be removed again (`can_truncate`, `truncate`): a key-value cache removes its last tokens by
  reducing its length; a recurrent state has absorbed them.
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
    """Mixin to list before a `Cache` class: decoding steps over such a cache can be captured in CUDA graphs.

    A model sets its class as `cache_class`. It is called as ``cache_class(config, batch_size, capacity, dtype,
    device)`` and allocates all its memory in `__init__`.

    Attributes:
        can_truncate: True when `truncate` can remove tokens; False for recurrent state.
    """

    can_truncate: ClassVar[bool] = True
    # Method of the `Cache` class that this is mixed into: the number of cached tokens.
    get_seq_length: Callable[..., int]

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Number of sequences."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Number of tokens of each sequence that the allocated memory can hold."""

    @abstractmethod
    def memory(self) -> list[Tensor]:
        """Every tensor of the cache that a step reads or writes; the first of them is on the model's device."""

    @abstractmethod
    def state_tensors(self) -> list[Tensor]:
        """The tensors of `memory` to restore so that running a step again gives the same result; may be empty."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of each sequence and remove the others, in place.

        Raises:
            HFEError: the cache cannot be truncated (`can_truncate` is False).
        """

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Reallocate memory for `capacity` tokens, not fewer than now, and copy the contents.

        Steps captured before are no longer valid.

        Raises:
            HFEError: the cache has a fixed size.
        """

    @abstractmethod
    def reset(self) -> None:
        """Remove all tokens, in place: the tensors of `memory` keep their addresses."""

    def addresses(self) -> tuple[int, ...]:
        """Device address (`data_ptr`) of each tensor of `memory`."""
        return tuple(tensor.data_ptr() for tensor in self.memory())

    def nbytes(self) -> int:
        """Bytes of `memory`."""
        return sum(tensor.nbytes for tensor in self.memory())

    def ensure_capacity(self, tokens: int) -> None:
        """Grow to `round_capacity(tokens)` if the capacity is less than `tokens`, the cached ones included.

        Growing makes steps captured before invalid, see `grow`.

        Raises:
            HFEError: the cache would have to grow and has a fixed size.
        """
        if tokens > self.capacity:
            self.grow(round_capacity(tokens))


class RecurrentCache(CapturableCache):
    """`CapturableCache` for recurrent models: each token overwrites the state, so tokens cannot be removed."""

    can_truncate = False

    @property
    def is_croppable(self) -> bool:
        """Always False. transformers computes a token before its stop check only for a cache where this is True."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing for zero tokens; raise `HFEError` for any other number, as `truncate` does."""
        if tokens_to_remove:
            self.truncate(tokens_to_remove)

    @abstractmethod
    def select_sequences(self, indices: Tensor) -> None:
        """Keep the sequences with these indices, an integer tensor [new batch size], in its order, repeated ones too.

        It must select recurrent states as well as keys and values.
        """

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As in transformers: the sequences that beam search keeps [B]."""
        self.select_sequences(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """As in transformers: keep the sequences with these indices [new batch size]."""
        self.select_sequences(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As in transformers: repeat each sequence `repeats` times, next to itself."""
        self.select_sequences(torch.arange(self.batch_size).repeat_interleave(repeats))

    def truncate(self, length: int) -> None:
        """Always raises `HFEError`: a recurrent state cannot be truncated."""
        raise HFEError(
            f"a {type(self).__name__} holds recurrent state, from which tokens cannot be removed (asked for {length})",
            "copy the cache before the tokens that may be removed again",
        )


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Context manager that restores the values of these tensors, in place, at the end of the block or on an error."""
    saved = StateSnapshot(tensors)
    try:
        yield
    finally:
        saved.restore()


class StateSnapshot:
    """A copy of the values of a fixed list of tensors, taken on creation and again on each `save`.

    The copies are allocated once, on the device of each tensor.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        with torch.inference_mode(False), torch.no_grad():  # the snapshot may outlive the caller's inference mode
            self._values = [tensor.clone() for tensor in self._tensors]

    @torch.no_grad()
    def save(self) -> None:
        """Replace the copies by the present values of the tensors."""
        for value, tensor in zip(self._values, self._tensors, strict=True):
            value.copy_(tensor)

    @torch.no_grad()
    def restore(self) -> None:
        """Set the tensors to the copied values, in place."""
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.copy_(value)


# Capacities are rounded up, so that calls of similar lengths can reuse a cache and the steps captured over it.
_MIN_CAPACITY = 256
_STEPS_PER_DOUBLING = 8


def round_capacity(tokens: int) -> int:
    """The capacity of a cache that must hold `tokens` tokens: 256, or at most an eighth more than `tokens`."""
    if tokens <= _MIN_CAPACITY:
        return _MIN_CAPACITY
    step = (1 << (tokens - 1).bit_length()) // (2 * _STEPS_PER_DOUBLING)
    return -(-tokens // step) * step
