"""One GPU of a plan: the executor's own loop on the simulated device, with measured rates and without data."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, cast

from pipeline.arrays import HostArray
from pipeline.config import Staging
from pipeline.devices.sim import Engine, Hardware, SimDevice
from pipeline.executor import Executor
from pipeline.flow import Chunk, RangeFeed, Sink
from pipeline.instrument import Recorder
from pipeline.report.stages import stage_stats
from pipeline.rows import DeviceRows, Job, Operation, SourceRows, TargetRows
from pipeline.staging.movers import Movers, Wire

_CHUNKS, _PIECES = 240, 8_000  # simulated at most, but for as many chunks as it takes to fill and empty the stages
_STREAMS = 60  # simulated at most: a chunk that waits behind so many others changes nothing


@dataclass(frozen=True)
class StageRates:
    """Rows per second that each stage of a GPU would move alone. Infinity stands for a stage that isn't used.

    `memory` is for fills and drains together, `fill_share` the part of its bytes that fills move. `pause_s` is what a
    copy engine loses before the first copy of another chunk.
    """

    fill: float
    h2d: float
    kernel: float
    d2h: float
    drain: float
    memory: float
    fill_share: float
    pause_s: float


@dataclass(frozen=True)
class Simulated:
    """What one GPU did with the first `rows` rows. `steady_rows_per_s` is the rate while its stages were full."""

    rows: int
    seconds: float
    steady_rows_per_s: float
    busy_shares: dict[str, float]


def simulate(
    rates: StageRates,
    wire: Wire,
    rows: int,
    *,
    staged_in: bool,
    staged_out: bool,
    chunk_rows: int,
    num_streams: int,
) -> Simulated:
    """Run the first of `rows` rows through the executor on one simulated GPU. Rows of an end that isn't staged are
    in pinned memory."""
    num_streams = min(num_streams, _STREAMS, -(-rows // chunk_rows))
    device = _PlanDevice(rates)
    workers = _PlanWorkers(device, rates)
    movers = Movers(device, workers, wire, Staging.default())
    pieces = -(-chunk_rows // piece_rows(max(wire.in_row_bytes, wire.out_row_bytes)))
    chunks = min(_CHUNKS, max(4 * num_streams, _PIECES // pieces))
    rows = min(rows, chunks * chunk_rows)
    recorder = Recorder("plan")
    done: list[tuple[float, int]] = [(0.0, 0)]

    def on_commit(chunk: Chunk) -> None:
        done.append((device.now(), done[-1][1] + chunk.rows))

    feed = RangeFeed(rows, chunk_rows, lambda row, n: _Rows(workers, "fill", n, staged_in))
    sink = _PlanSink(workers, staged_out)
    Executor(device, movers, num_streams, feed, sink, recorder, on_commit, threading.Event()).run()
    seconds = device.now()
    # The rate while all stages are at work: from a third of the commits on, and without the last ones, which empty the
    # slots.
    early, late = done[len(done) // 3], done[max(len(done) // 3 + 1, len(done) - 1 - num_streams)]
    busy_shares = {name: stage.busy_share for name, stage in stage_stats([recorder], seconds).items()}
    return Simulated(rows, seconds, (late[1] - early[1]) / (late[0] - early[0]), busy_shares)


class _PlanDevice(SimDevice):
    """The simulated device without data: operations take their time and touch nothing."""

    poison = False

    def __init__(self, rates: StageRates) -> None:
        super().__init__(Hardware(latency_s=0.0))
        self._rates = rates
        self._free_at_s: dict[int, float] = {}  # by slot
        self._latest_slot: dict[str, int] = {}  # by engine

    def pinned(self, n_bytes: int) -> HostArray:
        return cast(HostArray, _NoMemory(n_bytes))

    def in_place(self, rows: HostArray) -> bool:
        return True  # asked only where a source or target shows its memory: the pinned ones do

    def upload(self, slot: int, first: int, rows: HostArray) -> Operation:
        return self._copy("H2D", slot, len(rows) / self._rates.h2d)

    def compute(
        self, slot: int, rows: int, dataset_row: int, source: DeviceRows | None, target: DeviceRows | None
    ) -> Operation:
        return self._take("kernel", slot, rows / self._rates.kernel)

    def download(self, slot: int, first: int, rows: HostArray) -> Operation:
        return self._copy("D2H", slot, len(rows) / self._rates.d2h)

    def _copy(self, stage: str, slot: int, seconds: float) -> Operation:
        before = self._latest_slot.get(stage, slot)
        self._latest_slot[stage] = slot
        return self._take(stage, slot, seconds if before == slot else seconds + self._rates.pause_s)

    def _take(self, stage: str, slot: int, seconds: float) -> Operation:
        operation = self.schedule(self._engines[stage], self._free_at_s.get(slot, 0.0), seconds, _nothing, _nothing)
        self._free_at_s[slot] = operation.end_s
        return operation


class _PlanWorkers:
    """Copy workers on the virtual clock: all together one engine for memory, and one each for fills and drains."""

    description = "copy workers (simulated)"

    def __init__(self, device: _PlanDevice, rates: StageRates) -> None:
        self._device = device
        share = rates.fill_share
        self._row_s = {"fill": 1 / rates.fill, "drain": 1 / rates.drain}
        self._memory_row_s = {"fill": share / rates.memory, "drain": (1 - share) / rates.memory}
        self._memory_free_at_s = 0.0
        self._free_at_s = {"fill": 0.0, "drain": 0.0}
        self.asked: tuple[str, int] = ("fill", 0)  # stage and rows of the job that is being submitted

    def submit(self, job: Job) -> Operation:
        job()
        stage, rows = self.asked
        now = self._device.now()
        self._memory_free_at_s = max(now, self._memory_free_at_s) + rows * self._memory_row_s[stage]
        self._free_at_s[stage] = max(now, self._free_at_s[stage]) + rows * self._row_s[stage]
        end_s = max(self._memory_free_at_s, self._free_at_s[stage])
        return self._device.schedule(Engine(), now, end_s - now, _nothing, _nothing)

    def run(self, job: Job) -> None:
        job()

    def wait_all(self) -> None:
        self._device.synchronize()

    def close(self) -> None:
        pass


class _NoMemory:
    """What the executor takes for rows in memory: so many of them, and no memory behind."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def view(self, dtype: Any) -> _NoMemory:
        return self

    def reshape(self, shape: tuple[int, int]) -> _NoMemory:
        return _NoMemory(shape[0])

    def __getitem__(self, rows: slice) -> _NoMemory:
        return _NoMemory(min(rows.stop, self._rows))

    def __setitem__(self, rows: slice, value: int) -> None:
        pass  # PIPELINE_DEBUG overwrites pieces


class _Rows(SourceRows, TargetRows):
    """Rows of a chunk at one end: staged ones tell the copy workers how many they are, pinned ones show no memory."""

    def __init__(self, workers: _PlanWorkers, stage: str, rows: int, staged: bool) -> None:
        self._workers, self._stage = workers, stage
        self.array = None if staged else cast(HostArray, _NoMemory(rows))

    def read(self, first: int, piece: HostArray) -> None:
        self._workers.asked = (self._stage, len(piece))

    write = read


class _PlanSink(Sink):
    def __init__(self, workers: _PlanWorkers, staged: bool) -> None:
        self._workers, self._staged = workers, staged

    def target(self, chunk: Chunk) -> _Rows:
        return _Rows(self._workers, "drain", chunk.rows, self._staged)

    def finish(self, rows: int) -> None:
        pass


def _nothing() -> None:
    pass


def piece_rows(row_bytes: int) -> int:
    """Rows of a pinned piece, each of so many bytes."""
    return max(1, Staging.default().piece_bytes // row_bytes)


def ring_bytes(row_bytes: int) -> int:
    """Pinned bytes of a ring for rows of so many bytes."""
    return Staging.default().ring_pieces * piece_rows(row_bytes) * row_bytes
