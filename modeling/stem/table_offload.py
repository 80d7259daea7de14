"""Tables that stay in host memory: their rows are brought to the device ahead of the layers that need them.

The ids of a call are known before its first layer, so all rows that it will look up are requested then, each distinct
token once, on a stream of their own, in the order of the layers. A layer waits for its own rows alone.

- From pinned memory the device reads rows by itself, through `gather_rows`: the host does nothing, and a captured
  decoding step contains it.
- From memory that the device cannot read, such as a file mapped into memory, a thread copies rows to a pinned buffer
  and sends it on.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficient.kernels.dispatch import select_backend
from hf_efficient.kernels.gather_rows.api import gather_rows
from hf_efficient.logging import get_logger
from hf_efficient.modeling.stem.row_cache import Admission, RowCache
from hf_efficient.modeling.stem.token_rows import TokenRows

# Calls of up to so many tokens are decoding: looking for repeated ones would take longer than fetching them twice.
DECODE_TOKENS = 64
# cudaHostRegisterPortable | cudaHostRegisterMapped
_REGISTER_FLAGS = 1 | 2


def pin_in_place(weight: Tensor) -> bool:
    """Make the memory of a CPU tensor readable by CUDA devices where it lies; False when the system refuses.

    `Tensor.pin_memory` would copy the table, into an allocation rounded up to a power of two.
    """
    if weight.is_pinned():
        return True
    address, size = weight.data_ptr(), weight.nbytes
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(address, size, _REGISTER_FLAGS)) != 0:
        get_logger().warning(
            "a STEM table of %.2f GB could not be pinned, so its rows take the way over a buffer", size / 1e9
        )
        return False
    weakref.finalize(weight, _unpin, runtime, address)
    return True


def _unpin(runtime: Any, address: int) -> None:
    torch.cuda.synchronize()  # nobody reads it any more
    runtime.cudaHostUnregister(address)


class TableFetcher:
    """Brings rows of host tables to a device.

    Args:
        tables: in the order in which layers look them up.
        device: a CUDA device.
        ahead: how many tables' rows may be on their way at once; 0 for all.
        cache_rows: rows of each table to keep on the device, where it reads the tables by itself; 0 for none.
        pin: pin the tables; otherwise, or where that fails, rows are staged.
    """

    def __init__(
        self, tables: Sequence[nn.Embedding], device: torch.device, ahead: int, cache_rows: int, pin: bool
    ) -> None:
        self.weights = [table.weight for table in tables]
        self.place = {id(weight): place for place, weight in enumerate(self.weights)}
        self.device = device
        self.ahead = ahead or len(tables)
        self.stream = torch.cuda.Stream(device)
        reads_host = pin and select_backend("gather_rows", None, device) == "triton"
        self.direct = reads_host and all(pin_in_place(weight) for weight in self.weights)
        self.cache: RowCache | None = None
        if cache_rows and self.direct:  # staged rows do not come through it
            self.cache = RowCache([weight.detach() for weight in self.weights], cache_rows, device)
        self.worker = None if self.direct else ThreadPoolExecutor(1, thread_name_prefix="stem-rows")
        self._signature = self._addresses()
        self._versions = self._count_changes()
        self.rows_requested = self.rows_cached = 0

    def _addresses(self) -> list[tuple]:
        return [(weight.data_ptr(), weight.shape, weight.dtype) for weight in self.weights]

    def serves(self, tables: Sequence[nn.Embedding], device: torch.device) -> bool:
        """True while these tables are where they were when the fetcher was made."""
        same = len(tables) == len(self.weights) and all(
            t.weight is w for t, w in zip(tables, self.weights, strict=True)
        )
        return same and device == self.device and self._addresses() == self._signature

    def report(self) -> dict[str, Any]:
        """Whether the device reads the tables by itself, and distinct rows that prompts asked for and found cached."""
        return {
            "direct": self.direct,
            "cache_rows": 0 if self.cache is None else len(self.cache.policy.held),
            "rows_requested": self.rows_requested,
            "rows_cached": self.rows_cached,
        }

    def _count_changes(self) -> list[int]:
        """How often each table was changed in place, as far as PyTorch knows."""
        return [0 if weight.is_inference() else weight._version for weight in self.weights]

    def begin(self, ids: Tensor) -> ArrivingRows:
        """Request the rows of a call for token ids [B, S] on the device."""
        if self.cache is not None and self._versions != self._count_changes():  # an optimiser's step, say
            self.drop(self.cache.policy.held[self.cache.policy.held >= 0])
        return ArrivingRows(ids, self)

    def drop(self, ids: Tensor) -> None:
        """Take rows that were changed in the tables out of the cache."""
        self._versions = self._count_changes()
        if self.cache is not None:
            self.cache.policy.drop(ids.cpu())
            ids = ids.to(self.device)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.cache.forget(ids)
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def gather(self, place: int, ids: Tensor, out: Tensor) -> None:
        """On the current stream, from pinned memory or the cache."""
        weight, cache = self.weights[place].detach(), self.cache
        if cache is None:
            gather_rows(weight, ids, out=out)
        else:
            gather_rows(weight, ids, cache=cache.rows[place], cache_slots=cache.slot_of, out=out)

    def stage(
        self, place: int, ids: Tensor, out: Tensor, arrived: torch.cuda.Event, worker: ThreadPoolExecutor
    ) -> Future:
        """In the worker: rows of ids [u], on the host, by way of a pinned buffer."""

        def work() -> None:
            # Modes are a thread's own; a tensor of the caller's inference mode may be written in that mode only.
            with torch.inference_mode(), torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                buffer = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
                torch.index_select(self.weights[place].detach(), 0, ids, out=buffer)
                # The allocator gives the buffer to nobody else before this copy has read it.
                out.copy_(buffer, non_blocking=True)
                arrived.record()

        return worker.submit(work)


class ArrivingRows(TokenRows):
    """`TokenRows` of tables on the host, on their way to the device."""

    def __init__(self, ids: Tensor, fetcher: TableFetcher) -> None:
        capturing = torch.cuda.is_current_stream_capturing()
        training = torch.is_grad_enabled() and any(weight.requires_grad for weight in fetcher.weights)
        super().__init__(ids, merge=not capturing and (training or ids.numel() > DECODE_TOKENS))
        self._fetcher = fetcher
        self._arriving: dict[int, tuple[Tensor, torch.cuda.Event, Future | None]] = {}
        self._ids_on_host = None if fetcher.worker is None else self.distinct.cpu()
        self._admission: Admission | None = None
        self._commit: Callable[[], None]
        self._requested = 0
        if fetcher.direct:
            # The allocator must not give this memory away while the other stream reads it.
            self.distinct.record_stream(fetcher.stream)
            if fetcher.cache is not None and self.merged and not training:
                self._admit(fetcher.cache)
        self._request_up_to(fetcher.ahead)

    def fetch(self, table: nn.Embedding) -> Tensor:
        place = self._fetcher.place[id(table.weight)]
        if place not in self._arriving:  # asked for again, as checkpointed layers do
            self._request(place)
        rows, arrived, staged = self._arriving.pop(place)
        if staged is not None:
            staged.result()
        torch.cuda.current_stream(self._fetcher.device).wait_event(arrived)
        self._request_up_to(place + 1 + self._fetcher.ahead)
        return rows

    def _follow(self) -> None:
        """What is requested next starts when the device has come as far as the host is now."""
        self._fetcher.stream.wait_stream(torch.cuda.current_stream(self._fetcher.device))

    def _request_up_to(self, end: int) -> None:
        for place in range(self._requested, min(end, len(self._fetcher.weights))):
            self._request(place)
            self._requested = place + 1

    def _request(self, place: int) -> None:
        fetcher = self._fetcher
        weight = fetcher.weights[place]
        rows = torch.empty(len(self.distinct), weight.shape[1], dtype=weight.dtype, device=fetcher.device)
        rows.record_stream(fetcher.stream)
        arrived, staged = torch.cuda.Event(), None
        self._follow()  # the memory of `rows` may be in use until here
        if fetcher.worker is not None and self._ids_on_host is not None:
            staged = fetcher.stage(place, self._ids_on_host, rows, arrived, fetcher.worker)
        else:
            with torch.cuda.stream(fetcher.stream):
                fetcher.gather(place, self.distinct, rows)
                self._fill_cache(place, rows)
                arrived.record()
        self._arriving[place] = rows, arrived, staged

    def _admit(self, cache: RowCache) -> None:
        """Decide what the cache takes in of this call. Evicted rows are gone at once, so that a call which breaks off
        leaves nothing wrong behind."""
        fetcher = self._fetcher
        ids = self.distinct.cpu()
        fetcher.rows_requested += len(ids)
        fetcher.rows_cached += int(cache.policy.hits(ids).sum())
        counts = torch.bincount(self.slots.flatten(), minlength=len(ids)).cpu()
        admission = cache.policy.admit(ids, counts)
        # Sent now: a copy from unpinned memory waits for all that its stream has to do.
        self._admission = admission.to(fetcher.device)
        self._follow()
        with torch.cuda.stream(fetcher.stream):
            cache.forget(self._admission.evicted)
        self._commit = functools.partial(cache.policy.commit, admission)

    def _fill_cache(self, place: int, rows: Tensor) -> None:
        cache = self._fetcher.cache
        if cache is None or self._admission is None or place != self._requested:
            return
        cache.fill(place, rows, self._admission)
        if place == len(self._fetcher.weights) - 1:
            cache.publish(self._admission)
            self._commit()


__all__ = ["DECODE_TOKENS", "ArrivingRows", "TableFetcher", "pin_in_place"]
