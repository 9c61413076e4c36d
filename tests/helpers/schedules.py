"""Schedules: runs with random shapes, sizes, sources, rates and jitter, drawn from a seed, and what must hold then.

The result must have the bits of `layer(x)`, and the run must come to rest. A schedule runs on one of several grounds:
the simulated device, whose virtual clock gives one seed one order of events, or a CPU with the fake driver, with either
mover.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits, batches_of, poisoned, random_layer, random_rows
from helpers.leaks import small_rings
from helpers.native_device import WatchedNative

from pipeline import FusedLinear
from pipeline.arrays import HostArray, convert, host_tensor
from pipeline.config import Staging
from pipeline.devices.base import Device
from pipeline.devices.sim import Hardware, SimDevice
from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32, Cast, DType, cast_between
from pipeline.executor import Executor
from pipeline.flow import Chunk, Feed, Gather
from pipeline.instrument import Recorder
from pipeline.io.memory import ArrayRows, ArraySink, ArraySource
from pipeline.io.registry import SourceRequest
from pipeline.rows import Workers
from pipeline.staging.movers import Movers, Wire
from pipeline.staging.native import NativeWorkers

IDLE_LIMIT = 2_000  # passes without anything queued on the device: nothing can ever move again


class Hang(AssertionError):
    """The executor waits for something that can't happen any more."""


class WatchedSim(SimDevice):
    """Notices a hang: idling again and again while nothing is queued."""

    idle_in_a_row = 0
    may_wait = False  # for a thread of the test's: its timeout catches hangs

    def idle(self) -> None:
        if self.busy or self.may_wait:
            self.idle_in_a_row = 0
            super().idle()
            return
        self.idle_in_a_row += 1
        if self.idle_in_a_row > IDLE_LIMIT:
            raise Hang(f"idle {IDLE_LIMIT} times with nothing queued")


# -- a schedule --------------------------------------------------------------------------------------------------------


@cache
def layer_of(in_features: int, out_features: int) -> FusedLinear:
    return random_layer(in_features, out_features)


def rounded(array: HostArray, dtype: DType) -> HostArray:
    out = np.empty(array.shape, dtype.carrier)
    convert(out, array, Cast(FLOAT32, dtype))
    return out


def expected_rows(layer: FusedLinear, x: HostArray) -> HostArray:
    """The layer of x, rounded to the layer's type first and widened again afterwards."""
    if layer.dtype is FLOAT32:
        return np.asarray(layer(x))
    y = layer(host_tensor(rounded(x, layer.dtype), layer.dtype))
    return np.asarray(y.float().numpy())


@dataclass
class Case:
    """One schedule, drawn from its seed."""

    seed: int
    source: str = ""
    sink: str = ""
    many_chunks: bool = False

    def __post_init__(self) -> None:
        choose = random.Random(self.seed)
        self.layer = layer_of(choose.choice([1, 3, 8, 17, 33]), choose.choice([1, 2, 9, 16, 40]))
        self.chunk_rows = choose.choice([1, 2, 5, 16, 31, 64])
        chunks = choose.randint(6, 12) if self.many_chunks else choose.choice([0, 1, 2, 3, 5, 9, 14])
        self.rows = max(0, chunks * self.chunk_rows - choose.randrange(self.chunk_rows))
        self.num_streams = choose.randint(1, 5)
        row_bytes = 4 * max(self.layer.in_features, self.layer.out_features)
        self.piece_bytes = choose.choice([1, row_bytes, 3 * row_bytes, 7 * row_bytes, 40 * row_bytes])
        self.ring_pieces = choose.randint(1, 6)
        self.source = self.source or choose.choice(["pageable", "pageable", "pinned", "gather", "iterable"])
        self.sink = self.sink or choose.choice(["pageable", "pageable", "pinned", "strided", "fresh"])
        # Rows are cast while they are staged; a source that gathers hands out rows of the wire's type already.
        self.wire = choose.choice([FLOAT32, FLOAT32, FLOAT32, BFLOAT16, FLOAT16])
        if self.source == "gather":
            self.wire = FLOAT32
        slow, fast = 10 ** choose.uniform(4, 6), 1e12
        bound = choose.choice(["H2D", "D2H", "kernel", "workers", "latency", "nothing"])
        self.hardware = Hardware(
            h2d_rate=slow if bound == "H2D" else fast,
            d2h_rate=slow if bound == "D2H" else fast,
            flop_rate=10 * slow if bound == "kernel" else 1e15,
            copy_rate=10 * slow if bound == "workers" else fast,
            copy_threads=choose.randint(1, 5),
            latency_s=1e-3 if bound == "latency" else 5e-6,
            jitter=choose.choice([0.0, 0.5, 2.0, 10.0]),
        )
        self.random = choose


class GatherFeed(Feed):
    """Batches gathered into pinned chunk buffers, as the reader's thread does it, but without a thread.

    A buffer that is released is poisoned at once: whoever still reads it gets NaN. `take` sometimes has nothing yet.
    """

    def __init__(self, case: Case, device: Any, x: HostArray) -> None:
        self._x, self._chunk_rows, self._random = x, case.chunk_rows, case.random
        n_bytes = case.chunk_rows * x.shape[1] * 4
        self._free = deque(device.pinned(n_bytes) for _ in range(case.num_streams + 1))
        self._next = self._row = 0

    def take(self) -> Chunk | None:
        if not self._free or self._random.random() < 0.3:
            return None
        buffer = self._free.popleft()
        rows = min(self._chunk_rows, len(self._x) - self._row, self._random.randint(1, self._chunk_rows))
        memory = buffer[: rows * self._x.shape[1] * 4].view(np.float32).reshape(rows, -1)
        memory[...] = self._x[self._row : self._row + rows]

        def release() -> None:
            buffer[...] = 0xFF
            self._free.append(buffer)

        chunk = Chunk(self._next, self._row, rows, ArrayRows(memory), release)
        self._next, self._row = self._next + 1, self._row + rows
        return chunk

    @property
    def exhausted(self) -> bool:
        return self._row >= len(self._x)

    def stop(self) -> None:
        self._row = len(self._x)


class CheckingSink(ArraySink):
    """Compares a chunk's rows with the expected ones when they are committed: later would hide an early commit."""

    def __init__(self, out: HostArray, expected: HostArray, cast: Cast | None = None, *, fresh: bool = False) -> None:
        super().__init__(out, out, cast, fresh=fresh)
        self._expected = expected
        self.committed: list[tuple[int, int]] = []

    def commit(self, chunk: Chunk) -> None:
        self.committed.append((chunk.row, chunk.rows))
        rows = slice(chunk.row, chunk.row + chunk.rows)
        assert_same_bits(self._array[rows], self._expected[rows])


Plant = Callable[[pytest.MonkeyPatch, "Schedule"], None]


@dataclass(frozen=True)
class Ground:
    """What a schedule runs on: a device, and workers for it where it has none of its own."""

    open: Callable[[Case], Any]
    mover: str = "Python"  # whose rings rows go through

    def open_workers(self, device: Device) -> Workers:
        return device.workers() or NativeWorkers(2)


SIM = Ground(lambda case: WatchedSim(case.hardware, seed=case.seed))
GROUNDS = {
    "sim": SIM,
    "native mover": Ground(lambda case: WatchedNative(case.seed), "native"),
    "Python mover": Ground(lambda case: WatchedPython(case.seed)),
}


class WatchedPython(WatchedNative):
    in_c = False


@dataclass
class Schedule:
    """A case, set up: device, executor, feed and sink. `run` runs and checks it; `close` ends what it has started."""

    case: Case
    monkeypatch: pytest.MonkeyPatch
    ground: Ground = SIM
    x: HostArray = field(init=False)
    feed: Feed = field(init=False)

    def __post_init__(self) -> None:
        case, layer = self.case, self.case.layer
        small_rings(self.monkeypatch, case.piece_bytes, case.ring_pieces)
        self.device = self.ground.open(case)
        wire = case.wire
        on_wire = layer if wire is FLOAT32 else layer.rounded_to(wire, lambda a: rounded(a, wire))
        self.device.prepare(on_wire, wire, case.chunk_rows)
        self.device.allocate(case.chunk_rows, case.num_streams)
        self.workers = self.ground.open_workers(self.device)
        widths = Wire(layer.in_features, layer.out_features, wire, wire)
        self.movers = Movers(self.device, self.workers, widths, Staging.chosen())
        self.x = random_rows(case.rows, layer.in_features, seed=case.seed)
        self.expected: HostArray = expected_rows(on_wire, self.x) if case.rows else poisoned((0, layer.out_features))
        guarded = poisoned((case.rows + 2, layer.out_features))
        self.guards = [guarded[0], guarded[-1]]
        out = guarded[1:-1]
        if case.sink == "pinned":
            self.device.pin(out)
        elif case.sink == "strided":
            out = poisoned((case.rows, 2 * layer.out_features))[:, ::2]
        self.out = out
        self.sink = CheckingSink(out, self.expected, cast_between(wire, FLOAT32), fresh=case.sink == "fresh")
        self.recorder = Recorder("sim")
        if case.source == "gather":
            self.feed = GatherFeed(case, self.device, self.x)
        elif case.source == "iterable":  # the real reader, with its thread
            sizes = [case.random.randint(0, 2 * case.chunk_rows) for _ in range(case.random.randint(1, 8))]
            self.feed = self.batch_feed([*sizes, case.chunk_rows + 1])
        else:
            x = self.device.pin(self.x) if case.source == "pinned" else self.x
            self.feed = ArraySource(x, "NumPy array").feed(case.chunk_rows, self.gather(), case.wire)

    @cached_property
    def executor(self) -> Executor:
        """What `run` runs, with the feed and the sink of now."""
        arguments = self.case.num_streams, self.feed, self.sink, self.recorder, lambda chunk: None, threading.Event()
        return Executor(self.device, self.movers, *arguments)

    def batch_feed(self, sizes: list[int]) -> Feed:
        from pipeline.io.batches import BatchSource

        source = BatchSource(batches_of(self.x, sizes), SourceRequest(self.case.layer.in_features, FLOAT32))
        return source.feed(self.case.chunk_rows, self.gather(), self.case.wire)

    def gather(self) -> Gather:
        return Gather(self.device.pinned, self.case.num_streams + 1, lambda job: job())

    def run(self) -> None:
        if self.case.source == "iterable":  # idle steps mean nothing while another thread reads
            self.device.may_wait = True
        try:
            self.executor.run()
        finally:
            self.feed.stop()
        self.check()

    def close(self) -> None:
        self.movers.cancel()
        self.movers.close()
        self.workers.close()
        self.device.close()

    def check(self) -> None:
        """The result and the state of rest."""
        case = self.case
        assert_same_bits(self.out, self.expected)
        assert all(np.isnan(guard).all() for guard in self.guards), "rows outside the output were written"
        check_rest(self.executor, self.movers)
        edge = 0
        for row, rows in sorted(self.sink.committed):
            assert row == edge, f"rows {edge} to {row - 1} were committed never or twice"
            edge = row + rows
        assert edge == case.rows
        totals = self.recorder.totals
        out_bytes = self.expected.size * case.wire.itemsize
        in_place = case.wire is FLOAT32
        assert totals["H2D"].bytes == self.x.size * case.wire.itemsize
        assert totals["D2H"].bytes == out_bytes
        assert totals["kernel"].count == len(self.sink.committed)
        assert totals["drain"].bytes == (0 if case.sink == "pinned" and in_place else out_bytes)
        if case.source == "pinned" and in_place:
            assert totals["fill"].count == 0
        if self.ground is SIM:
            assert not self.device.busy
            for stage in ("H2D", "kernel", "D2H"):
                spans = sorted((i.start_s, i.end_s) for i in self.recorder.intervals if i.stage == stage)
                assert all(a[1] <= b[0] for a, b in pairwise(spans)), f"two {stage} at once"


def check_rest(executor: Executor, movers: Movers) -> None:
    """Every piece and slot is free, nothing is queued."""
    check_pieces(movers)
    assert not movers.in_use
    assert len(set(executor._free_slots)) == len(executor._free_slots) >= 1
    for queue in ("_flights", "_loads", "_before_kernel", "_kernels", "_stores"):
        assert not getattr(executor, queue)


def check_pieces(movers: Movers) -> None:
    """Every piece is free; those of the mover in C, all of which it has, are poisoned at least."""
    for ring in (movers.rings["Python"].load, movers.rings["Python"].store):
        assert ring.free_pieces == list(range(ring.pieces))
    for ring in (movers.rings["native"].load, movers.rings["native"].store):
        for piece in range(ring.pieces if ring.allocated_bytes else 0):
            assert (ring.rows(piece, ring.piece_rows).view(np.uint8) == 0xFF).all()
