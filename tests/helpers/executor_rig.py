"""An executor with a small layer, and sources and sinks that fail when they are told to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits, poisoned, random_rows
from helpers.leaks import PlannedError, small_rings
from helpers.schedules import WatchedSim, check_rest, layer_of

from pipeline.arrays import HostArray
from pipeline.config import Staging
from pipeline.devices.base import Device
from pipeline.devices.sim import Hardware
from pipeline.dtypes import FLOAT32
from pipeline.executor import Executor
from pipeline.flow import Chunk, Feed, Gather, Sink
from pipeline.instrument import Recorder
from pipeline.io.memory import ArraySource
from pipeline.rows import SourceRows, TargetRows
from pipeline.staging.movers import Movers, Wire

NO_GATHER = Gather(lambda n: np.empty(n, np.uint8), 0, lambda job: job())


class Memory(SourceRows, TargetRows):
    """A host array that counts what is read of it and can fail: it stands for a file or the network."""

    def __init__(self, rows: HostArray, trouble: Callable[[int], None] = lambda row: None, first: int = 0) -> None:
        self._rows, self._trouble, self._first = rows, trouble, first

    def read(self, first: int, piece: HostArray) -> None:
        self._trouble(self._first + first)
        piece[...] = self._rows[first : first + len(piece)]

    def write(self, first: int, piece: HostArray) -> None:
        self._trouble(self._first + first)
        self._rows[first : first + len(piece)] = piece


class TroubledFeed(Feed):
    """An array's chunks, read through `trouble`; `at_take` is called with each chunk's index as it is handed out."""

    def __init__(
        self,
        x: HostArray,
        chunk_rows: int,
        trouble: Callable[[int], None] = lambda row: None,
        at_take: Callable[[int], None] = lambda index: None,
    ) -> None:
        self._inner = ArraySource(x, "NumPy array").feed(chunk_rows, NO_GATHER, FLOAT32)
        self._x, self._trouble, self._at_take = x, trouble, at_take
        self.taken = 0

    def take(self) -> Chunk | None:
        chunk = self._inner.take()
        if chunk is not None:
            self._at_take(chunk.index)
            chunk.source = Memory(self._x[chunk.row : chunk.row + chunk.rows], self._trouble, chunk.row)
            self.taken += chunk.rows
        return chunk

    @property
    def exhausted(self) -> bool:
        return self._inner.exhausted

    def stop(self) -> None:
        self._inner.stop()


class TroubledSink(Sink):
    """An array written through `trouble`; `at_commit` is called with each chunk."""

    def __init__(
        self,
        out: HostArray,
        trouble: Callable[[int], None] = lambda row: None,
        at_commit: Callable[[Chunk], None] = lambda chunk: None,
    ) -> None:
        self._out, self._trouble, self._at_commit = out, trouble, at_commit
        self.committed = 0

    def target(self, chunk: Chunk) -> Memory:
        return Memory(self._out[chunk.row : chunk.row + chunk.rows], self._trouble, chunk.row)

    def commit(self, chunk: Chunk) -> None:
        self._at_commit(chunk)
        self.committed += chunk.rows

    def finish(self, rows: int) -> HostArray:
        return self._out


@dataclass
class Rig:
    """A simulated device with a layer of 17 -> 9 features, chunks of 16 rows, and 150 rows for it."""

    monkeypatch: pytest.MonkeyPatch
    seed: int = 0
    fail: dict[str, int] | None = None
    num_streams: int = 3
    pieces: int = 3
    copy_threads: int = 2

    def __post_init__(self) -> None:
        small_rings(self.monkeypatch, 5 * 17 * 4, self.pieces)
        self.layer = layer_of(17, 9)
        hardware = Hardware(jitter=2.0, copy_threads=self.copy_threads)
        self.device = WatchedSim(hardware, seed=self.seed, fail=self.fail)
        self.device.prepare(self.layer, self.layer.dtype, 16)
        self.device.allocate(16, self.num_streams)
        workers = self.device.workers()
        assert workers is not None
        dtype = self.layer.dtype
        self.movers = Movers(self.device, workers, Wire(17, 9, dtype, dtype), Staging.chosen())
        self.executor: Executor | None = None  # the latest run's
        self.x = random_rows(150, 17, seed=self.seed)
        self.expected = self.layer(self.x)
        self.out = poisoned((150, 9))

    def run(self, feed: Feed | None = None, sink: Sink | None = None, on_commit: Any = lambda chunk: None) -> None:
        feed, sink = feed or TroubledFeed(self.x, 16), sink or TroubledSink(self.out)
        arguments = self.num_streams, feed, sink, Recorder("sim"), on_commit, threading.Event()
        self.executor = Executor(self.device, self.movers, *arguments)
        self.executor.run()

    def check_next_run(self) -> None:
        """The same executor, without trouble now, gives the right result and comes to rest."""
        self.out[...] = np.nan
        self.run()
        assert_same_bits(self.out, self.expected)
        self.check_rest()

    def check_rest(self) -> None:
        assert self.executor is not None
        check_rest(self.executor, self.movers)


def raise_at(limit: int, kind: Callable[[], BaseException] = PlannedError) -> Callable[[int], None]:
    def trouble(row: int) -> None:
        if row >= limit:
            raise kind()

    return trouble


def open_sim(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """`devices="sim"` opens this one."""
    monkeypatch.setattr("pipeline.fleet.open_device", lambda name: device)
