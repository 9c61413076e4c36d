"""The executor on the simulated device: seeded schedules, planted faults, injected failures, back-pressure.

A schedule is one run with random shapes, sizes, sources, rates and jitter. The result must have the bits of
`layer(x)`, and the executor must come to rest. The planted faults show that this would notice: each is a scheduling
bug put in on purpose.
"""

from __future__ import annotations

import ctypes
import gc
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from device_tests import (
    PlannedError,
    assert_same_bits,
    batches_of,
    nothing_left_behind,
    poisoned,
    random_layer,
    random_rows,
    small_rings,
    wait_until,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import pipeline.executor as executor_module
from pipeline import FusedLinear, Pipeline
from pipeline.arrays import HostArray, convert, host_tensor
from pipeline.devices.base import Device
from pipeline.devices.sim import Hardware, SimDevice
from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32, Cast, DType, cast_between
from pipeline.errors import DeviceError, DriverError
from pipeline.executor import Executor
from pipeline.flow import Chunk, DeviceRows, Feed, Gather, Operation, RangeFeed, Sink, SourceRows, TargetRows
from pipeline.instrument import STAGES, Recorder
from pipeline.io.memory import ArrayRows, ArraySink, ArraySource

SCHEDULES, BATCHES = 2_000, 8
FAULT_SEEDS = 25
IDLE_LIMIT = 2_000  # passes without anything queued on the device: nothing can ever move again


class Hang(AssertionError):
    """The executor waits for something that can't happen any more."""


class WatchedSim(SimDevice):
    """Notices a hang: idling again and again while nothing is queued."""

    idle_in_a_row = 0

    def idle(self) -> None:
        if self._moments:
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

    def __init__(self, case: Case, device: SimDevice, x: HostArray) -> None:
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


@dataclass
class Schedule:
    """A case, set up: device, executor, feed and sink. `run` runs and checks it."""

    case: Case
    monkeypatch: pytest.MonkeyPatch
    kind: type[WatchedSim] = WatchedSim
    x: HostArray = field(init=False)
    feed: Feed = field(init=False)

    def __post_init__(self) -> None:
        case, layer = self.case, self.case.layer
        small_rings(self.monkeypatch, case.piece_bytes, case.ring_pieces)
        self.device = self.kind(case.hardware, seed=case.seed)
        wire = case.wire
        on_wire = layer if wire is FLOAT32 else layer.rounded_to(wire, lambda a: rounded(a, wire))
        self.device.prepare(on_wire, wire, case.chunk_rows)
        self.device.allocate(case.chunk_rows, case.num_streams)
        workers = self.device.workers()
        assert workers is not None
        self.executor = Executor(self.device, workers, on_wire, wire, case.num_streams)
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

    def batch_feed(self, sizes: list[int]) -> Feed:
        from pipeline.io.batches import BatchSource
        from pipeline.io.registry import SourceRequest

        source = BatchSource(batches_of(self.x, sizes), SourceRequest(self.case.layer.in_features, FLOAT32))
        return source.feed(self.case.chunk_rows, self.gather(), self.case.wire)

    def gather(self) -> Gather:
        return Gather(self.device.pinned, self.case.num_streams + 1, lambda job: job())

    def run(self) -> None:
        real_time = self.case.source == "iterable"
        if real_time:  # idle steps mean nothing while another thread reads: the test's timeout catches hangs
            self.device.idle = super(WatchedSim, self.device).idle  # type: ignore[method-assign]
        try:
            self.executor.run(self.feed, self.sink, self.recorder, lambda chunk: None, threading.Event())
        finally:
            self.feed.stop()
        self.check()

    def check(self) -> None:
        """The result and the state of rest."""
        case, executor = self.case, self.executor
        assert_same_bits(self.out, self.expected)
        assert all(np.isnan(guard).all() for guard in self.guards), "rows outside the output were written"
        check_rest(executor)
        assert not self.device._moments
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
        for stage in STAGES:
            if stage in ("H2D", "kernel", "D2H"):
                spans = sorted((i.start_s, i.end_s) for i in self.recorder.intervals if i.stage == stage)
                assert all(a[1] <= b[0] for a, b in pairwise(spans)), f"two {stage} at once"


def check_rest(executor: Executor) -> None:
    """Every piece and slot is free, nothing is queued."""
    for ring in (executor.ring_in, executor.ring_out):
        assert sorted(ring._free) == list(range(ring.pieces))
    assert sorted(executor._free_slots) == list(range(executor._num_streams))
    assert not executor._flights
    for lane in ("_filling", "_uploading", "_running", "_downloading", "_draining"):
        assert not getattr(executor, lane)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_executor_schedules_are_right_bit_for_bit(
    batch: int, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    count = SCHEDULES // BATCHES
    for seed in range(batch * count, (batch + 1) * count):
        try:
            Schedule(Case(seed), monkeypatch).run()
        except BaseException as error:
            error.add_note(f"in the schedule of seed {seed}")
            raise
    record_property("schedules", count)


class DeviceMemorySim(WatchedSim):
    """Takes host arrays for rows in its own memory: what the executor does with a CUDA tensor, without a GPU."""

    def compute(
        self, slot: int, rows: int, dataset_row: int, source: DeviceRows | None, target: DeviceRows | None
    ) -> Operation:
        layer, inputs, outputs = self._layer, self._inputs[slot], self._outputs[slot]
        if source is not None:
            self._inputs[slot] = device_array(source, layer.in_features)
        if target is not None:
            self._outputs[slot] = device_array(target, layer.out_features)
        try:
            return super().compute(slot, rows, dataset_row, None, None)
        finally:
            self._inputs[slot], self._outputs[slot] = inputs, outputs


def device_array(rows: DeviceRows, features: int) -> HostArray:
    memory = (ctypes.c_float * ((rows.rows - 1) * rows.stride + features)).from_address(rows.address)
    strides = (4 * rows.stride, 4)
    return np.lib.stride_tricks.as_strided(np.frombuffer(memory, np.float32), (rows.rows, features), strides)


def device_rows(array: HostArray) -> DeviceRows:
    return DeviceRows(0, array.ctypes.data, array.strides[0] // 4, len(array), array)


class DeviceSink(CheckingSink):
    """An output in device memory."""

    def target(self, chunk: Chunk) -> Any:
        return device_rows(self._array).part(chunk.row, chunk.rows, 4)


@pytest.mark.parametrize("side", ["source", "target", "both"])
def test_executor_uses_rows_in_device_memory_without_copies(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(100):
        case = Case(seed, source="pageable", sink="pageable")
        case.wire = FLOAT32
        schedule = Schedule(case, monkeypatch, DeviceMemorySim)
        if side != "target":
            x = poisoned((case.rows, case.layer.in_features + 3))[:, 1:-2]
            x[...] = schedule.x
            whole = device_rows(x)
            schedule.feed = RangeFeed(case.rows, case.chunk_rows, lambda row, n, whole=whole: whole.part(row, n, 4))
        if side != "source":
            schedule.out = poisoned((case.rows, case.layer.out_features + 2))[:, 1:-1]
            schedule.sink = DeviceSink(schedule.out, schedule.expected)
        feed, sink, recorder = schedule.feed, schedule.sink, schedule.recorder
        schedule.executor.run(feed, sink, recorder, lambda chunk: None, threading.Event())
        assert_same_bits(schedule.out, schedule.expected)
        check_rest(schedule.executor)
        totals = recorder.totals
        assert totals["fill"].count == totals["H2D"].count == 0 or side == "target"
        assert totals["D2H"].count == totals["drain"].count == 0 or side == "source"
        assert len(sink.committed) == totals["kernel"].count == -(-case.rows // case.chunk_rows)


def test_executor_same_seed_gives_the_same_events(monkeypatch: pytest.MonkeyPatch) -> None:
    def events() -> list[Any]:
        schedule = Schedule(Case(5, source="gather", many_chunks=True), monkeypatch)
        schedule.run()
        return list(schedule.recorder.intervals)

    assert events() == events()


# -- planted faults ----------------------------------------------------------------------------------------------------


class Eager:
    """An operation that says it is done before it is."""

    def __init__(self, operation: Any) -> None:
        self._operation = operation

    def done(self) -> bool:
        return True

    def times(self) -> tuple[float, float]:
        return self._operation.start_s, self._operation.end_s


def eager(owner: Any, name: str) -> Plant:
    """Whatever `name` of `owner(schedule)` queues says at once that it is done."""

    def plant(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
        target = owner(schedule)
        queue = getattr(target, name)
        monkeypatch.setattr(target, name, lambda *arguments: Eager(queue(*arguments)))

    return plant


def eager_jobs(stage: str) -> Plant:
    """The copy workers' jobs of one stage say at once that they are done."""

    def plant(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
        executor = schedule.executor
        submit = executor._submit

        def wrong(name: str, *arguments: Any) -> None:
            submit(name, *arguments)
            if name == stage:
                step = (executor._filling if name == "fill" else executor._draining)[-1]
                step.operation = Eager(step.operation)

        monkeypatch.setattr(executor, "_submit", wrong)

    return plant


def piece_back_when_upload_is_queued(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    executor = schedule.executor
    upload = executor._upload

    def wrong(flight: Any, first: int, rows: int, piece: int | None) -> None:
        upload(flight, first, rows, piece)
        if piece is not None:
            executor._uploading[-1].piece = None
            executor.ring_in.give_back(piece)

    monkeypatch.setattr(executor, "_upload", wrong)


def piece_back_unpoisoned_when_upload_is_queued(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    """The same without poison: only the next fill of the piece shows it."""
    schedule.executor.ring_in.poison = False
    piece_back_when_upload_is_queued(monkeypatch, schedule)


def piece_back_when_drain_is_submitted(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    executor = schedule.executor
    queue = executor._queue

    def wrong(lane: Any, flight: Any, operation: Any, first: int, rows: int, piece: int | None) -> None:
        if lane is executor._draining and piece is not None:
            executor.ring_out.give_back(piece)
            piece = None
        queue(lane, flight, operation, first, rows, piece)

    monkeypatch.setattr(executor, "_queue", wrong)


def chunk_buffer_back_when_upload_is_queued(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    executor = schedule.executor
    upload = executor._upload

    def wrong(flight: Any, first: int, rows: int, piece: int | None) -> None:
        upload(flight, first, rows, piece)
        flight.chunk.release()
        flight.chunk.release = None

    monkeypatch.setattr(executor, "_upload", wrong)


def slot_back_before_its_downloads(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    """The next chunk takes the slot as soon as the kernel has read its input, on a device that trusts the executor."""
    executor, device = schedule.executor, schedule.device
    compute = executor._compute

    def wrong(flight: Any) -> None:
        compute(flight)
        executor._free_slots.append(flight.slot)
        device._slot_free_at_s[flight.slot] = 0.0

    monkeypatch.setattr(executor, "_compute", wrong)


def kernel_before_its_uploads(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    device = schedule.device
    compute = device.compute

    def wrong(slot: int, *arguments: Any) -> Operation:
        device._slot_free_at_s[slot] = 0.0
        return compute(slot, *arguments)

    monkeypatch.setattr(device, "compute", wrong)


def target_rows_shifted(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    sink = schedule.sink
    limit = len(schedule.out)

    def wrong(chunk: Chunk) -> ArrayRows:
        row = min(chunk.row + 1, limit - chunk.rows)
        return ArrayRows(schedule.out[row : row + chunk.rows])

    monkeypatch.setattr(sink, "target", wrong)


def source_rows_shifted(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    x, take = schedule.x, schedule.feed.take

    def wrong() -> Chunk | None:
        chunk = take()
        if chunk is not None:
            row = min(chunk.row + 1, len(x) - chunk.rows)
            chunk.source = ArrayRows(x[row : row + chunk.rows])
        return chunk

    monkeypatch.setattr(schedule.feed, "take", wrong)


def piece_rows_shifted(name: str) -> Plant:
    """One copy of a run goes to, or comes from, the row after its own in the slot."""

    def plant(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
        copy, calls = getattr(schedule.device, name), iter(range(10**6))

        def wrong(slot: int, first: int, rows: HostArray) -> Operation:
            if next(calls) == 2:
                first = first + 1 if first + len(rows) < schedule.case.chunk_rows else max(0, first - 1)
            return copy(slot, first, rows)

        monkeypatch.setattr(schedule.device, name, wrong)

    return plant


def chunk_never_handed_out(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    take = schedule.feed.take

    def wrong() -> Chunk | None:
        chunk = take()
        return take() if chunk is not None and chunk.index == 2 else chunk

    monkeypatch.setattr(schedule.feed, "take", wrong)


def chunk_forgotten_in_flight(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    """The last chunk leaves the executor's list when its kernel is queued."""
    executor = schedule.executor
    compute = executor._compute

    def wrong(flight: Any) -> None:
        compute(flight)
        if schedule.feed.exhausted:
            executor._flights.remove(flight)

    monkeypatch.setattr(executor, "_compute", wrong)


def piece_forgotten(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    monkeypatch.setattr(schedule.executor.ring_in, "give_back", lambda piece: None)


def chunks_swapped(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    """Chunks 1 and 2 get each other's data."""
    take, x, n = schedule.feed.take, schedule.x, schedule.case.chunk_rows

    def wrong() -> Chunk | None:
        chunk = take()
        if chunk is not None and chunk.index in (1, 2):
            row = n * (3 - chunk.index)
            chunk.source = ArrayRows(x[row : row + chunk.rows])
        return chunk

    monkeypatch.setattr(schedule.feed, "take", wrong)


def targets_swapped(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    target, n = schedule.sink.target, schedule.case.chunk_rows

    def wrong(chunk: Chunk) -> ArrayRows:
        if chunk.index in (1, 2):
            chunk = Chunk(chunk.index, n * (3 - chunk.index), chunk.rows, chunk.source)
        return target(chunk)

    monkeypatch.setattr(schedule.sink, "target", wrong)


def committed_early(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    """A chunk is committed when its drains are submitted."""
    executor = schedule.executor
    finish = executor._finish_downloads

    def wrong() -> bool:
        moved = finish()
        for step in executor._draining:
            if step.flight.landed == 0 and sum(s.rows for s in executor._draining if s.flight is step.flight) == (
                step.flight.chunk.rows
            ):
                executor._sink.commit(step.flight.chunk)
        return moved

    monkeypatch.setattr(executor, "_finish_downloads", wrong)


FAULTS: dict[str, Plant] = {
    "drain before its event": eager(lambda s: s.device, "download"),
    "drain's own event ignored": eager_jobs("drain"),
    "upload before the fill's event": eager_jobs("fill"),
    "piece reused before its H2D event": eager(lambda s: s.device, "upload"),
    "piece reused when its H2D is queued": piece_back_when_upload_is_queued,
    "piece reused when its H2D is queued, no poison": piece_back_unpoisoned_when_upload_is_queued,
    "piece reused before its drain": piece_back_when_drain_is_submitted,
    "chunk buffer reused before its H2D event": chunk_buffer_back_when_upload_is_queued,
    "slot reused before its D2H": slot_back_before_its_downloads,
    "kernel before its H2D": kernel_before_its_uploads,
    "wrong row offset in the sink": target_rows_shifted,
    "wrong row offset in the source": source_rows_shifted,
    "wrong row offset of one H2D": piece_rows_shifted("upload"),
    "wrong row offset of one D2H": piece_rows_shifted("download"),
    "a chunk lost in the feed": chunk_never_handed_out,
    "a chunk lost in flight": chunk_forgotten_in_flight,
    "a piece lost": piece_forgotten,
    "two chunks swapped in the source": chunks_swapped,
    "two chunks swapped in the sink": targets_swapped,
    "a chunk committed before it has landed": committed_early,
}


def fault_case(seed: int, name: str = "") -> Case:
    """A schedule with several chunks in flight that go through pieces in both directions."""
    case = Case(seed, source="gather" if "chunk buffer" in name else "pageable", sink="pageable", many_chunks=True)
    case.wire = FLOAT32
    case.layer, case.chunk_rows, case.rows = layer_of(17, 9), 16, 16 * 9 - 3
    case.num_streams, case.ring_pieces = 2 + seed % 3, 2 + seed % 4
    case.piece_bytes = 5 * 17 * 4
    return case


@pytest.mark.parametrize("seed", range(FAULT_SEEDS))
def test_executor_control_without_a_fault_passes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "chunk buffer"):
        Schedule(fault_case(seed, name), monkeypatch).run()


@pytest.mark.parametrize("name", FAULTS)
def test_executor_planted_fault_is_caught(
    name: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    caught = []
    for seed in range(FAULT_SEEDS):
        with monkeypatch.context() as patch:
            schedule = Schedule(fault_case(seed, name), patch)
            FAULTS[name](patch, schedule)
            try:
                schedule.run()
            except Exception as error:
                caught.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    record_property("caught", f"{len(caught)}/{FAULT_SEEDS}")
    # Not each schedule shows each fault: a drain on slow workers reads its piece long after the D2H copy, for example.
    assert len(caught) > FAULT_SEEDS / 2


# -- injected failures -------------------------------------------------------------------------------------------------


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
    """An executor of a layer of 17 -> 9 features with chunks of 16 rows, and 150 rows for it."""

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
        self.executor = Executor(self.device, workers, self.layer, self.layer.dtype, self.num_streams)
        self.x = random_rows(150, 17, seed=self.seed)
        self.expected = self.layer(self.x)
        self.out = poisoned((150, 9))

    def run(self, feed: Feed | None = None, sink: Sink | None = None, on_commit: Any = lambda chunk: None) -> None:
        feed, sink = feed or TroubledFeed(self.x, 16), sink or TroubledSink(self.out)
        self.executor.run(feed, sink, Recorder("sim"), on_commit, threading.Event())

    def check_next_run(self) -> None:
        """The same executor, without trouble now, gives the right result and comes to rest."""
        self.out[...] = np.nan
        self.run()
        assert_same_bits(self.out, self.expected)
        check_rest(self.executor)


def raise_at(limit: int, kind: Callable[[], BaseException] = PlannedError) -> Callable[[int], None]:
    def trouble(row: int) -> None:
        if row >= limit:
            raise kind()

    return trouble


@pytest.mark.parametrize("number", [0, 1, 7, 20])
@pytest.mark.parametrize("stage", ["H2D", "kernel", "D2H"])
def test_executor_device_failure_names_chunk_and_stage(
    stage: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = min(number, {"H2D": 37, "kernel": 9, "D2H": 18}[stage])
    rig = Rig(monkeypatch, seed=number, fail={stage: number})
    with pytest.raises(DriverError, match=f"simulated failure of {stage} operation {number}") as caught:
        rig.run()
    chunk = number if stage == "kernel" else number // 4  # 16 rows are 4 pieces of at most 5; D2H pieces hold 9
    notes = caught.value.__notes__
    assert len(notes) == 1 and notes[0].startswith(f"pipeline: in {stage} of chunk "), notes
    if stage != "D2H":
        assert f"of chunk {chunk} (rows {16 * chunk} to " in notes[0]
    for ring in (rig.executor.ring_in, rig.executor.ring_out):
        assert sorted(ring._free) == list(range(ring.pieces))
    rig.check_next_run()


@pytest.mark.parametrize("name", ["upload", "compute", "download"])
def test_executor_failure_of_a_device_call_names_chunk_and_stage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that the driver refuses at once, not when it would have run."""
    rig = Rig(monkeypatch)
    call = getattr(rig.device, name)

    def refused(slot: int, *arguments: Any) -> Operation:
        if len(rig.executor._flights) > 1:
            monkeypatch.setattr(rig.device, name, call)
            raise DriverError("cuLaunchKernel failed: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")
        return call(slot, *arguments)

    monkeypatch.setattr(rig.device, name, refused)
    with pytest.raises(DriverError, match="OUT_OF_RESOURCES") as caught:
        rig.run()
    stage = {"upload": "H2D", "compute": "kernel", "download": "D2H"}[name]
    assert [note.split(" of chunk")[0] for note in caught.value.__notes__] == [f"pipeline: in {stage}"]
    rig.check_next_run()


@pytest.mark.parametrize("row", [0, 5, 40, 149])
@pytest.mark.parametrize("where", ["fill", "drain"])
def test_executor_source_and_sink_errors_are_passed_on(where: str, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, seed=row)
    feed = TroubledFeed(rig.x, 16, raise_at(row - row % 5 if where == "fill" else 10**6))
    sink = TroubledSink(rig.out, raise_at(row - row % 16 if where == "drain" else 10**6))
    with pytest.raises(PlannedError) as caught:
        rig.run(feed, sink)
    assert len(caught.value.__notes__) == 1
    assert caught.value.__notes__[0].startswith(f"pipeline: in {where} of chunk ")
    check_rest(rig.executor)
    # The chunks that were committed are complete, and they are the ones before the error.
    assert sink.committed % 16 == 0 and sink.committed <= row
    assert_same_bits(rig.out[: sink.committed], rig.expected[: sink.committed])
    rig.check_next_run()


@pytest.mark.parametrize("index", [0, 1, 5])
def test_executor_finishes_the_chunks_in_flight_when_the_source_fails(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(monkeypatch)
    sink = TroubledSink(rig.out)
    with pytest.raises(PlannedError) as caught:
        rig.run(TroubledFeed(rig.x, 16, at_take=raise_at(index)), sink)
    assert caught.value.__notes__ == [f"pipeline: in the source after {index} chunks"]
    assert sink.committed == 16 * index
    assert_same_bits(rig.out[: 16 * index], rig.expected[: 16 * index])
    check_rest(rig.executor)
    rig.check_next_run()


@pytest.mark.parametrize("where", ["commit", "progress"])
def test_executor_commit_and_progress_errors_are_passed_on(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)

    def refuse(chunk: Chunk) -> None:
        if chunk.index == 3:
            raise PlannedError

    sink = TroubledSink(rig.out, at_commit=refuse if where == "commit" else lambda chunk: None)
    with pytest.raises(PlannedError) as caught:
        rig.run(sink=sink, on_commit=refuse if where == "progress" else lambda chunk: None)
    assert caught.value.__notes__ == ["pipeline: in the sink of chunk 3 (rows 48 to 63)"]
    check_rest(rig.executor)
    rig.check_next_run()


def test_executor_first_error_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)

    class FirstError(Exception):
        pass

    feed = TroubledFeed(rig.x, 16, raise_at(0, FirstError))
    with pytest.raises(FirstError) as caught:
        rig.run(feed, TroubledSink(rig.out, raise_at(0)))
    assert len(caught.value.__notes__) == 1


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["idle", "fill", "drain", "progress", "take"])
def test_executor_interrupt_leaves_every_buffer_free(
    where: str, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (1, 9, 30):
        rig = Rig(monkeypatch, seed=count)
        calls = iter(range(10**6))

        def interrupt(*_: object, calls: Iterator[int] = calls, count: int = count) -> None:
            if next(calls) == (count if where in ("idle", "fill") else count // 5):
                raise kind

        if where == "idle":
            idle = rig.device.idle
            monkeypatch.setattr(rig.device, "idle", lambda idle=idle, interrupt=interrupt: (interrupt(), idle()))
        feed = TroubledFeed(
            rig.x, 16, interrupt if where == "fill" else raise_at(10**6), interrupt if where == "take" else raise_at(99)
        )
        sink = TroubledSink(rig.out, interrupt if where == "drain" else raise_at(10**6))
        with pytest.raises(kind):
            rig.run(feed, sink, interrupt if where == "progress" else lambda chunk: None)
        for ring in (rig.executor.ring_in, rig.executor.ring_out):
            assert sorted(ring._free) == list(range(ring.pieces))
        rig.check_next_run()


def test_executor_second_interrupt_waits_for_what_is_in_flight_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies still use pieces, the caller's arrays and descriptors that are closed when the run is over."""
    rig = Rig(monkeypatch)
    idle, synchronize = rig.device.idle, rig.device.synchronize
    calls = iter(range(10**6))

    def interrupted_idle() -> None:
        if next(calls) == 20:
            raise KeyboardInterrupt
        idle()

    in_flight: list[int] = []

    def interrupted_synchronize() -> None:
        monkeypatch.setattr(rig.device, "synchronize", synchronize)
        in_flight.append(len(rig.device._moments))
        raise KeyboardInterrupt

    monkeypatch.setattr(rig.device, "idle", interrupted_idle)
    monkeypatch.setattr(rig.device, "synchronize", interrupted_synchronize)
    with pytest.raises(KeyboardInterrupt):
        rig.run()
    assert in_flight[0] and not rig.device._moments, "the test wants something in flight"
    rig.check_next_run()


def test_executor_error_while_abandoning_does_not_hide_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, fail={"kernel": 2})

    def lost() -> None:
        raise DeviceError("the device is lost")

    synchronize = rig.device.synchronize
    monkeypatch.setattr(rig.device, "synchronize", lambda: (synchronize(), lost()))
    with pytest.raises(DriverError, match="kernel operation 2"):
        rig.run()


def open_sim(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """`devices="sim"` opens this one."""
    monkeypatch.setattr("pipeline.fleet.open_device", lambda name: device)


@pytest.mark.parametrize("stage", ["H2D", "kernel", "D2H"])
def test_pipeline_runs_again_after_a_device_failure(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch)
    layer, x = layer_of(17, 9), random_rows(200, 17)
    with nothing_left_behind():
        open_sim(monkeypatch, SimDevice(Hardware(jitter=1.0), fail={stage: 3}))
        with Pipeline(layer, devices="sim", chunk_rows=16) as pipeline:
            for source in (x, batches_of(x, [30])):
                pipeline.fleet.stations[0].device._counts[stage] = 0  # type: ignore[attr-defined]
                with pytest.raises(DriverError, match="simulated failure"):
                    pipeline.run(source)
                assert_same_bits(pipeline.run(x).out, layer(x))
                assert_same_bits(pipeline.run(batches_of(x, [30])).out, layer(x))


# -- back-pressure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_executor_never_reads_further_ahead_than_its_slots(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the sink is: rows taken from the source but not landed fit the slots, pieces fit the rings."""
    rig = Rig(monkeypatch, seed=seed, num_streams=1 + seed % 4, pieces=1 + seed % 3, copy_threads=1)
    feed, most = TroubledFeed(rig.x, 16), []
    landed = 0

    def count(chunk: Chunk) -> None:
        nonlocal landed
        landed += chunk.rows

    class CountingSink(TroubledSink):
        def target(self, chunk: Chunk) -> Memory:
            most.append(feed.taken - landed)
            return super().target(chunk)

    monkeypatch.setattr(rig.device, "pinned", counted := CountedPinned(rig.device.pinned))
    rig.executor.ring_in._allocate = rig.executor.ring_out._allocate = counted
    rig.run(feed, CountingSink(rig.out), count)
    assert_same_bits(rig.out, rig.expected)
    assert max(most) <= rig.num_streams * 16
    assert counted.blocks == 2 * rig.pieces


class CountedPinned:
    def __init__(self, allocate: Callable[[int], HostArray]) -> None:
        self._allocate, self.blocks = allocate, 0

    def __call__(self, n_bytes: int) -> HostArray:
        self.blocks += 1
        return self._allocate(n_bytes)


def test_pipeline_reads_an_iterable_only_as_far_ahead_as_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is chunk buffers (streams + 1), slots and the batch in the reader's hands, however long the source."""
    small_rings(monkeypatch)
    layer, x = layer_of(17, 9), random_rows(16, 17)
    pulled = done = 0
    most = []

    def endless() -> Iterator[HostArray]:
        nonlocal pulled
        for _ in range(200):
            most.append(pulled - done)
            pulled += 1
            yield x

    def slow(progress: Any) -> None:
        nonlocal done
        done = progress.rows_done // 16
        time.sleep(0.001)

    with Pipeline(layer, devices="cpu", chunk_rows=16, num_streams=3) as pipeline:
        pipeline.run(endless(), progress=slow)
        assert sum(buffer.nbytes for buffer in pipeline.fleet.gather_buffers) == 4 * x.nbytes
    assert done == 200 and max(most) <= 4 + 3 + 1


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_stream_slow_consumer_holds_the_source_back(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch)
    layer, x = layer_of(17, 9), random_rows(16, 17)
    pulled, most = 0, 0

    def batches() -> Iterator[HostArray]:
        nonlocal pulled
        for _ in range(100):
            pulled += 1
            yield x

    with Pipeline(layer, devices=device, chunk_rows=16, num_streams=2) as pipeline:
        for number, result in enumerate(pipeline.stream(batches())):
            if number % 10 == 0:
                time.sleep(0.01)
            most = max(most, pulled - number)
            assert_same_bits(result, layer(x))
    assert pulled == 100
    assert most <= 2 * 2 + 2, "at most `limit` batches, the consumer's and the reader's"


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_stream_abandoned_iterator_ends_its_threads(device: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch)
    layer, x = layer_of(17, 9), random_rows(100, 17)
    closed = threading.Event()

    def batches() -> Iterator[HostArray]:
        try:
            while True:
                yield x
        finally:
            closed.set()

    with nothing_left_behind():
        with Pipeline(layer, devices=device, chunk_rows=16) as pipeline:
            with nothing_left_behind(copy_workers=False):
                results = pipeline.stream(batches())
                for _ in range(after):
                    assert_same_bits(next(results), layer(x))
                results.close()
                gc.collect()
                assert closed.is_set() or after == 0, "the iterable is kept alive"
            assert_same_bits(pipeline.run(x).out, layer(x))


def test_stream_device_failure_comes_out_while_the_consumer_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader waits for room that will never come: the failure must end it at once, and be what is raised."""
    small_rings(monkeypatch)
    layer, x = layer_of(17, 9), random_rows(16, 17)
    open_sim(monkeypatch, SimDevice(fail={"kernel": 3}))
    with nothing_left_behind():
        with Pipeline(layer, devices="sim", chunk_rows=16, num_streams=2) as pipeline:
            results = pipeline.stream(x for _ in range(100))
            first = next(results)
            assert wait_until(lambda: not any(t.name == "pipeline-stream" for t in threading.enumerate()), 3.0)
            rest = []
            with pytest.raises(DriverError, match="kernel operation 3"):
                for result in results:
                    rest.append(result)  # noqa: PERF402
            for result in (first, *rest):
                assert_same_bits(result, layer(x))
            assert len(rest) <= 2
            assert_same_bits(pipeline.run(x).out, layer(x))


# -- a stateful model --------------------------------------------------------------------------------------------------


class SteppedSim(WatchedSim):
    """Hands control to the test at every idle step: the executor runs in its thread only while the test waits."""

    def __init__(self, seed: int) -> None:
        super().__init__(Hardware(jitter=2.0, copy_threads=2), seed=seed)
        self.go, self.turn = threading.Semaphore(0), threading.Semaphore(0)
        self.free_running = False

    def idle(self) -> None:
        if not self.free_running:
            self.turn.release()
            self.go.acquire()
        if self._moments:
            super().idle()


class QueueFeed(Feed):
    """Chunks as the model pushes them."""

    def __init__(self) -> None:
        self.chunks: deque[Chunk] = deque()
        self.closed = False
        self.error: Exception | None = None

    def take(self) -> Chunk | None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.chunks.popleft() if self.chunks else None

    @property
    def exhausted(self) -> bool:
        return self.closed and not self.chunks and self.error is None

    def stop(self) -> None:
        self.closed = True


class ExecutorMachine(RuleBasedStateMachine):
    """Model: the rows pushed so far and their results. Rules push chunks, let time pass, and break things."""

    CHUNK, STREAMS, PIECES, ROWS = 12, 3, 2, 12 * 60

    @initialize(seed=st.integers(0, 2**16), piece_rows=st.integers(1, 14))
    def start(self, seed: int, piece_rows: int) -> None:
        self.layer = layer_of(17, 9)
        self.device = SteppedSim(seed)
        self.device.prepare(self.layer, self.layer.dtype, self.CHUNK)
        self.device.allocate(self.CHUNK, self.STREAMS)
        patch = pytest.MonkeyPatch()
        small_rings(patch, piece_rows * 17 * 4, self.PIECES)
        workers = self.device.workers()
        assert workers is not None
        self.executor = Executor(self.device, workers, self.layer, self.layer.dtype, self.STREAMS)
        patch.undo()
        self.x = random_rows(self.ROWS, 17, seed=seed)
        self.expected = self.layer(self.x)
        self.out = poisoned(self.expected.shape)
        self.feed, self.stopping = QueueFeed(), threading.Event()
        self.read_error: set[int] = set()
        self.write_error: set[int] = set()
        self.sink = TroubledSink(self.out, self._write, self._commit)
        self.committed: list[int] = []
        self.planned: list[str] = []  # what was broken on purpose
        self.pushed, self.row = 0, 0
        self.error: BaseException | None = None
        self.ended = False
        self.thread = threading.Thread(target=self._run, name="executor")
        self.thread.start()
        self.device.turn.acquire()

    def _run(self) -> None:
        try:
            self.executor.run(self.feed, self.sink, Recorder("sim"), lambda chunk: None, self.stopping)
        except BaseException as error:
            self.error = error
        self.ended = True
        self.device.turn.release()

    def _write(self, row: int) -> None:
        if row // self.CHUNK in self.write_error:
            raise PlannedError("write")

    def _commit(self, chunk: Chunk) -> None:
        self.committed.append(chunk.row)

    def _step(self) -> None:
        if not self.ended:
            self.device.go.release()
            self.device.turn.acquire()

    @precondition(lambda self: self.pushed < 60)
    @rule(rows=st.integers(1, CHUNK), pinned=st.booleans(), broken=st.sampled_from([None] * 20 + ["read", "write"]))
    def push(self, rows: int, pinned: bool, broken: str | None) -> None:
        """The source has another chunk; chunks lie on a grid of CHUNK rows, so that each has its own place."""
        row = self.pushed * self.CHUNK
        x = self.x[row : row + rows]

        def trouble(_: int) -> None:
            if broken == "read":
                raise PlannedError("read")

        if broken == "write":
            self.write_error.add(self.pushed)
        if broken:
            self.planned.append(broken)
        if pinned and broken != "read":
            source: Any = ArrayRows(self.device.pin(x.copy()))
        else:
            source = Memory(x.copy(), trouble)
        self.feed.chunks.append(Chunk(self.pushed, row, rows, source))
        self.pushed += 1

    @rule(steps=st.integers(1, 40))
    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    @rule(stage=st.sampled_from(["H2D", "kernel", "D2H"]), roll=st.integers(0, 9))
    def break_device(self, stage: str, roll: int) -> None:
        if roll == 0:
            self.device._fail[stage] = self.device._counts[stage]
            self.planned.append(stage)

    @rule(roll=st.integers(0, 9))
    def break_source(self, roll: int) -> None:
        if roll == 0:
            self.feed.error = PlannedError("source")
            self.planned.append("source")

    @rule(roll=st.integers(0, 19))
    def stop(self, roll: int) -> None:
        if roll == 0:
            self.stopping.set()
            self.planned.append("stop")

    @invariant()
    def committed_rows_are_right(self) -> None:
        if not hasattr(self, "committed"):
            return
        assert self.committed == sorted(set(self.committed)), "chunks are committed in order, each once"
        for row in self.committed:
            rows = slice(row, row + int(np.argmax(np.isnan([*self.out[row : row + self.CHUNK, 0], np.nan]))))
            assert rows.stop > row
            assert_same_bits(self.out[rows], self.expected[rows])

    @invariant()
    def pieces_and_slots_are_conserved(self) -> None:
        if not hasattr(self, "committed") or self.ended:
            return
        executor = self.executor
        used_in = [step.piece for lane in (executor._filling, executor._uploading) for step in lane]
        used_out = [step.piece for lane in (executor._downloading, executor._draining) for step in lane]
        for ring, used in ((executor.ring_in, used_in), (executor.ring_out, used_out)):
            assert sorted([*ring._free, *(piece for piece in used if piece is not None)]) == list(range(ring.pieces))
        slots = [flight.slot for flight in executor._flights]
        assert sorted([*executor._free_slots, *slots]) == list(range(self.STREAMS))

    def teardown(self) -> None:
        if not hasattr(self, "thread"):
            return
        self.feed.closed = True
        self.device.free_running = True
        self.device.go.release()
        self.thread.join(30)
        assert not self.thread.is_alive(), "the executor hangs"
        if self.error is None:
            taken = self.pushed - len(self.feed.chunks)
            assert len(self.committed) == taken
            assert taken == self.pushed or self.stopping.is_set()
        else:
            assert isinstance(self.error, (PlannedError, DriverError))
            assert self.planned and self.error.__notes__[0].startswith("pipeline: in ")
        self.committed_rows_are_right()
        for ring in (self.executor.ring_in, self.executor.ring_out):
            assert sorted(ring._free) == list(range(ring.pieces))
        self.device._fail.clear()
        out = poisoned((100, 9))
        feed = TroubledFeed(self.x[:100], self.CHUNK)
        self.executor.run(feed, TroubledSink(out), Recorder("sim"), lambda chunk: None, threading.Event())
        assert_same_bits(out, self.expected[:100])


TestExecutorModel = ExecutorMachine.TestCase
TestExecutorModel.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


def test_executor_module_has_no_clock_of_its_own() -> None:
    """All times come from the device and its workers, so that a simulated run takes no real time for waiting."""
    assert not hasattr(executor_module, "time")


@pytest.mark.parametrize("outcome", ["success", "failure", "interrupt"])
def test_executor_keeps_nothing_of_the_callers_after_a_run(outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    trouble = {
        "success": lambda row: None,
        "failure": raise_at(70),
        "interrupt": raise_at(70, KeyboardInterrupt),
    }[outcome]
    feed, sink = TroubledFeed(rig.x, 16, trouble), TroubledSink(rig.out)
    gone = [weakref.ref(feed), weakref.ref(sink)]
    try:
        rig.run(feed, sink)
    except (PlannedError, KeyboardInterrupt):
        assert outcome != "success"
    del feed, sink, trouble
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
