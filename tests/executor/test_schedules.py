"""Seeded schedules through the executor, on the simulated device and with both movers on the fake driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.data import assert_same_bits, poisoned
from helpers.schedules import GROUNDS, Case, CheckingSink, Ground, Schedule, WatchedSim, check_rest

from pipeline.arrays import HostArray
from pipeline.dtypes import FLOAT32
from pipeline.flow import Chunk, RangeFeed
from pipeline.rows import HOST, DeviceRows

SCHEDULES, BATCHES = 2_000, 8
DRIVER_SCHEDULES = 60


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


@pytest.mark.parametrize("name", ["native mover", "Python mover"])
def test_executor_schedules_are_right_with_a_driver(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In real time and with threads of its own, which take their turns as they come."""
    for seed in range(DRIVER_SCHEDULES):
        schedule = Schedule(Case(seed), monkeypatch, GROUNDS[name])
        try:
            schedule.run()
        except BaseException as error:
            error.add_note(f"in the schedule of seed {seed}")
            raise
        finally:
            schedule.close()


def device_rows(array: HostArray) -> DeviceRows:
    return DeviceRows(HOST, array.ctypes.data, array.strides[0] // 4, len(array), array)


class DeviceSink(CheckingSink):
    """An output in device memory."""

    def target(self, chunk: Chunk) -> Any:
        return device_rows(self._array).part(chunk.row, chunk.rows, 4)


@pytest.mark.parametrize("side", ["source", "target", "both"])
def test_executor_uses_rows_in_device_memory_without_copies(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(100):
        case = Case(seed, source="pageable", sink="pageable")
        case.wire = FLOAT32
        schedule = Schedule(case, monkeypatch, Ground(lambda case: WatchedSim(case.hardware, seed=case.seed)))
        if side != "target":
            x = poisoned((case.rows, case.layer.in_features + 3))[:, 1:-2]
            x[...] = schedule.x
            whole = device_rows(x)
            schedule.feed = RangeFeed(case.rows, case.chunk_rows, lambda row, n, whole=whole: whole.part(row, n, 4))
        if side != "source":
            schedule.out = poisoned((case.rows, case.layer.out_features + 2))[:, 1:-1]
            schedule.sink = DeviceSink(schedule.out, schedule.expected)
        schedule.executor.run()
        assert_same_bits(schedule.out, schedule.expected)
        check_rest(schedule.executor, schedule.movers)
        sink, totals = schedule.sink, schedule.recorder.totals
        assert totals["fill"].count == totals["H2D"].count == 0 or side == "target"
        assert totals["D2H"].count == totals["drain"].count == 0 or side == "source"
        assert len(sink.committed) == totals["kernel"].count == -(-case.rows // case.chunk_rows)


def test_executor_same_seed_gives_the_same_events(monkeypatch: pytest.MonkeyPatch) -> None:
    def events() -> list[Any]:
        schedule = Schedule(Case(5, source="gather", many_chunks=True), monkeypatch)
        schedule.run()
        return list(schedule.recorder.intervals)

    assert events() == events()
