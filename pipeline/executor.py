"""The lanes, the rings and the one loop that moves chunks through a device.

    source --fill--> pinned piece --H2D--> slot --kernel--> slot --D2H--> pinned piece --drain--> sink

A chunk is the rows of one kernel launch and occupies one slot of the device from its first H2D to its last drain. A
piece is the part of a chunk that fits one buffer of a pinned ring. Where the caller's memory can be used by the copy
engines as it is, the fill or the drain vanishes and the whole chunk is one copy; where it is the device's own (CUDA
tensors; for the CPU any contiguous rows), the H2D or the D2H vanishes too.

Where device and copy workers allow it, code in C moves the pieces (pipeline/io/lanes.py): the loop then gives it whole
chunks, and sees fill and H2D, or D2H and drain, as one operation. Elsewhere the loop moves each piece itself.

Every lane is a queue in the order in which its operations were started, and each pass of the loop looks at the heads
only. A buffer goes back to its ring or its slot to the free list when, and only when, the operation that last used it
says that it is done. The number of slots and pieces bounds the memory, whatever the dataset's size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pipeline.arrays import HostArray
from pipeline.config import Staging
from pipeline.devices.base import Device
from pipeline.dtypes import DType
from pipeline.errors import DeviceError, uninterrupted
from pipeline.flow import Chunk, DeviceRows, Drain, Feed, Fill, Job, Operation, Sink, SourceRows, TargetRows, Workers
from pipeline.instrument import Ranges, Recorder
from pipeline.staging.native import NativeWorkers
from pipeline.staging.native_mover import StagingLanes, Transfer, show_in_profiles
from pipeline.staging.ring import Ring


class RowShape(Protocol):
    """What the executor asks of a layer: the width and element type of the rows that cross the bus."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def dtype(self) -> DType: ...


@dataclass(slots=True, eq=False)
class _Flight:
    """A chunk on its way through a slot. Row counts say how far each lane has come."""

    chunk: Chunk
    slot: int
    source: SourceRows | DeviceRows
    target: TargetRows | DeviceRows
    in_place_target: HostArray | None = None  # host memory that the D2H copy can write itself
    fill_started: int = 0
    uploaded: int = 0
    upload_done: int = 0
    kernel_queued: bool = False
    download_started: int = 0
    landed: int = 0
    pending: int = 0  # operations queued and not yet seen to be done
    failed: bool = False
    load: Transfer | None = None  # where C brings its rows to the device


@dataclass(slots=True, eq=False)
class _Step:
    """One operation of a flight in a lane, with the rows [first, first + rows) of its chunk and the piece it uses."""

    flight: _Flight
    operation: Operation
    first: int
    rows: int
    piece: int | None = None
    range: Any = None  # of a profiler, for work that other threads do


class _LoadedFirst:
    """A kernel behind a transfer of the staging lanes: it began when that had ended, at the earliest."""

    def __init__(self, kernel: Operation, load: Transfer) -> None:
        self._kernel, self._load = kernel, load

    def done(self) -> bool:
        return self._load.is_over and self._kernel.done()

    def times(self) -> tuple[float, float]:
        start_s, end_s = self._kernel.times()
        return min(end_s, max(start_s, self._load.times()[1])), end_s


Lane = deque[_Step]
Rows = TypeVar("Rows", SourceRows | DeviceRows, TargetRows | DeviceRows)


class Executor:
    """Runs chunks through one prepared and allocated device. Used again for any number of runs, one at a time."""

    def __init__(
        self,
        device: Device,
        workers: Workers,
        layer: RowShape,
        out_dtype: DType,
        num_streams: int,
        staging: Staging | None = None,
        pinned: Callable[[int], HostArray] | None = None,
    ) -> None:
        """`layer` and `out_dtype` are what crosses the bus: the prepared device's. `staging` None means the default.
        `pinned` allocates the rings, by itself the device does."""
        self.device, self._layer, self._out_dtype = device, layer, out_dtype
        self._in_row_bytes = layer.in_features * layer.dtype.itemsize
        self._out_row_bytes = layer.out_features * out_dtype.itemsize
        self._num_streams, self._pinned = num_streams, pinned or device.pinned
        self._unfinished = False  # a second interrupt can leave a run before its buffers are free
        self._stage(workers, staging or Staging.chosen())

    def _stage(self, workers: Workers, staging: Staging) -> None:
        self.workers, self.staging = workers, staging
        self.ring_in, self.ring_out = self._rings()
        self._lanes_rings = self._rings()
        self._lanes: StagingLanes | None = None

    def _rings(self) -> tuple[Ring, Ring]:
        def ring(features: int, dtype: DType) -> Ring:
            pieces, size = self.staging.ring_pieces, self.staging.piece_bytes
            return Ring(self._pinned, pieces, size, features, dtype, poison=self.device.poison)

        return ring(self._layer.in_features, self._layer.dtype), ring(self._layer.out_features, self._out_dtype)

    def _lanes_in_c(self) -> StagingLanes | None:
        """What moves pieces in C, from its first use on; None where the loop has to: also for a profiler that wouldn't
        see what C does."""
        workers = self.workers
        if self._lanes is None and isinstance(workers, NativeWorkers):
            copies = self.device.native_copies()
            if copies is not None and (show_in_profiles(workers) or not self._ranges.active):
                self._lanes = StagingLanes(workers, copies, *self._lanes_rings)
        return self._lanes

    @property
    def pinned_bytes(self) -> int:
        """Of all the rings."""
        return sum(ring.allocated_bytes for ring in (self.ring_in, self.ring_out, *self._lanes_rings))

    def restage(self, workers: Workers, staging: Staging) -> None:
        """Stage the next runs' rows with other workers and rings. Between runs only; frees the old rings' memory."""
        self.close()
        old = self.ring_in, self.ring_out, *self._lanes_rings
        self._stage(workers, staging)
        for ring in old:
            ring.free(self.device.free_pinned)

    def close(self) -> None:
        """End the thread that moves pieces. Before workers and device are closed; between runs only."""
        if self._lanes is not None:
            self._lanes.close()
            self._lanes = None

    def run(
        self,
        feed: Feed,
        sink: Sink,
        recorder: Recorder,
        on_commit: Callable[[Chunk], None],
        stopping: threading.Event,
    ) -> None:
        """Move the feed's chunks to the sink until the feed is exhausted. Blocks.

        An error in the source or the sink ends the intake; the chunks in flight are finished, then it is raised with
        a note that names the chunk and the stage. An error of the device, or an interrupt, waits for what is queued
        and drops it. `stopping` ends the intake from outside. Either way every buffer is free again afterwards.
        """
        if self._unfinished:
            self._abandon()
        self._ranges, self._recorder = Ranges(), recorder
        self._feed, self._sink, self._on_commit, self._stopping = feed, sink, on_commit, stopping
        self._error: BaseException | None = None
        self._flights: deque[_Flight] = deque()
        self._admitted = 0
        self._filling, self._uploading, self._running = Lane(), Lane(), Lane()
        self._downloading, self._draining = Lane(), Lane()
        self._loading, self._storing = Lane(), Lane()  # whole chunks through the lanes in C
        self._free_slots = deque(range(self._num_streams))
        self._unfinished = True
        try:
            with self.device.running():
                while self._flights or not self._intake_over():
                    if not self._step():
                        self.device.idle()
            self._unfinished = False
            if self._error is not None:
                raise self._error
        except BaseException:
            stopping.set()
            if self._unfinished:  # files are closed after this, and arrays are the caller's again
                uninterrupted(self._abandon)
            raise
        finally:  # the caller's data isn't kept alive until the next run
            del self._feed, self._sink, self._on_commit, self._error

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Move everything that can move, the last lane first so that buffers come free. False if nothing moved."""
        moved = self._finish_stores()
        moved |= self._finish_drains()
        moved |= self._finish_downloads()
        moved |= self._finish_kernels()
        moved |= self._finish_loads()
        moved |= self._finish_uploads()
        moved |= self._finish_fills()
        moved |= self._start_downloads()
        moved |= self._start_fills()
        moved |= self._admit()
        return moved

    def _intake_over(self) -> bool:
        return self._error is not None or self._stopping.is_set() or self._feed.exhausted

    def _admit(self) -> bool:
        """Give the next chunk a free slot."""
        if not self._free_slots or self._intake_over():
            return False
        try:
            chunk = self._feed.take()
            if chunk is None:
                return False
            target = self._sink.target(chunk)
        except Exception as error:
            self._fail(error, f"the source after {self._admitted} chunks", None)
            return True
        self._admitted += 1
        source = chunk.source
        if chunk.release is None:  # memory that stays as it is until the kernel has read it
            source = self._own_rows(source)
        flight = _Flight(chunk, self._free_slots.popleft(), source, self._own_rows(target))
        self._flights.append(flight)
        if chunk.filled is not None:
            self._record("fill", chunk, *chunk.filled, chunk.rows * self._in_row_bytes)
        if isinstance(flight.source, DeviceRows):
            flight.uploaded = flight.upload_done = chunk.rows
            self._compute(flight)
        elif flight.source.array is not None and self.device.in_place(flight.source.array):
            flight.fill_started = chunk.rows
            self._upload(flight, 0, chunk.rows, None)
        target = flight.target
        if not isinstance(target, DeviceRows) and target.array is not None and self.device.in_place(target.array):
            flight.in_place_target = target.array
        return True

    def _own_rows(self, rows: Rows) -> Rows | DeviceRows:
        """Host rows as the device's own, where it computes from and to the caller's memory."""
        if isinstance(rows, DeviceRows) or rows.array is None:
            return rows
        return self.device.own_rows(rows.array) or rows

    def _start_fills(self) -> bool:
        """Let workers copy the next rows of the oldest unfilled chunk into free pieces, or all of them go by C."""
        moved = False
        for flight in self._flights:
            source, ring = flight.source, self.ring_in
            if flight.failed or isinstance(source, DeviceRows):
                continue
            if flight.fill_started == 0:
                moved |= self._load(flight, source)
            while flight.fill_started < flight.chunk.rows and ring.available:
                first = flight.fill_started
                rows = min(ring.piece_rows, flight.chunk.rows - first)
                piece = ring.take()
                self._submit("fill", flight, Fill(source, first, ring.rows(piece, rows)), first, rows, piece)
                flight.fill_started += rows
                moved = True
            if not ring.available:
                break
        return moved

    def _load(self, flight: _Flight, source: SourceRows) -> bool:
        """Give a chunk's way to the device to the lanes in C. False where they can't move it."""
        lanes, chunk = self._lanes_in_c(), flight.chunk
        transfer = None if lanes is None else lanes.load(source, chunk.rows, flight.slot, chunk.index)
        if transfer is None:
            return False
        self._queue(self._loading, flight, transfer, 0, chunk.rows, None)
        flight.fill_started, flight.load = chunk.rows, transfer
        return True

    def _start_kernels(self) -> bool:
        """Queue the kernels of chunks whose last copy to the device the lanes have queued, behind that copy."""
        moved = False
        for step in self._loading:
            flight = step.flight
            if flight.kernel_queued:
                continue
            assert flight.load is not None
            if not flight.load.let_kernel_follow(flight.slot):
                break
            self._compute(flight)
            moved = True
        return moved

    def _finish_loads(self) -> bool:
        moved = self._start_kernels()
        for step in self._finished(self._loading, "H2D", self._in_row_bytes, host_stage="fill"):
            moved = True
            flight = step.flight
            flight.uploaded = flight.upload_done = step.rows
            if flight.chunk.release is not None:
                flight.chunk.release()
            if not flight.kernel_queued and not flight.failed:
                self._compute(flight)
        return moved

    def _finish_fills(self) -> bool:
        moved = False
        for step in self._finished(self._filling, "fill", self._in_row_bytes):
            moved = True
            if step.flight.failed:
                self._give_back(self.ring_in, step)
            else:
                self._upload(step.flight, step.first, step.rows, step.piece)
        return moved

    def _upload(self, flight: _Flight, first: int, rows: int, piece: int | None) -> None:
        """Queue the H2D copy of a filled piece, or of a whole chunk in place; after the last one, the kernel."""
        if piece is not None:
            memory = self.ring_in.rows(piece, rows)
        else:
            assert not isinstance(flight.source, DeviceRows) and flight.source.array is not None
            memory = flight.source.array
        operation = self._call("H2D", flight.chunk, self.device.upload, flight.slot, first, memory)
        self._queue(self._uploading, flight, operation, first, rows, piece)
        flight.uploaded += rows
        if flight.uploaded == flight.chunk.rows:
            self._compute(flight)

    def _finish_uploads(self) -> bool:
        moved = False
        for step in self._finished(self._uploading, "H2D", self._in_row_bytes):
            moved = True
            flight = step.flight
            self._give_back(self.ring_in, step)
            flight.upload_done += step.rows
            if flight.upload_done == flight.chunk.rows and flight.chunk.release is not None:
                flight.chunk.release()
        return moved

    def _compute(self, flight: _Flight) -> None:
        """Queue the kernel. The slot's order puts it after the chunk's H2D copies and before its D2H copies."""
        chunk = flight.chunk
        source = flight.source if isinstance(flight.source, DeviceRows) else None
        target = flight.target if isinstance(flight.target, DeviceRows) else None
        operation = self._call("kernel", chunk, self.device.compute, flight.slot, chunk.rows, chunk.row, source, target)
        if flight.load is not None:
            operation = _LoadedFirst(operation, flight.load)
        self._queue(self._running, flight, operation, 0, chunk.rows, None)
        flight.kernel_queued = True

    def _finish_kernels(self) -> bool:
        moved = False
        for step in self._finished(self._running, "kernel", 0):
            moved = True
            if isinstance(step.flight.target, DeviceRows):
                self._land(step)
        return moved

    def _start_downloads(self) -> bool:
        """Queue D2H copies: into free pieces, or of a whole chunk in place; or let the lanes in C have the chunk."""
        moved = False
        for flight in self._flights:
            target = flight.target
            if not flight.kernel_queued:
                break  # rows leave in the order in which they came
            if flight.failed or isinstance(target, DeviceRows):
                continue
            if flight.in_place_target is None and flight.download_started == 0:
                moved |= self._store(flight, target)
            while flight.download_started < flight.chunk.rows:
                first, piece = flight.download_started, None
                if flight.in_place_target is not None:
                    rows, memory = flight.chunk.rows, flight.in_place_target
                elif self.ring_out.available:
                    rows = min(self.ring_out.piece_rows, flight.chunk.rows - first)
                    piece = self.ring_out.take()
                    memory = self.ring_out.rows(piece, rows)
                else:
                    return moved
                operation = self._call("D2H", flight.chunk, self.device.download, flight.slot, first, memory)
                self._queue(self._downloading, flight, operation, first, rows, piece)
                flight.download_started += rows
                moved = True
        return moved

    def _store(self, flight: _Flight, target: TargetRows) -> bool:
        """Give a chunk's way from the device to the lanes in C. False where they can't move it."""
        lanes, chunk = self._lanes_in_c(), flight.chunk
        transfer = None if lanes is None else lanes.store(target, chunk.rows, flight.slot, chunk.index)
        if transfer is None:
            return False
        self._queue(self._storing, flight, transfer, 0, chunk.rows, None)
        flight.download_started = chunk.rows
        return True

    def _finish_stores(self) -> bool:
        moved = False
        for step in self._finished(self._storing, "D2H", self._out_row_bytes, host_stage="drain"):
            moved = True
            self._land(step)
        return moved

    def _finish_downloads(self) -> bool:
        """Let workers drain the pieces whose D2H copies are done."""
        moved = False
        for step in self._finished(self._downloading, "D2H", self._out_row_bytes):
            moved = True
            flight, target = step.flight, step.flight.target
            if step.piece is None:
                self._land(step)
            elif flight.failed:
                self._give_back(self.ring_out, step)
            else:
                assert not isinstance(target, DeviceRows)
                job = Drain(target, step.first, self.ring_out.rows(step.piece, step.rows))
                self._submit("drain", flight, job, step.first, step.rows, step.piece)
        return moved

    def _finish_drains(self) -> bool:
        moved = False
        for step in self._finished(self._draining, "drain", self._out_row_bytes):
            moved = True
            self._give_back(self.ring_out, step)
            self._land(step)
        return moved

    def _land(self, step: _Step) -> None:
        """Count rows that have reached the sink; with the last ones, commit the chunk."""
        flight = step.flight
        flight.landed += step.rows
        if flight.landed == flight.chunk.rows and not flight.failed:
            try:
                self._sink.commit(flight.chunk)
                self._on_commit(flight.chunk)
            except Exception as error:
                self._fail(error, "the sink", flight)

    # -- lanes, pieces and slots -------------------------------------------------------------------------------------

    def _submit(self, stage: str, flight: _Flight, job: Job, first: int, rows: int, piece: int) -> None:
        """Give a fill or a drain to the copy workers. Its range ends when the loop sees that it is done."""
        lane = self._filling if stage == "fill" else self._draining
        begun = self._ranges.begin(stage, flight.chunk.index)
        self._queue(lane, flight, self.workers.submit(job), first, rows, piece)
        lane[-1].range = begun

    def _call(self, stage: str, chunk: Chunk, queue: Callable[..., Operation], *arguments: Any) -> Operation:
        """Call the device, in an NVTX range; what it raises gets a note of the chunk and the stage."""
        try:
            with self._ranges(stage, chunk.index):
                return queue(*arguments)
        except Exception as error:
            _noted(error, stage, chunk)
            raise

    def _queue(
        self, lane: Lane, flight: _Flight, operation: Operation, first: int, rows: int, piece: int | None
    ) -> None:
        flight.pending += 1
        lane.append(_Step(flight, operation, first, rows, piece))

    def _finished(self, lane: Lane, stage: str, row_bytes: int, host_stage: str | None = None) -> Iterator[_Step]:
        """Take the operations that are done from the head of a lane, oldest first. `host_stage` is the other half of
        transfers, what copy workers do."""
        while lane:
            step = lane[0]
            try:
                if not step.operation.done():
                    return
                if isinstance(step.operation, Transfer):
                    self._record_pieces(step.operation, step.flight.chunk, stage, host_stage or stage, row_bytes)
                else:
                    self._record(stage, step.flight.chunk, *step.operation.times(), step.rows * row_bytes)
            except DeviceError as error:
                if stage in ("H2D", "kernel", "D2H"):
                    _noted(error, stage, step.flight.chunk)
                    raise
                self._fail(error, stage, step.flight)
            except Exception as error:
                self._fail(error, host_stage or stage, step.flight)
            if step.range is not None:
                self._ranges.end(step.range)
            lane.popleft()
            step.flight.pending -= 1
            yield step
            self._retire(step.flight)

    def _record(self, stage: str, chunk: Chunk, start_s: float, end_s: float, n_bytes: int) -> None:
        self._recorder.add(stage, chunk.index, start_s, end_s, n_bytes)

    def _record_pieces(self, transfer: Transfer, chunk: Chunk, stage: str, host_stage: str, row_bytes: int) -> None:
        for span in transfer.spans():
            n_bytes = span.rows * row_bytes
            self._record(host_stage, chunk, span.host_start_s, span.host_end_s, n_bytes)
            self._record(stage, chunk, span.device_start_s, span.device_end_s, n_bytes)

    def _give_back(self, ring: Ring, step: _Step) -> None:
        if step.piece is not None:
            ring.give_back(step.piece)

    def _retire(self, flight: _Flight) -> None:
        """Free the slot of a chunk that has landed, or that failed and has nothing queued any more."""
        over = flight.landed == flight.chunk.rows or flight.failed
        if over and flight.pending == 0 and flight in self._flights:
            self._flights.remove(flight)
            self._free_slots.append(flight.slot)

    # -- errors ------------------------------------------------------------------------------------------------------

    def _fail(self, error: BaseException, stage: str, flight: _Flight | None) -> None:
        """Keep the first error, end the intake, and give up the chunk it belongs to."""
        if flight is not None:
            flight.failed = True
        if self._error is None:
            self._error = _noted(error, stage, flight.chunk if flight is not None else None)
            self._stopping.set()

    def _abandon(self) -> None:
        """After a hard error: wait until nothing uses the buffers any more, then take them all back."""
        if self._lanes is not None:
            self._lanes.cancel()
        try:
            self.device.synchronize()
        except DeviceError:
            pass  # the error that brought us here is the one to report; a lost device runs nothing any more
        self.workers.wait_all()
        for lane in (self._filling, self._draining):
            for step in lane:
                if step.range is not None:
                    self._ranges.end(step.range)
                    step.range = None
        self.ring_in.give_back_all()
        self.ring_out.give_back_all()
        lanes = (self._filling, self._loading, self._uploading, self._running)
        for queue in (self._flights, *lanes, self._downloading, self._storing, self._draining):
            queue.clear()
        self._unfinished = False


def _noted(error: BaseException, stage: str, chunk: Chunk | None) -> BaseException:
    where = "" if chunk is None else f" of chunk {chunk.index} (rows {chunk.row} to {chunk.row + chunk.rows - 1})"
    error.add_note(f"pipeline: in {stage}{where}")
    return error
