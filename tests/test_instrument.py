"""The event record and the NVTX ranges."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from helpers.data import random_layer, random_rows
from helpers.leaks import small_rings
from hypothesis import given
from hypothesis import strategies as st

from pipeline import Pipeline
from pipeline.instrument import RUN, STAGES, Ranges, Recorder
from pipeline.report.stages import stage_stats

# Whole seconds, so that sums are exact.
spans = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda s: (float(s[0]), float(s[0] + s[1]))), max_size=20
)


def seconds_covered(spans: list[tuple[float, float]]) -> int:
    """The seconds that lie in a span, counted one by one."""
    return sum(any(a <= s and s + 1 <= b for a, b in spans) for s in range(80))


@given(spans)
def test_recorder_busy_counts_overlapping_operations_once(a: list[tuple[float, float]]) -> None:
    recorder = Recorder("sim")
    for number, (start, end) in enumerate(sorted(a)):
        recorder.add("H2D", number, start, end, 10)
    totals = recorder.totals["H2D"]
    assert totals.count == len(a) and totals.bytes == 10 * len(a)
    assert totals.busy_s == seconds_covered(a)


def test_recorder_memory_stays_flat_and_totals_stay_whole() -> None:
    recorder = Recorder("sim", keep=100)
    for number in range(1000):
        recorder.add("drain", number, number, number + 0.5, 8)
    assert len(recorder.intervals) == 100 and recorder.intervals[-1].chunk == 999 and recorder.dropped == 900
    assert recorder.totals["drain"].count == 1000 and recorder.totals["drain"].bytes == 8000
    assert recorder.totals["drain"].busy_s == 500.0


def test_report_adds_devices_up() -> None:
    recorders = [Recorder("a"), Recorder("b")]
    for recorder, seconds in zip(recorders, (1.0, 3.0), strict=True):
        recorder.add("H2D", 0, 0.0, seconds, 100)
        recorder.add("kernel", 0, 0.0, 0.5)
    stages = stage_stats(recorders, 4.0)
    assert stages["H2D"].count == 2 and stages["H2D"].bytes == 200 and stages["H2D"].busy_s == 4.0
    assert stages["H2D"].busy_share == 0.5 and stages["H2D"].waiting_s == 4.0
    assert stage_stats(recorders, 3.0)["H2D"].busy_share == pytest.approx(2 / 3)
    assert stage_stats([Recorder("a")], 0.0)["H2D"].busy_share == 0.0


def test_recorder_costs_under_two_percent_of_a_fast_run() -> None:
    """At 1,000 chunks a second, each of five operations, of the thread that moves them."""
    best_s = float("inf")
    for _ in range(5):
        recorder = Recorder("sim", keep=5_000)
        start = time.perf_counter()
        for chunk in range(1000):
            for stage in STAGES:
                recorder.add(stage, chunk, chunk + 0.1, chunk + 0.9, 8)
        best_s = min(best_s, time.perf_counter() - start)
    assert best_s < 0.02, f"{best_s * 1e3:.1f} ms a second"


# -- NVTX --------------------------------------------------------------------------------------------------------------


class FakeDomain:
    """Stands for the domain that nvtx hands out under a profiler."""

    def __init__(self) -> None:
        self.ranges: list[dict[str, Any]] = []
        self.open = 0

    def get_event_attributes(self, **attributes: Any) -> dict[str, Any]:
        return attributes

    def push_range(self, attributes: dict[str, Any]) -> None:
        self.open += 1
        self.ranges.append(attributes)

    def pop_range(self) -> None:
        self.open -= 1

    def start_range(self, attributes: dict[str, Any]) -> int:
        self.push_range(attributes)
        return len(self.ranges)

    def end_range(self, begun: int) -> None:
        assert 0 < begun <= len(self.ranges)
        self.pop_range()


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> FakeDomain:
    import nvtx

    fake, names = FakeDomain(), []
    monkeypatch.setattr(nvtx, "get_domain", lambda name: names.append(name) or fake)
    Ranges()
    assert names == ["pipeline"]
    return fake


def test_ranges_carry_stage_and_chunk(domain: FakeDomain) -> None:
    ranges = Ranges()
    assert ranges.active
    with ranges("fill", 7):
        assert domain.open == 1
    with pytest.raises(ZeroDivisionError), ranges("kernel", 8):
        raise ZeroDivisionError
    assert domain.open == 0, "a range ends where its work fails, too"
    assert [(r["message"], r["category"], r["payload"]) for r in domain.ranges] == [
        ("fill", "fill", 7),
        ("kernel", "kernel", 8),
    ]
    assert all(isinstance(r["color"], int) for r in domain.ranges)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_ranges_of_a_run_name_every_stage_of_every_chunk(
    device: str, domain: FakeDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_rings(monkeypatch, 300)
    layer, x = random_layer(16, 8), np.asfortranarray(random_rows(100, 16))
    out = np.asfortranarray(np.zeros((100, 8), np.float32))
    with Pipeline(layer, devices=device, chunk_rows=16) as pipeline:
        stats = pipeline.run(x, out).stats
    runs = [r for r in domain.ranges if r["message"] == RUN]
    operations = [r for r in domain.ranges if r["message"] != RUN]
    seen = {(r["message"], r["payload"]) for r in operations}
    assert seen == {(stage, chunk) for stage in STAGES for chunk in range(7)}
    assert len(operations) == sum(stage.count for stage in stats.stages.values())
    assert len(runs) == 1 and domain.ranges[0] is runs[0], "one range around the whole run"
    assert domain.open == 0


def test_ranges_cost_nothing_without_a_profiler() -> None:
    ranges = Ranges()
    assert not ranges.active
    assert ranges("fill", 1) is ranges("drain", 2), "one shared object, nothing is made"
    best_s = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for chunk in range(10_000):
            with ranges("kernel", chunk):
                pass
        best_s = min(best_s, (time.perf_counter() - start) / 10_000)
    assert best_s < 5e-6, "a piece of 8 MiB takes 160 us on the bus"
