"""A simulated device: a virtual clock, one FIFO an engine, seeded jitter and faults.

It computes real results, but an operation touches memory only at its start, when it poisons what it will write, and
at its end, when it reads its source and writes the result. A schedule that reuses a buffer before its event, or drains
a piece too early, therefore gives wrong numbers here on every run, where a fast real device might hide it. The clock
moves only in `idle`, so a run takes no real time for waiting and one seed always gives one schedule.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pipeline.arrays import HostArray
from pipeline.devices.base import Device, HostPlace, NoLayer, aligned_memory, host_rows, layer_at
from pipeline.dtypes import DType
from pipeline.errors import DriverError
from pipeline.layer.base import DeviceLayer, Layer
from pipeline.rows import DeviceRows, Job, Operation, Workers


@dataclass(frozen=True)
class Hardware:
    """The simulated machine. Rates are bytes and floating-point operations a second, `latency_s` is paid by each
    operation, and `jitter` is the largest share by which a duration is stretched; one in 16 takes eight times as long.
    """

    h2d_rate: float = 50e9
    d2h_rate: float = 50e9
    flop_rate: float = 200e12
    copy_rate: float = 8e9
    copy_threads: int = 4
    latency_s: float = 5e-6
    jitter: float = 0.0


class _SimOperation:
    def __init__(self, start_s: float, end_s: float) -> None:
        self.start_s, self.end_s = start_s, end_s
        self.completed = False
        self.error: BaseException | None = None

    def done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.completed

    def times(self) -> tuple[float, float]:
        return self.start_s, self.end_s


@dataclass
class Engine:
    """A FIFO: an operation starts when the one before it has ended."""

    free_at_s: float = 0.0


@dataclass(order=True)
class _Moment:
    at_s: float
    number: int
    action: Callable[[], None] = field(compare=False)


class SimDevice(Device):
    """See the module's docstring. `fail` maps a stage ("H2D", "kernel", "D2H") to the number of the operation of that
    stage, counted from 0, that fails with a DriverError."""

    name, poison, host_clock = "sim", True, False

    def __init__(self, hardware: Hardware | None = None, *, seed: int = 0, fail: dict[str, int] | None = None) -> None:
        self.hardware = hardware or Hardware()
        self.description = "simulated GPU"
        self._clock_s = 0.0
        self._random = random.Random(seed)
        self._moments: list[_Moment] = []
        self._numbers = itertools.count()
        self._engines = {stage: Engine() for stage in ("H2D", "kernel", "D2H")}
        self._fail = dict(fail or {})
        self._counts = dict.fromkeys(self._engines, 0)
        self._pinned: list[HostArray] = []
        self._place = HostPlace()
        self._on_host: DeviceLayer = NoLayer()
        self._scratch: list[int] = []  # the layer's own, by slot
        self._slot_free_at_s: list[float] = []
        self._inputs: list[HostArray] = []
        self._outputs: list[HostArray] = []

    # -- the clock ---------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._clock_s

    def idle(self) -> None:
        """Jump to the next moment at which something starts or ends; without one, wait for a reader's thread."""
        if not self._moments:
            time.sleep(50e-6)
            return
        moment = heapq.heappop(self._moments)
        self._clock_s = max(self._clock_s, moment.at_s)
        moment.action()

    @property
    def busy(self) -> bool:
        return bool(self._moments)

    def synchronize(self) -> None:
        while self.busy:
            self.idle()

    def schedule(
        self,
        engine: Engine,
        earliest_s: float,
        seconds: float,
        at_start: Callable[[], None],
        at_end: Callable[[], None],
        error: Exception | None = None,
    ) -> _SimOperation:
        """Queue an operation on an engine's FIFO."""
        stretch = 1 + self.hardware.jitter * self._random.random()
        if self.hardware.jitter and self._random.random() < 1 / 16:
            stretch *= 8
        start = max(self._clock_s, engine.free_at_s, earliest_s)
        end = start + (self.hardware.latency_s + seconds) * stretch
        engine.free_at_s = end
        operation = _SimOperation(start, end)

        def finish() -> None:
            try:
                if error is not None:
                    raise error
                at_end()
            except BaseException as failure:  # handed to the executor by done()
                operation.error = failure
            operation.completed = True

        heapq.heappush(self._moments, _Moment(start, next(self._numbers), at_start))
        heapq.heappush(self._moments, _Moment(end, next(self._numbers), finish))
        return operation

    # -- the device protocol -----------------------------------------------------------------------------------------

    def free_bytes(self) -> int | None:
        return None

    def prepare(self, layer: Layer, out_dtype: DType, chunk_rows: int) -> None:
        self._layer, self._out_dtype = layer, out_dtype
        self._on_host = layer_at(self._place, layer, out_dtype, chunk_rows)
        self.kernel, self.runs_as = "simulated kernel", self._on_host.runs_as

    def allocate(self, chunk_rows: int, num_streams: int) -> None:
        layer, scratch_bytes = self._layer, self._on_host.slot_bytes(chunk_rows)
        self._inputs = [_poisoned(chunk_rows, layer.in_features, layer.dtype) for _ in range(num_streams)]
        self._outputs = [_poisoned(chunk_rows, layer.out_features, self._out_dtype) for _ in range(num_streams)]
        self._scratch = [self._place.allocate(scratch_bytes, f"chunk {slot}") for slot in range(num_streams)]
        self._slot_free_at_s = [0.0] * num_streams

    def pinned(self, n_bytes: int) -> HostArray:
        memory = self.pin(aligned_memory(n_bytes))
        _poison(memory)
        return memory

    def pin(self, array: HostArray) -> HostArray:
        """Treat `array` as pinned memory."""
        self._pinned.append(array)
        return array

    def in_place(self, rows: HostArray) -> bool:
        return any(np.may_share_memory(rows, pinned) for pinned in self._pinned)

    def _queue(self, stage: str, slot: int, seconds: float, target: HostArray, work: Callable[[], None]) -> Operation:
        number = self._counts[stage]
        self._counts[stage] += 1
        error = None
        if self._fail.get(stage) == number:
            error = DriverError(f"simulated failure of {stage} operation {number}", "CUDA_ERROR_SIMULATED")
        operation = self.schedule(
            self._engines[stage], self._slot_free_at_s[slot], seconds, lambda: _poison(target), work, error
        )
        self._slot_free_at_s[slot] = operation.end_s
        return operation

    def upload(self, slot: int, first: int, rows: HostArray) -> Operation:
        target = self._inputs[slot][first : first + len(rows)]
        return self._queue("H2D", slot, rows.nbytes / self.hardware.h2d_rate, target, lambda: np.copyto(target, rows))

    def compute(
        self, slot: int, rows: int, dataset_row: int, source: DeviceRows | None, target: DeviceRows | None
    ) -> Operation:
        layer, scratch = self._layer, self._scratch[slot]
        x = source or host_rows(self._inputs[slot][:rows])
        y = target or host_rows(self._outputs[slot][:rows])
        written = self._outputs[slot][:rows]
        if target is not None:
            written = target.tensor(layer.out_features, self._out_dtype).numpy()

        def work() -> None:
            self._on_host.queue(x, y, dataset_row, 0, scratch)

        seconds = 2 * rows * layer.in_features * layer.out_features / self.hardware.flop_rate
        return self._queue("kernel", slot, seconds, written, work)

    def download(self, slot: int, first: int, rows: HostArray) -> Operation:
        source = self._outputs[slot][first : first + len(rows)]
        return self._queue("D2H", slot, rows.nbytes / self.hardware.d2h_rate, rows, lambda: np.copyto(rows, source))

    def workers(self) -> Workers:
        return _SimWorkers(self)

    def close(self) -> None:
        self._on_host.close()
        self._inputs, self._outputs, self._moments, self._pinned = [], [], [], []


class _SimWorkers:
    """Copy workers on the virtual clock: a job takes the earliest free thread and does its copy when it ends.

    Its duration is that of 64 KiB: a job doesn't say how much it copies, and the order of events is what matters here.
    """

    def __init__(self, device: SimDevice) -> None:
        self._device = device
        self._threads = [Engine() for _ in range(device.hardware.copy_threads)]
        self.description = f"copy workers: {len(self._threads)} (simulated)"

    def submit(self, job: Job) -> Operation:
        thread = min(self._threads, key=lambda engine: engine.free_at_s)
        return self._device.schedule(thread, 0.0, 65536 / self._device.hardware.copy_rate, _nothing, job)

    def run(self, job: Job) -> None:
        job()

    def wait_all(self) -> None:
        while self._device.busy:
            self._device.idle()

    def close(self) -> None:
        self._device.synchronize()


def _nothing() -> None:
    pass


def _poison(rows: HostArray) -> None:
    rows.view(np.uint8)[...] = 0xFF


def _poisoned(rows: int, features: int, dtype: DType) -> HostArray:
    memory = np.empty((rows, features), dtype.carrier)
    _poison(memory)
    return memory
