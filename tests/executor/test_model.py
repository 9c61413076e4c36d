"""A stateful model of the executor on the simulated device."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits, poisoned, random_rows
from helpers.executor_rig import Memory, TroubledFeed, TroubledSink
from helpers.leaks import PlannedError, small_rings
from helpers.schedules import WatchedSim, check_pieces, layer_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.config import Staging
from pipeline.devices.sim import Hardware
from pipeline.errors import DriverError
from pipeline.executor import Executor
from pipeline.flow import Chunk, Feed, Sink
from pipeline.instrument import Recorder
from pipeline.io.memory import ArrayRows
from pipeline.staging.movers import Movers, Wire


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
        if self.busy:
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
        dtype = self.layer.dtype
        self.movers = Movers(self.device, workers, Wire(17, 9, dtype, dtype), Staging.chosen())
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
        self.executor = self._executor(self.feed, self.sink, self.stopping)
        self.thread = threading.Thread(target=self._run, name="executor")
        self.thread.start()
        self.device.turn.acquire()

    def _executor(self, feed: Feed, sink: Sink, stopping: threading.Event) -> Executor:
        arguments = self.STREAMS, feed, sink, Recorder("sim"), lambda chunk: None, stopping
        return Executor(self.device, self.movers, *arguments)

    def _run(self) -> None:
        try:
            self.executor.run()
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
        executor, movers = self.executor, self.movers
        if movers.in_use:
            python = movers.for_load(Memory(self.x))  # rows that nothing else can read
            rings = movers.rings["Python"]
            for ring, way in ((rings.load, python._loads), (rings.store, python._stores)):  # type: ignore[attr-defined]
                used = [piece.number for piece in (*way._first, *way._second)]
                assert sorted([*ring.free_pieces, *used]) == list(range(ring.pieces))
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
        check_pieces(self.movers)
        self.device._fail.clear()
        out = poisoned((100, 9))
        feed = TroubledFeed(self.x[:100], self.CHUNK)
        self._executor(feed, TroubledSink(out), threading.Event()).run()
        assert_same_bits(out, self.expected[:100])


TestExecutorModel = ExecutorMachine.TestCase
TestExecutorModel.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
