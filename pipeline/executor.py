"""The one loop that moves chunks through a device.

    source --load--> slot --kernel--> slot --store--> sink

A chunk is the rows of one kernel launch. It occupies one slot of the device from its admission until its last row has
reached the sink and nothing of it is under way. A mover carries its rows to the slot and another, or the same, carries
the results back: which ones is decided when it is admitted (pipeline/staging/movers.py). Where the rows are the
device's own (CUDA tensors; for the CPU any contiguous rows), nothing has to be carried.

The queues of loads, kernels and stores hold chunks in the order in which they were admitted, and each pass of the loop
looks at the oldest ones only. A slot is free again when, and only when, all that was queued on it is seen to be done.
The number of slots and of the movers' pieces bounds the memory, whatever the dataset's size.

The thread that runs the loop is the only one that queues kernels. Copies are queued by movers, which may have a thread
of their own: one device is used by both at the same time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pipeline.devices.base import Device
from pipeline.errors import DeviceError, uninterrupted
from pipeline.flow import Chunk, Feed, Sink
from pipeline.instrument import Ranges, Recorder
from pipeline.rows import DeviceRows, Operation, SourceRows, TargetRows
from pipeline.staging.mover import Mover, Transfer
from pipeline.staging.movers import Movers

_DEVICE_STAGES = ("H2D", "kernel", "D2H")


@dataclass(slots=True, eq=False)
class _Flight:
    """A chunk on its way through a slot, and what is under way for it."""

    chunk: Chunk
    slot: int
    source: DeviceRows | None  # where the kernel reads rows that needn't be loaded
    target: DeviceRows | None  # where it writes rows that needn't be stored
    store_to: TargetRows | None
    load: Transfer | None = None  # until it is seen to be done
    kernel: Operation | None = None
    store: Transfer | None = None
    store_by: Mover | None = None
    loaded_s: float = float("-inf")  # when its load ended
    pending: int = 0  # operations begun and not yet seen to be done
    has_landed: bool = False
    has_failed: bool = False


Rows = TypeVar("Rows", SourceRows, TargetRows)


class Executor:
    """One run of chunks through one prepared and allocated device."""

    def __init__(
        self,
        device: Device,
        movers: Movers,
        num_streams: int,
        feed: Feed,
        sink: Sink,
        recorder: Recorder,
        on_commit: Callable[[Chunk], None],
        stopping: threading.Event,
    ) -> None:
        """`movers` are those of the device, which has `num_streams` slots. `on_commit` is called with each chunk whose
        rows have all reached the sink. `stopping` ends the intake from outside; an error sets it."""
        self._device, self._movers, self._feed, self._sink = device, movers, feed, sink
        self._recorder, self._on_commit, self._stopping = recorder, on_commit, stopping
        self._ranges = Ranges()
        self._error: Exception | None = None
        self._admitted = 0
        self._free_slots = deque(range(num_streams))
        self._flights: list[_Flight] = []
        self._loads: deque[_Flight] = deque()  # not seen to be done, as the kernels and the stores
        self._before_kernel: deque[_Flight] = deque()  # whose kernels aren't queued
        self._kernels: deque[_Flight] = deque()
        self._stores: deque[_Flight] = deque()

    def run(self) -> None:
        """Move the feed's chunks to the sink until the feed is exhausted. Blocks.

        An error in the source or the sink ends the intake; the chunks in flight are finished, then it is raised with
        a note that names the chunk and the stage. An error of the device, or an interrupt, waits for what is queued
        and drops it. Either way every slot and piece is free again afterwards.
        """
        self._movers.begin(self._ranges)
        try:
            with self._device.running():
                while self._flights or not self._intake_is_over():
                    if not self._step():
                        self._device.idle()
            self._movers.end()
            if self._error is not None:
                raise self._error
        except BaseException:
            self._stopping.set()
            if self._movers.in_use:  # files are closed after this, and arrays are the caller's again
                uninterrupted(self._movers.cancel)
            raise
        finally:
            self._error = None  # its traceback names this frame, and so the caller's data

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Move everything that can move. False if nothing moved."""
        moved = self._movers.poll()
        moved |= self._finish_loads()
        moved |= self._start_kernels()
        moved |= self._finish_kernels()
        moved |= self._finish_stores()
        moved |= self._admit()
        return moved

    def _intake_is_over(self) -> bool:
        return self._error is not None or self._stopping.is_set() or self._feed.exhausted

    def _admit(self) -> bool:
        """Give the next chunk a free slot, and begin to load it."""
        if not self._free_slots or self._intake_is_over():
            return False
        try:
            chunk = self._feed.take()
        except Exception as error:
            self._fail(error, f"the source after {self._admitted} chunks", None)
            return True
        if chunk is None:
            return False
        try:
            target = self._sink.target(chunk)
        except Exception as error:
            self._fail(error, "the sink", None)
            return True
        self._admitted += 1
        stays = chunk.release is None  # the source's memory, until the kernel has read it
        load_from, own_source = self._split(chunk.source, may_own=stays)
        store_to, own_target = self._split(target, may_own=True)
        flight = _Flight(chunk, self._free_slots.popleft(), own_source, own_target, store_to)
        self._flights.append(flight)
        self._before_kernel.append(flight)
        if chunk.filled is not None:
            n_bytes = chunk.rows * self._movers.wire.in_row_bytes
            self._recorder.add("fill", chunk.index, *chunk.filled, n_bytes)
        if load_from is not None:
            load_by = self._movers.for_load(load_from)
            flight.load = load_by.load(load_from, chunk.rows, flight.slot, chunk.index)
            self._loads.append(flight)
            flight.pending += 1
        if store_to is not None:
            flight.store_by = self._movers.for_store(store_to)
        return True

    def _split(self, rows: Rows | DeviceRows, *, may_own: bool) -> tuple[Rows | None, DeviceRows | None]:
        """Rows that a mover has to carry, or else those that the kernel uses where they are: rows in the device's
        memory, and in the caller's where the device computes from and to it."""
        if isinstance(rows, DeviceRows):
            return None, rows
        own = self._device.own_rows(rows.array) if may_own and rows.array is not None else None
        return (rows, None) if own is None else (None, own)

    def _finish_loads(self) -> bool:
        moved = False
        while self._loads:
            flight = self._loads[0]
            assert flight.load is not None
            if not self._is_over(flight, flight.load):
                break
            self._loads.popleft()
            flight.pending -= 1
            if not flight.has_failed:
                flight.loaded_s = flight.load.end_s
                if flight.chunk.release is not None:
                    flight.chunk.release()
            flight.load = None
            self._retire(flight)
            moved = True
        return moved

    def _start_kernels(self) -> bool:
        """Queue the kernels of the oldest chunks whose copies to the device are all queued, and begin their stores."""
        moved = False
        while self._before_kernel:
            flight = self._before_kernel[0]
            if not flight.has_failed:
                if flight.load is not None and not flight.load.queued():
                    break
                self._compute(flight)
            self._before_kernel.popleft()
            moved = True
        return moved

    def _compute(self, flight: _Flight) -> None:
        """Queue the kernel. The slot's order puts it after the chunk's load and before its store."""
        chunk, slot = flight.chunk, flight.slot
        try:
            with self._ranges("kernel", chunk.index):
                flight.kernel = self._device.compute(slot, chunk.rows, chunk.row, flight.source, flight.target)
        except Exception as error:
            _noted(error, "kernel", chunk)
            raise
        self._kernels.append(flight)
        flight.pending += 1
        if flight.store_by is not None and flight.store_to is not None:
            flight.store = flight.store_by.store(flight.store_to, chunk.rows, slot, chunk.index)
            self._stores.append(flight)
            flight.pending += 1

    def _finish_kernels(self) -> bool:
        """Record the oldest kernels that are done. One began when its load had ended, at the earliest."""
        moved = False
        while self._kernels:
            flight = self._kernels[0]
            assert flight.kernel is not None
            try:
                if flight.load is not None or not flight.kernel.done():
                    break
                start_s, end_s = flight.kernel.times()
                self._recorder.add("kernel", flight.chunk.index, min(end_s, max(start_s, flight.loaded_s)), end_s, 0)
            except Exception as error:
                self._fail_in("kernel", error, flight)
            self._kernels.popleft()
            flight.pending -= 1
            if flight.store is None:
                self._land(flight)
            self._retire(flight)
            moved = True
        return moved

    def _finish_stores(self) -> bool:
        moved = False
        while self._stores:
            flight = self._stores[0]
            assert flight.store is not None
            if not self._is_over(flight, flight.store):
                break
            self._stores.popleft()
            flight.pending -= 1
            self._land(flight)
            self._retire(flight)
            moved = True
        return moved

    def _is_over(self, flight: _Flight, transfer: Transfer) -> bool:
        """Whether a transfer has ended. If so it has been recorded, or its error kept."""
        try:
            if not transfer.done():
                return False
            transfer.record(self._recorder)
        except Exception as error:
            self._fail_in(transfer.failed_stage, error, flight)
        return True

    def _land(self, flight: _Flight) -> None:
        """Commit a chunk whose rows have all reached the sink."""
        if flight.has_failed:
            return
        flight.has_landed = True
        try:
            self._sink.commit(flight.chunk)
            self._on_commit(flight.chunk)
        except Exception as error:
            self._fail(error, "the sink", flight)

    def _retire(self, flight: _Flight) -> None:
        """Free the slot of a chunk that has landed or failed, once nothing of it is under way."""
        if flight.pending == 0 and (flight.has_landed or flight.has_failed):
            self._flights.remove(flight)
            self._free_slots.append(flight.slot)

    # -- errors ------------------------------------------------------------------------------------------------------

    def _fail_in(self, stage: str, error: Exception, flight: _Flight) -> None:
        """A stage failed. An error of the device ends the run at once, any other one the intake."""
        if isinstance(error, DeviceError) and stage in _DEVICE_STAGES:
            _noted(error, stage, flight.chunk)
            raise error
        self._fail(error, stage, flight)

    def _fail(self, error: Exception, stage: str, flight: _Flight | None) -> None:
        """Keep the first error, end the intake, and give up the chunk it belongs to."""
        if flight is not None:
            flight.has_failed = True
        if self._error is None:
            self._error = _noted(error, stage, flight.chunk if flight is not None else None)
            self._stopping.set()


def _noted(error: Exception, stage: str, chunk: Chunk | None) -> Exception:
    where = "" if chunk is None else f" of chunk {chunk.index} (rows {chunk.row} to {chunk.row + chunk.rows - 1})"
    error.add_note(f"pipeline: in {stage}{where}")
    return error
