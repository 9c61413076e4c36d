"""One GPU of a plan: the executor's own loop on the simulated device, with measured rates and without touching data."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np

from pipeline.arrays import HostArray
from pipeline.config import DType
from pipeline.devices.base import Operation
from pipeline.devices.sim import Engine, Hardware, SimDevice
from pipeline.executor import Executor
from pipeline.instrument import Recorder
from pipeline.io.jobs import Job
from pipeline.io.rows import Chunk, RangeFeed, Sink
from pipeline.layer import FusedLinear
from pipeline.report import bound, stage_stats


@dataclass(frozen=True)
class Rates:
    """Bytes and FLOP a second for one GPU and its share of the host. `copy` is for fills and drains together."""

    h2d: float
    d2h: float
    flop: float
    copy: float
    fill: float
    drain: float


@dataclass(frozen=True)
class Simulated:
    """What one GPU's lanes did. `steady_rows_per_s` is the rate while they were full."""

    rows: int
    seconds: float
    steady_rows_per_s: float
    bound: str
    busy_shares: dict[str, float]
    pinned_bytes: int


@dataclass(frozen=True)
class _Shape:
    """All that the executor asks of a layer."""

    in_features: int
    out_features: int
    dtype: DType


def simulate(
    rates: Rates,
    rows: int,
    in_features: int,
    out_features: int,
    dtype: DType,
    *,
    source_pinned: bool,
    out_pinned: bool,
    chunk_rows: int,
    num_streams: int,
) -> Simulated:
    """Run `rows` rows through the executor on one simulated GPU, on a virtual clock and without data."""
    device = _PlanDevice(rates)
    shape = _Shape(in_features, out_features, dtype)
    device.prepare(cast(FusedLinear, shape), dtype, chunk_rows)
    device.allocate(chunk_rows, num_streams)
    workers = _PlanWorkers(device, rates)
    executor = Executor(device, workers, shape, dtype, num_streams)
    source = _Rows(workers, "fill", np.empty((chunk_rows, in_features), dtype.carrier) if source_pinned else None)
    target = _Rows(workers, "drain", np.empty((chunk_rows, out_features), dtype.carrier) if out_pinned else None)
    recorder = Recorder("plan")
    done: list[tuple[float, int]] = [(0.0, 0)]

    def on_commit(chunk: Chunk) -> None:
        done.append((device.now(), done[-1][1] + chunk.rows))

    feed = RangeFeed(rows, chunk_rows, lambda row, n: source.first(n))
    executor.run(feed, _PlanSink(target), recorder, on_commit, threading.Event())
    seconds = device.now()
    # The rate while the lanes are full: between a third and the end of the commits, the last of which drain the slots.
    early, late = done[len(done) // 3], done[max(len(done) // 3 + 1, len(done) - 1 - num_streams)]
    stages = stage_stats([recorder], seconds)
    return Simulated(
        rows,
        seconds,
        (late[1] - early[1]) / (late[0] - early[0]),
        bound(stages),
        {name: stage.busy_share for name, stage in stages.items()},
        executor.ring_in.allocated_bytes + executor.ring_out.allocated_bytes,
    )


class _PlanDevice(SimDevice):
    """The simulated device without data: operations take their time and touch nothing."""

    poison = False

    def __init__(self, rates: Rates) -> None:
        super().__init__(Hardware(rates.h2d, rates.d2h, rates.flop))

    def prepare(self, layer: FusedLinear, out_dtype: DType, chunk_rows: int) -> None:
        self._layer, self._out_dtype = layer, out_dtype

    def allocate(self, chunk_rows: int, num_streams: int) -> None:
        rows = np.empty((chunk_rows, self._layer.in_features), self._layer.dtype.carrier)
        results = np.empty((chunk_rows, self._layer.out_features), self._out_dtype.carrier)
        self._inputs, self._outputs = [rows] * num_streams, [results] * num_streams
        self._slot_free_at_s = [0.0] * num_streams

    def pinned(self, n_bytes: int) -> HostArray:
        return np.empty(n_bytes, np.uint8)

    def in_place(self, rows: HostArray) -> bool:
        return True  # asked only where a source or target shows its memory: the pinned ones do

    def _queue(self, stage: str, slot: int, seconds: float, target: HostArray, work: Callable[[], None]) -> Operation:
        operation = self.schedule(self._engines[stage], self._slot_free_at_s[slot], seconds, _nothing, _nothing)
        self._slot_free_at_s[slot] = operation.end_s
        return operation


class _PlanWorkers:
    """Copy workers on the virtual clock: all together one engine for memory, and one each for reading and storing."""

    description = "copy workers (simulated)"

    def __init__(self, device: _PlanDevice, rates: Rates) -> None:
        self._device, self._rates = device, {"fill": rates.fill, "drain": rates.drain}
        self._copy, self._memory_free_at_s = rates.copy, 0.0
        self._free_at_s = {"fill": 0.0, "drain": 0.0}
        self.asked: tuple[str, int] = ("fill", 0)  # stage and bytes of the job that is being submitted

    def submit(self, work: Callable[[], None]) -> Operation:
        work()
        stage, n_bytes = self.asked
        now = self._device.now()
        self._memory_free_at_s = max(now, self._memory_free_at_s) + n_bytes / self._copy
        self._free_at_s[stage] = max(now, self._free_at_s[stage]) + n_bytes / self._rates[stage]
        end_s = max(self._memory_free_at_s, self._free_at_s[stage])
        return self._device.schedule(Engine(), now, end_s - now, _nothing, _nothing)

    def run(self, work: Callable[[], None]) -> None:
        work()

    def wait_all(self) -> None:
        self._device.synchronize()

    def close(self) -> None:
        pass


class _Rows:
    """Rows that a chunk is read from or written to, without data: a copy only tells the workers how much it is. `array`
    is the memory itself where that is pinned."""

    def __init__(self, workers: _PlanWorkers, stage: str, array: HostArray | None) -> None:
        self._workers, self._stage, self.array = workers, stage, array

    def first(self, rows: int) -> _Rows:
        """The same for a chunk of `rows` rows."""
        return _Rows(self._workers, self._stage, None if self.array is None else self.array[:rows])

    def fill(self, first: int, piece: HostArray) -> Job:
        def tell() -> None:
            self._workers.asked = (self._stage, piece.nbytes)

        return tell

    drain = fill


class _PlanSink(Sink):
    def __init__(self, rows: _Rows) -> None:
        self._rows = rows

    def target(self, chunk: Chunk) -> _Rows:
        return self._rows.first(chunk.rows)

    def finish(self, rows: int) -> None:
        pass


def _nothing() -> None:
    pass
