"""Short measurements of what a machine's copies reach: the bus, the copy workers, and both of them with a given ring.

The executor's own loop does the copies, on devices whose kernels do nothing and with scratch memory at both ends.
Several devices copy at the same time, since they may share the host's bus; rates are theirs together, bytes a second
each way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import TracebackType

import numpy as np

from pipeline.arrays import HostArray
from pipeline.config import Staging, cores
from pipeline.devices.base import Device
from pipeline.dtypes import FLOAT32
from pipeline.executor import Executor
from pipeline.flow import Chunk, Feed, Sink
from pipeline.instrument import Recorder
from pipeline.io.memory import ArrayRows
from pipeline.options import DEFAULT_STREAMS
from pipeline.rows import DeviceRows, Drain, Fill, Operation, Workers
from pipeline.staging.movers import Movers, Wire
from pipeline.staging.native import open_workers

_FEATURES = 8192
_ROW_BYTES = _FEATURES * FLOAT32.itemsize
_CHUNK_ROWS = 1024  # 32 MiB
_CHUNK_BYTES = _CHUNK_ROWS * _ROW_BYTES
_SOURCE_CHUNKS = 4  # 128 MiB of scratch: more than most caches hold, where no memory of the caller's can be read
_TARGET_CHUNKS = 1  # stores that bypass the caches find nothing there however small it is
RING_BYTES = 2 * _CHUNK_BYTES  # the most that a ring may hold in one direction
_FEWEST_CHUNKS = 2 * DEFAULT_STREAMS  # a trial on a slow machine takes as many, so that all slots have been used
_WIRE = Wire(_FEATURES, _FEATURES, FLOAT32, FLOAT32)


class _TimedFeed(Feed):
    """The same chunks again and again, from the `first` on, until a moment has come."""

    def __init__(self, chunks: HostArray | None, first: int, now: Callable[[], float], seconds: float) -> None:
        self._chunks, self._first, self._now = chunks, first, now
        self._until_s = now() + seconds
        self.taken = 0
        self.ended_s = float("inf")

    def take(self) -> Chunk | None:
        if self.exhausted:
            return None
        if self.taken >= _FEWEST_CHUNKS and self._now() >= self._until_s:
            self.stop()
            return None
        index = self.taken
        self.taken += 1
        rows: ArrayRows | DeviceRows = _NO_ROWS
        if self._chunks is not None:
            rows = ArrayRows(self._chunks[(self._first + index) % len(self._chunks)])
        return Chunk(index, index * _CHUNK_ROWS, _CHUNK_ROWS, rows)

    @property
    def exhausted(self) -> bool:
        return self.ended_s < float("inf")

    def stop(self) -> None:
        self.ended_s = min(self.ended_s, self._now())


class _ScratchSink(Sink):
    def __init__(self, chunks: HostArray | None) -> None:
        self._chunks = chunks

    def target(self, chunk: Chunk) -> ArrayRows | DeviceRows:
        return _NO_ROWS if self._chunks is None else ArrayRows(self._chunks[chunk.index % len(self._chunks)])

    def finish(self, rows: int) -> None:
        pass


_NO_ROWS = DeviceRows(0, 0, _FEATURES, _CHUNK_ROWS, None)  # the device's kernels do nothing, so nobody looks there


class _Place:
    """A device that copies only, and its pinned memory, from which each trial's rings are cut."""

    def __init__(self, device: Device) -> None:
        self.device = device.for_copies(_ROW_BYTES, _CHUNK_ROWS, DEFAULT_STREAMS)
        try:
            self._memory = self.device.pinned(2 * RING_BYTES)
        except BaseException:
            self.device.close()
            raise
        self._used = 0

    def chunks(self, half: int) -> HostArray:
        """Half of the pinned memory as chunks of rows."""
        return _as_chunks(self._memory[half * RING_BYTES : (half + 1) * RING_BYTES])

    def start(self) -> None:
        self._used = 0

    def take(self, n_bytes: int) -> HostArray:
        first, self._used = self._used, self._used + n_bytes
        return self._memory[first : self._used]


class Copies:
    """What measures the copies of `devices`. Holds device memory, pinned and scratch memory until it is closed.

    `trial_s` is the length of one measurement, in seconds on the devices' clock. `source` is contiguous memory of the
    caller's to read instead of scratch memory; one of less than 128 MiB isn't used.

    Raises:
        DeviceMemoryError: a device or the host lacks the memory.
    """

    def __init__(self, devices: Sequence[Device], trial_s: float, source: HostArray | None = None) -> None:
        self._trial_s = trial_s
        self._chunks_read = 0  # each trial reads on where the last one stopped: no cache has kept what comes next
        source_chunks = 0 if source is None else source.nbytes // _CHUNK_BYTES
        own_chunks = _TARGET_CHUNKS + (0 if source_chunks >= _SOURCE_CHUNKS else _SOURCE_CHUNKS)
        self._places: list[_Place] = []
        # Kept from trial to trial, since it takes the system a while to spread new threads evenly over the cores.
        self._shared: dict[int, Workers] = {}
        try:
            for device in devices:
                self._places.append(_Place(device))
            scratch = _as_chunks(np.empty(own_chunks * _CHUNK_BYTES, np.uint8))
            with ThreadPoolExecutor(min(16, cores())) as pool:  # writes, since pages that nobody wrote are all the same
                list(pool.map(lambda chunk: np.copyto(chunk, 1), scratch))
            self._target, self._source = scratch[:_TARGET_CHUNKS], scratch[_TARGET_CHUNKS:]
            if source is not None and source_chunks >= _SOURCE_CHUNKS:
                self._source = _as_chunks(source.reshape(-1).view(np.uint8)[: source_chunks * _CHUNK_BYTES])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for workers in self._shared.values():
            workers.close()
        for place in self._places:
            place.device.close()
        self._places, self._shared = [], {}

    def bus(self, staging: Staging) -> tuple[float, float, float]:
        """Pinned memory, no copy workers at work: H2D alone, D2H alone, each way with both at once."""
        self._rate(staging, lambda place: (place.chunks(0), place.chunks(1)))  # all memory has been used once
        return (
            self._rate(staging, lambda place: (place.chunks(0), None)),
            self._rate(staging, lambda place: (None, place.chunks(1))),
            self._rate(staging, lambda place: (place.chunks(0), place.chunks(1))),
        )

    def staged(self, staging: Staging) -> float:
        """From ordinary memory to ordinary memory, through rings and copy workers as `staging` says."""
        return self._rate(staging, lambda place: (self._source, self._target))

    def host(self, staging: Staging) -> float:
        """The copy workers alone: they fill a ring and drain another one at the same time, and no bus is at work."""
        place, workers = self._places[0], self._workers(staging)[0]
        device, rows = place.device, max(1, staging.piece_bytes // _ROW_BYTES)
        place.start()
        pieces = [(_as_rows(place.take(rows * _ROW_BYTES)), fills) for fills in [True, False] * staging.ring_pieces]
        source, target = self._source.reshape(-1, _FEATURES), self._target.reshape(-1, _FEATURES)
        next_row = {True: self._chunks_read * _CHUNK_ROWS % len(source), False: 0}

        def submit(piece: HostArray, fills: bool) -> Operation:
            ordinary = source if fills else target
            row = next_row[fills] if next_row[fills] + rows <= len(ordinary) else 0
            next_row[fills] = row + rows
            part = ordinary[row : row + rows]
            rows_there = ArrayRows(part)
            return workers.submit(Fill(rows_there, 0, piece) if fills else Drain(rows_there, 0, piece))

        try:
            end_s, first_s, done = device.now() + self._trial_s, 0.0, 0
            running = [submit(*piece) for piece in pieces]
            while done < 3 * len(pieces) or device.now() < end_s:
                number = done % len(pieces)  # fills and drains take turns: one of each pair is of either kind
                while not running[number].done():
                    device.idle()
                done += 1
                running[number] = submit(*pieces[number])
                if done == len(pieces):  # until then workers woke up
                    first_s = device.now()
            return (done - len(pieces)) / 2 * rows * _ROW_BYTES / (device.now() - first_s)
        finally:
            workers.wait_all()

    def _workers(self, staging: Staging) -> list[Workers]:
        """Copy workers for each device: its own where it has some, else the same ones for all."""
        own = [place.device.workers() for place in self._places]
        if None in own and staging.workers not in self._shared:
            self._shared[staging.workers] = open_workers(staging.workers)
        return [workers or self._shared[staging.workers] for workers in own]

    def _rate(
        self,
        staging: Staging,
        ends: Callable[[_Place], tuple[HostArray | None, HostArray | None]],
    ) -> float:
        """Bytes a second each way of all devices, from the chunks of source to those of target that `ends` gives for
        each; None for rows in the device's own memory."""

        def one(place: _Place, workers: Workers) -> tuple[float, int]:
            device = place.device
            place.start()
            movers = Movers(device, workers, _WIRE, staging, place.take)
            source, target = ends(place)
            feed = _TimedFeed(source, self._chunks_read, device.now, self._trial_s)
            done_s = [device.now()]
            with closing(movers):
                Executor(
                    device,
                    movers,
                    DEFAULT_STREAMS,
                    feed,
                    _ScratchSink(target),
                    Recorder(device.name, 0),
                    lambda _: done_s.append(device.now()),
                    threading.Event(),
                ).run()
            inside = [moment for moment in done_s if moment <= feed.ended_s]  # afterwards all stages run empty
            first = len(inside) // 3  # until then they were filling
            return (len(inside) - 1 - first) * _CHUNK_BYTES / (inside[-1] - inside[first]), feed.taken

        with ThreadPoolExecutor(len(self._places)) as pool:
            rates, chunks = zip(*pool.map(one, self._places, self._workers(staging)), strict=True)
        self._chunks_read += max(chunks)
        return float(sum(rates))


def _as_rows(memory: HostArray) -> HostArray:
    return memory.view(FLOAT32.carrier).reshape(-1, _FEATURES)


def _as_chunks(memory: HostArray) -> HostArray:
    return memory.view(FLOAT32.carrier).reshape(-1, _CHUNK_ROWS, _FEATURES)
