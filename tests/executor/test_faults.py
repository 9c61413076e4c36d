"""Planted faults: scheduling bugs put in on purpose, which the schedules' checks must notice.

Some are planted in the executor, the source or the sink, and must be noticed whichever mover carries the rows; some in
what the mover in Python calls. Faults of the mover in C are in tests/staging/test_mover_faults.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from helpers.schedules import GROUNDS, SIM, Case, Ground, Schedule, layer_of

from pipeline.arrays import HostArray, address_of
from pipeline.dtypes import FLOAT32
from pipeline.flow import Chunk
from pipeline.io.memory import ArrayRows
from pipeline.rows import Drain, Fill, Job, Operation
from pipeline.staging.ring import Ring

FAULT_SEEDS, DRIVER_SEEDS = 25, 6

Plant = Callable[[pytest.MonkeyPatch, Schedule], None]


class Eager:
    """An operation or a transfer that says it is done before it is."""

    def __init__(self, operation: Any) -> None:
        self._operation = operation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operation, name)

    def done(self) -> bool:
        return True

    def times(self) -> tuple[float, float]:
        return self._operation.start_s, self._operation.end_s

    def record(self, recorder: Any) -> None:
        pass

    end_s = 0.0


# -- in what the mover in Python calls ---------------------------------------------------------------------------------


def eager(name: str) -> Plant:
    """Whatever `name` of the device queues says at once that it is done."""

    def plant(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
        queue = getattr(schedule.device, name)
        monkeypatch.setattr(schedule.device, name, lambda *arguments: Eager(queue(*arguments)))

    return plant


def eager_jobs(kind: type[Job]) -> Plant:
    """The copy workers' jobs of one kind say at once that they are done."""

    def plant(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
        submit = schedule.workers.submit

        def wrong(job: Job) -> Operation:
            operation: Any = submit(job)
            return Eager(operation) if isinstance(job, kind) else operation

        monkeypatch.setattr(schedule.workers, "submit", wrong)

    return plant


def give_back_early(monkeypatch: pytest.MonkeyPatch, ring: Ring) -> Callable[[HostArray], None]:
    """Takes a piece's rows and gives the piece back; the mover's own giving back does nothing then."""
    give_back, early = ring.give_back, []

    def once(piece: int) -> None:
        if piece in early:
            early.remove(piece)
        else:
            give_back(piece)

    def now(rows: HostArray) -> None:
        pieces = range(ring.pieces)
        early.append(next(n for n in pieces if address_of(ring.rows(n, 1)) == address_of(rows)))
        give_back(early[-1])

    monkeypatch.setattr(ring, "give_back", once)
    return now


def piece_back_when_upload_is_queued(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    give_back = give_back_early(monkeypatch, schedule.movers.rings["Python"].load)
    upload = schedule.device.upload

    def wrong(slot: int, first: int, rows: HostArray) -> Operation:
        operation = upload(slot, first, rows)
        give_back(rows)
        return operation

    monkeypatch.setattr(schedule.device, "upload", wrong)


def piece_back_unpoisoned_when_upload_is_queued(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    """The same without poison: only the next fill of the piece shows it."""
    schedule.movers.rings["Python"].load.poison = False
    piece_back_when_upload_is_queued(monkeypatch, schedule)


def piece_back_when_drain_is_submitted(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    give_back = give_back_early(monkeypatch, schedule.movers.rings["Python"].store)
    submit = schedule.workers.submit

    def wrong(job: Job) -> Operation:
        if isinstance(job, Drain):
            give_back(job.piece)
        return submit(job)

    monkeypatch.setattr(schedule.workers, "submit", wrong)


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


def piece_forgotten(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    monkeypatch.setattr(schedule.movers.rings["Python"].load, "give_back", lambda piece: None)


def chunk_buffer_back_when_upload_is_queued(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    upload, take = schedule.device.upload, schedule.feed.take
    releases: list[Callable[[], None]] = []

    def wrong_take() -> Chunk | None:
        chunk = take()
        if chunk is not None and chunk.release is not None:
            releases.append(chunk.release)
            chunk.release = lambda: None
        return chunk

    def wrong_upload(slot: int, first: int, rows: HostArray) -> Operation:
        operation = upload(slot, first, rows)
        releases.pop(0)()
        return operation

    monkeypatch.setattr(schedule.feed, "take", wrong_take)
    monkeypatch.setattr(schedule.device, "upload", wrong_upload)


# -- in the executor, the source or the sink ---------------------------------------------------------------------------


def transfers_changed(choose: str, begin: str, change: Callable[[Any], Any]) -> Plant:
    """What a mover gives back for a chunk is changed: `choose` is the method that finds the mover."""

    def plant(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
        choose_mover = getattr(schedule.movers, choose)

        class Wrong:
            def __init__(self, mover: Any) -> None:
                self._begin = getattr(mover, begin)

            def __getattr__(self, name: str) -> Any:
                return lambda *arguments: change(self._begin(*arguments))

        monkeypatch.setattr(schedule.movers, choose, lambda rows: Wrong(choose_mover(rows)))

    return plant


class QueuedAtOnce(Eager):
    """A load that lets its kernel follow at once."""

    def queued(self) -> bool:
        return True

    def done(self) -> bool:
        return bool(self._operation.done())

    def record(self, recorder: Any) -> None:
        self._operation.record(recorder)


def slot_back_before_its_downloads(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    """The next chunk takes the slot as soon as the kernel is queued, on a device that trusts the executor."""
    executor, device = schedule.executor, schedule.device
    compute = executor._compute

    def wrong(flight: Any) -> None:
        compute(flight)
        executor._free_slots.append(flight.slot)
        if schedule.ground is SIM:
            device._slot_free_at_s[flight.slot] = 0.0

    monkeypatch.setattr(executor, "_compute", wrong)


def target_rows_shifted(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    limit = len(schedule.out)

    def wrong(chunk: Chunk) -> ArrayRows:
        row = min(chunk.row + 1, limit - chunk.rows)
        return ArrayRows(schedule.out[row : row + chunk.rows])

    monkeypatch.setattr(schedule.sink, "target", wrong)


def source_rows_shifted(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    x, take = schedule.x, schedule.feed.take

    def wrong() -> Chunk | None:
        chunk = take()
        if chunk is not None:
            row = min(chunk.row + 1, len(x) - chunk.rows)
            chunk.source = ArrayRows(x[row : row + chunk.rows])
        return chunk

    monkeypatch.setattr(schedule.feed, "take", wrong)


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

    def wrong(chunk: Chunk) -> Any:
        if chunk.index in (1, 2):
            chunk = Chunk(chunk.index, n * (3 - chunk.index), chunk.rows, chunk.source)
        return target(chunk)

    monkeypatch.setattr(schedule.sink, "target", wrong)


def committed_early(monkeypatch: pytest.MonkeyPatch, schedule: Schedule) -> None:
    """A chunk is committed when its store has begun."""
    executor = schedule.executor
    compute = executor._compute

    def wrong(flight: Any) -> None:
        compute(flight)
        schedule.sink.commit(flight.chunk)

    monkeypatch.setattr(executor, "_compute", wrong)


FAULTS: dict[str, Plant] = {  # whichever mover carries the rows
    "kernel before its load": transfers_changed("for_load", "load", QueuedAtOnce),
    "slot reused before its store": slot_back_before_its_downloads,
    "store over when it has begun": transfers_changed("for_store", "store", Eager),
    "wrong row offset in the sink": target_rows_shifted,
    "wrong row offset in the source": source_rows_shifted,
    "a chunk lost in the feed": chunk_never_handed_out,
    "a chunk lost in flight": chunk_forgotten_in_flight,
    "two chunks swapped in the source": chunks_swapped,
    "two chunks swapped in the sink": targets_swapped,
    "a chunk committed before it has landed": committed_early,
}
PYTHON_FAULTS: dict[str, Plant] = {
    "drain before its event": eager("download"),
    "drain's own event ignored": eager_jobs(Drain),
    "upload before the fill's event": eager_jobs(Fill),
    "piece reused before its H2D event": eager("upload"),
    "piece reused when its H2D is queued": piece_back_when_upload_is_queued,
    "piece reused when its H2D is queued, no poison": piece_back_unpoisoned_when_upload_is_queued,
    "piece reused before its drain": piece_back_when_drain_is_submitted,
    "chunk buffer reused before its H2D event": chunk_buffer_back_when_upload_is_queued,
    "wrong row offset of one H2D": piece_rows_shifted("upload"),
    "wrong row offset of one D2H": piece_rows_shifted("download"),
    "a piece lost": piece_forgotten,
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


@pytest.mark.parametrize("ground", ["native mover", "Python mover"])
def test_executor_control_without_a_fault_passes_with_a_driver(ground: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(DRIVER_SEEDS):
        with closing(Schedule(fault_case(seed), monkeypatch, GROUNDS[ground])) as schedule:
            schedule.run()


def caught(name: str, plant: Plant, seeds: int, monkeypatch: pytest.MonkeyPatch, ground: Ground = SIM) -> Iterator[str]:
    """What the schedules that notice a planted fault say."""
    for seed in range(seeds):
        with monkeypatch.context() as patch, closing(Schedule(fault_case(seed, name), patch, ground)) as schedule:
            plant(patch, schedule)
            try:
                schedule.run()
            except Exception as error:
                yield f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", [*FAULTS, *PYTHON_FAULTS])
def test_executor_planted_fault_is_caught(
    name: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    plant = FAULTS.get(name) or PYTHON_FAULTS[name]
    said = list(caught(name, plant, FAULT_SEEDS, monkeypatch))
    record_property("caught", f"{len(said)}/{FAULT_SEEDS}")
    # Not each schedule shows each fault: a drain on slow workers reads its piece long after the D2H copy, for example.
    assert len(said) > FAULT_SEEDS / 2


@pytest.mark.parametrize("ground", ["native mover", "Python mover"])
@pytest.mark.parametrize("name", FAULTS)
def test_executor_planted_fault_is_caught_with_a_driver(
    name: str, ground: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    said = list(caught(name, FAULTS[name], DRIVER_SEEDS, monkeypatch, GROUNDS[ground]))
    record_property("caught", f"{len(said)}/{DRIVER_SEEDS}")
    assert said
