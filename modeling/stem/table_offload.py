"""Tables that stay in host memory: their rows are prefetched to the device before the layers that need them.

The ids of a call are known before its first layer, so the rows of all layers are requested then, each distinct token
once, on a separate CUDA stream, in the order of the layers. A layer waits for its own rows only.

- From pinned memory the device reads the rows itself, in the kernel `gather_rows`, which can be captured in a CUDA
  graph with the decoding step.
- From memory that the device cannot read, such as a memory-mapped file, a thread copies the rows to a pinned buffer,
  which is then copied to the device.
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

# In calls of up to this many tokens, such as decoding steps, merging repeated tokens takes longer than fetching twice.
DECODE_TOKENS = 64
# cudaHostRegisterPortable | cudaHostRegisterMapped
_REGISTER_FLAGS = 1 | 2


def pin_in_place(weight: Tensor) -> bool:
    """Pin the memory of a CPU tensor in place, so that CUDA devices can read it; True if it is pinned now.

    False, with a warning, if the system refuses. The memory is unpinned when the object `weight` is freed.
    `Tensor.pin_memory` would copy the table, into an allocation that is rounded up to a power of two.
    """
    if weight.is_pinned():
        return True
    address, size = weight.data_ptr(), weight.nbytes
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(address, size, _REGISTER_FLAGS)) != 0:
        get_logger().warning(
            "a STEM table of %.2f GB could not be pinned, so its rows are copied through a buffer", size / 1e9
        )
        return False
    weakref.finalize(weight, _unpin, runtime, address)
    return True


def _unpin(runtime: Any, address: int) -> None:
    """Undo `pin_in_place` for the memory at `address`, with the CUDA runtime; synchronises with the device."""
    torch.cuda.synchronize()  # kernels may still be reading it
    runtime.cudaHostUnregister(address)


class TableFetcher:
    """Fetches rows of tables in host memory to a device.

    Args:
        tables: in the order of their layers.
        device: a CUDA device.
        ahead: number of tables whose rows may be in transfer at the same time; 0 for all.
        cache_rows: rows of each table to cache on the device, if it reads the tables itself; 0 for none.
        pin: pin the tables in place; if False, or if that fails, rows are staged through a pinned buffer.

    Attributes:
        direct: whether the device reads the tables itself.
        index_of: index of each table, by the `id` of its weight.
        cache: the rows cached on the device, or None.
        worker: the thread that stages rows, or None if `direct`.
        rows_requested, rows_cached: distinct rows that prompts needed, and those of them that were cached.
    """

    def __init__(
        self, tables: Sequence[nn.Embedding], device: torch.device, ahead: int, cache_rows: int, pin: bool
    ) -> None:
        self.weights = [table.weight for table in tables]
        self.index_of = {id(weight): index for index, weight in enumerate(self.weights)}
        self.device = device
        self.ahead = ahead or len(tables)
        self.stream = torch.cuda.Stream(device)
        reads_host = pin and select_backend("gather_rows", None, device) == "triton"
        self.direct = reads_host and all(pin_in_place(weight) for weight in self.weights)
        self.cache: RowCache | None = None
        if cache_rows and self.direct:  # only `gather_rows` reads the cache
            self.cache = RowCache([weight.detach() for weight in self.weights], cache_rows, device)
        self.worker = None if self.direct else ThreadPoolExecutor(1, thread_name_prefix="stem-rows")
        self._signature = self._addresses()
        self._versions = self._weight_versions()
        self.rows_requested = self.rows_cached = 0

    def _addresses(self) -> list[tuple]:
        """Return address, shape and dtype of each table's weight."""
        return [(weight.data_ptr(), weight.shape, weight.dtype) for weight in self.weights]

    def serves(self, tables: Sequence[nn.Embedding], device: torch.device) -> bool:
        """True if `tables` are those of this fetcher, at the same addresses, and `device` is its device."""
        same = len(tables) == len(self.weights) and all(
            t.weight is w for t, w in zip(tables, self.weights, strict=True)
        )
        return same and device == self.device and self._addresses() == self._signature

    def report(self) -> dict[str, Any]:
        """Return `direct`, `cache_rows` (the capacity of the cache), `rows_requested` and `rows_cached`, by name."""
        return {
            "direct": self.direct,
            "cache_rows": 0 if self.cache is None else len(self.cache.policy.held),
            "rows_requested": self.rows_requested,
            "rows_cached": self.rows_cached,
        }

    def _weight_versions(self) -> list[int]:
        """Return PyTorch's count of in-place changes of each table; 0 for an inference tensor, which has none."""
        return [0 if weight.is_inference() else weight._version for weight in self.weights]

    def begin(self, ids: Tensor) -> PrefetchedRows:
        """Start to fetch the rows for token ids [B, S] on the device, and return them as `PrefetchedRows`.

        If a table was changed in place since the last call, all cached rows are discarded first.
        """
        if self.cache is not None and self._versions != self._weight_versions():  # such as by an optimizer step
            self.drop(self.cache.policy.held[self.cache.policy.held >= 0])
        return PrefetchedRows(ids, self)

    def drop(self, ids: Tensor) -> None:
        """Remove rows `ids` [n], which were changed in the tables, from the cache; nothing without a cache.

        All other cached rows are taken to be unchanged.
        """
        self._versions = self._weight_versions()
        if self.cache is not None:
            self.cache.policy.drop(ids.cpu())
            ids = ids.to(self.device)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.cache.forget(ids)
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def gather(self, table_index: int, ids: Tensor, out: Tensor) -> None:
        """Read the rows `ids` [u] of table number `table_index` into `out` [u, F], on the current stream.

        Only if `direct`: the kernel reads the pinned table. `ids` and `out` are on the device.
        """
        weight, cache = self.weights[table_index].detach(), self.cache
        if cache is None:
            gather_rows(weight, ids, out=out)
        else:
            gather_rows(weight, ids, cache=cache.rows[table_index], cache_slots=cache.slot_of, out=out)

    def stage(
        self, table_index: int, ids: Tensor, out: Tensor, arrived: torch.cuda.Event, worker: ThreadPoolExecutor
    ) -> Future:
        """Copy the rows `ids` [u] of a table through a pinned buffer into `out` [u, F], in the worker thread.

        Args:
            table_index: number of the table.
            ids: on the host.
            out: on the device.
            arrived: recorded after the copy.
            worker: the thread.

        Returns:
            The task, done when the copy has been enqueued; its `result()` raises what the thread raised. Wait for it
            before `arrived`.
        """

        def work() -> None:
            """Fill the pinned buffer and enqueue the copy to the device."""
            # Inference mode is thread-local, and an inference tensor of the caller may only be written in that mode.
            with torch.inference_mode(), torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                buffer = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
                torch.index_select(self.weights[table_index].detach(), 0, ids, out=buffer)
                # The pinned-memory allocator does not reuse the buffer before this copy has read it.
                out.copy_(buffer, non_blocking=True)
                arrived.record()

        return worker.submit(work)


class PrefetchedRows(TokenRows):
    """`TokenRows` of tables in host memory, prefetched to the device.

    Created, it has requested the rows of the first tables. Repeated tokens are merged in training and in calls of more
    than `DECODE_TOKENS` tokens, which synchronises; never during a graph capture.

    Args:
        ids: token ids [B, S], on the fetcher's device.
        fetcher: reads the tables.
    """

    def __init__(self, ids: Tensor, fetcher: TableFetcher) -> None:
        capturing = torch.cuda.is_current_stream_capturing()
        training = torch.is_grad_enabled() and any(weight.requires_grad for weight in fetcher.weights)
        super().__init__(ids, merge=not capturing and (training or ids.numel() > DECODE_TOKENS))
        self._fetcher = fetcher
        self._in_flight: dict[int, tuple[Tensor, torch.cuda.Event, Future | None]] = {}
        self._ids_on_host = None if fetcher.worker is None else self.distinct.cpu()
        self._admission: Admission | None = None
        self._commit: Callable[[], None]
        self._requested = 0
        if fetcher.direct:
            # The allocator must not reuse this memory while the other stream reads it.
            self.distinct.record_stream(fetcher.stream)
            if fetcher.cache is not None and self.merged and not training:
                self._admit(fetcher.cache)
        self._request_up_to(fetcher.ahead)

    def fetch(self, table: nn.Embedding) -> Tensor:
        """Return the rows [u, F] on the device; also requests those of the next table that may be in transfer.

        The current stream waits for them, the host only if a thread stages them. An error of that thread is raised
        here.
        """
        table_index = self._fetcher.index_of[id(table.weight)]
        if table_index not in self._in_flight:  # fetched before: activation checkpointing calls a layer again
            self._request(table_index)
        rows, arrived, staged = self._in_flight.pop(table_index)
        if staged is not None:
            staged.result()
        torch.cuda.current_stream(self._fetcher.device).wait_event(arrived)
        self._request_up_to(table_index + 1 + self._fetcher.ahead)
        return rows

    def _wait_for_current_stream(self) -> None:
        """Let the fetching stream wait for all work enqueued so far on the current stream."""
        self._fetcher.stream.wait_stream(torch.cuda.current_stream(self._fetcher.device))

    def _request_up_to(self, end: int) -> None:
        """Request the rows of all tables before number `end` that were not requested yet."""
        for table_index in range(self._requested, min(end, len(self._fetcher.weights))):
            self._request(table_index)
            self._requested = table_index + 1

    def _request(self, table_index: int) -> None:
        """Start the transfer of the rows of one table."""
        fetcher = self._fetcher
        weight = fetcher.weights[table_index]
        rows = torch.empty(len(self.distinct), weight.shape[1], dtype=weight.dtype, device=fetcher.device)
        rows.record_stream(fetcher.stream)
        arrived, staged = torch.cuda.Event(), None
        self._wait_for_current_stream()  # which may use the memory of `rows` until here
        if fetcher.worker is not None and self._ids_on_host is not None:
            staged = fetcher.stage(table_index, self._ids_on_host, rows, arrived, fetcher.worker)
        else:
            with torch.cuda.stream(fetcher.stream):
                fetcher.gather(table_index, self.distinct, rows)
                self._fill_cache(table_index, rows)
                arrived.record()
        self._in_flight[table_index] = rows, arrived, staged

    def _admit(self, cache: RowCache) -> None:
        """Choose the rows of this call that the cache will take, and count requested and cached rows; synchronises.

        Evicted tokens are marked as not cached before the call's rows are copied, so that the cache is valid even if
        the call raises before that.
        """
        fetcher = self._fetcher
        ids = self.distinct.cpu()
        fetcher.rows_requested += len(ids)
        fetcher.rows_cached += int(cache.policy.hits(ids).sum())
        counts = torch.bincount(self.slots.flatten(), minlength=len(ids)).cpu()
        admission = cache.policy.admit(ids, counts)
        # Copied before more work is enqueued: a copy from pageable memory waits for all of its stream's work.
        self._admission = admission.to(fetcher.device)
        self._wait_for_current_stream()
        with torch.cuda.stream(fetcher.stream):
            cache.forget(self._admission.evicted)
        self._commit = functools.partial(cache.policy.commit, admission)

    def _fill_cache(self, table_index: int, rows: Tensor) -> None:
        """Copy the admitted rows of one table into the cache; after the last table they are marked as cached.

        Nothing if no rows were admitted, or if the table was requested before (by activation checkpointing).
        """
        cache = self._fetcher.cache
        if cache is None or self._admission is None or table_index != self._requested:
            return
        cache.fill(table_index, rows, self._admission)
        if table_index == len(self._fetcher.weights) - 1:
            cache.publish(self._admission)
            self._commit()


__all__ = ["DECODE_TOKENS", "PrefetchedRows", "TableFetcher", "pin_in_place"]
