"""The CPU as a device: computes for real, with threads for each engine a GPU has."""

from __future__ import annotations

import os
import platform
import queue
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.arrays import HostArray
from pipeline.devices.base import Device, HostPlace, NoLayer, aligned_memory, host_rows, layer_at
from pipeline.dtypes import DType
from pipeline.errors import DeviceMemoryError
from pipeline.layer.base import DeviceLayer, Layer
from pipeline.rows import DeviceRows, Operation

_PATIENCE_S = 5e-4, 3.2e-2  # with the copy workers, at first and at most
# Threads of each engine. Two that queue kernels: cores that are done with one chunk begin with the next.
_ENGINES = {"H2D": 1, "kernel": 2, "D2H": 1}


class _Task:
    """A queued operation: runs on its engine's thread once the slot's previous operation is done."""

    def __init__(self, work: Callable[[], None], after: _Task | None, something_done: threading.Event) -> None:
        self._work, self._after, self._something_done = work, after, something_done
        self._finished = threading.Event()
        self._error: BaseException | None = None
        self._times = (0.0, 0.0)

    def run(self) -> None:
        if self._after is not None:
            self._after.wait()
            self._after = None
        start, work = time.perf_counter(), self._work
        del self._work  # the caller's arrays aren't kept
        try:
            work()
        except BaseException as error:  # handed to the executor by done()
            self._error = error
        del work  # before anyone hears that it is done, and may end the process
        self._times = (start, time.perf_counter())
        self._finished.set()
        self._something_done.set()

    def wait(self) -> None:
        self._finished.wait()

    def done(self) -> bool:
        if self._error is not None:
            raise self._error
        return self._finished.is_set()

    def times(self) -> tuple[float, float]:
        return self._times


class _Engine:
    """Threads that begin tasks in the order in which they were queued. They end with it, or when the interpreter exits:
    Python would unwind a daemon that is inside torch then, and the process would abort."""

    def __init__(self, name: str, threads: int) -> None:
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        started = [
            threading.Thread(target=_run_tasks, args=(self._tasks,), name=f"pipeline-{name}-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in started:
            thread.start()
        self.close = weakref.finalize(self, _end_threads, self._tasks, started)

    def queue(self, task: _Task) -> None:
        self._tasks.put(task)


def _run_tasks(tasks: queue.SimpleQueue[_Task | None]) -> None:
    while (task := tasks.get()) is not None:
        task.run()


def _end_threads(tasks: queue.SimpleQueue[_Task | None], threads: list[threading.Thread]) -> None:
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        thread.join()


class CpuDevice(Device):
    """Computes from and to the caller's arrays where their rows are contiguous; else "H2D" and "D2H" are memory copies
    into and out of the slots."""

    name = "cpu"

    def __init__(self) -> None:
        self.description = f"{platform.machine()} CPU, {os.cpu_count()} threads"
        self._engines = {stage: _Engine(f"cpu-{stage}", threads) for stage, threads in _ENGINES.items()}
        self._something_done = threading.Event()
        self._patience_s = _PATIENCE_S[0]
        self._place = HostPlace()
        self._on_host: DeviceLayer = NoLayer()
        self._last: list[_Task | None] = []
        self._scratch: list[int] = []  # the layer's own, by slot
        self._inputs: list[HostArray] = []
        self._outputs: list[HostArray] = []

    def free_bytes(self) -> int | None:
        return free_memory_bytes()

    def prepare(self, layer: Layer, out_dtype: DType, chunk_rows: int) -> None:
        self._in_features, self._dtype = layer.in_features, layer.dtype
        self._out_features, self._out_dtype = layer.out_features, out_dtype
        self._on_host = layer_at(self._place, layer, out_dtype, chunk_rows)
        self.kernel, self.runs_as = self._on_host.kernel, self._on_host.runs_as

    def allocate(self, chunk_rows: int, num_streams: int) -> None:
        scratch_bytes = self._on_host.slot_bytes(chunk_rows)
        try:
            self._scratch = [self._place.allocate(scratch_bytes, f"chunk {slot}") for slot in range(num_streams)]
            self._inputs = [_aligned_rows(chunk_rows, self._in_features, self._dtype) for _ in range(num_streams)]
            self._outputs = [
                np.empty((chunk_rows, self._out_features), self._out_dtype.carrier) for _ in range(num_streams)
            ]
        except (MemoryError, ValueError) as error:  # ValueError: more bytes than an address can name
            raise DeviceMemoryError(
                f"{num_streams} chunks of {chunk_rows} rows don't fit in memory; use smaller chunk_rows or num_streams"
            ) from error
        self._last = [None] * num_streams

    def pinned(self, n_bytes: int) -> HostArray:
        return aligned_memory(n_bytes)

    def in_place(self, rows: HostArray) -> bool:
        return True

    def own_rows(self, rows: HostArray) -> DeviceRows | None:
        return host_rows(rows)

    def _queue(self, stage: str, slot: int, work: Callable[[], None]) -> Operation:
        task = _Task(work, self._last[slot], self._something_done)
        self._engines[stage].queue(task)
        self._last[slot] = task
        self._patience_s = _PATIENCE_S[0]
        return task

    def upload(self, slot: int, first: int, rows: HostArray) -> Operation:
        return self._queue("H2D", slot, lambda: np.copyto(self._inputs[slot][first : first + len(rows)], rows))

    def compute(
        self, slot: int, rows: int, dataset_row: int, source: DeviceRows | None, target: DeviceRows | None
    ) -> Operation:
        layer, scratch = self._on_host, self._scratch[slot]
        x = source or host_rows(self._inputs[slot][:rows])
        y = target or host_rows(self._outputs[slot][:rows])
        return self._queue("kernel", slot, lambda: layer.queue(x, y, dataset_row, 0, scratch))

    def download(self, slot: int, first: int, rows: HostArray) -> Operation:
        return self._queue("D2H", slot, lambda: np.copyto(rows, self._outputs[slot][first : first + len(rows)]))

    def idle(self) -> None:
        """Wait for a task, or some milliseconds for the copy workers, the longer the longer nothing has happened: each
        look at them takes time from the product."""
        if self._something_done.wait(self._patience_s):
            self._something_done.clear()
            self._patience_s = _PATIENCE_S[0]
        else:
            self._patience_s = min(2 * self._patience_s, _PATIENCE_S[1])

    def synchronize(self) -> None:
        for task in self._last:
            if task is not None:
                task.wait()

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines = {}
        self._on_host.close()
        self._inputs, self._outputs, self._last = [], [], []


def free_memory_bytes() -> int | None:
    """Memory that could be used without swapping, where the system tells (Linux)."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def _aligned_rows(rows: int, features: int, dtype: DType) -> HostArray:
    """Memory from which a product reads rows as they are (see `HostWeights`)."""
    memory = aligned_memory(rows * features * dtype.itemsize)
    return memory.view(dtype.carrier).reshape(rows, features)
