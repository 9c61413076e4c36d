"""Timelines: windows, what lanes wait for, and how the same record is read on hardware with one slow part."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers.data import random_layer, random_rows
from helpers.leaks import small_rings
from hypothesis import given
from hypothesis import strategies as st

from pipeline import Pipeline
from pipeline.devices.sim import Hardware, SimDevice
from pipeline.instrument import STAGES, Interval, Recorder
from pipeline.report.timeline import Timeline, busy_s, device_use, from_recorders, lanes_of, steady_window, use_lines

# Whole seconds, so that sums are exact.
operations = st.lists(
    st.builds(
        lambda stage, chunk, start, length: Interval(stage, chunk, float(start), float(start + length), 10),
        st.sampled_from(STAGES),
        st.integers(0, 9),
        st.integers(0, 60),
        st.integers(1, 12),
    ),
    min_size=1,
    max_size=30,
)


def seconds_of(spans: list[tuple[float, float]]) -> set[int]:
    return {second for start, end in spans for second in range(int(start), int(end))}


@given(operations)
def test_use_accounts_for_every_second_of_the_window(given_operations: list[Interval]) -> None:
    window = (10.0, 50.0)
    use = device_use(given_operations, window)
    for stage, lane in use.lanes.items():
        mine = seconds_of([i[2:4] for i in given_operations if i.stage == stage]) & set(range(10, 50))
        assert lane.busy_s == len(mine) and lane.waiting_s == 40 - len(mine)
        assert sum(lane.waiting_for.values()) == pytest.approx(lane.waiting_s)
        assert lane.busy_share + lane.waiting_s / 40 == pytest.approx(1)
    everyone = set().union(*(seconds_of([i[2:4]]) for i in given_operations)) & set(range(10, 50))
    for lane in use.lanes.values():
        assert lane.waiting_for.get("host", 0) == 40 - len(everyone)


@given(operations)
def test_busy_counts_each_second_once(given_operations: list[Interval]) -> None:
    for stage in STAGES:
        mine = [i[2:4] for i in given_operations if i.stage == stage]
        assert busy_s(given_operations, stage) == len(seconds_of(mine))


@given(operations)
def test_use_hidden_shares_are_those_of_the_seconds(given_operations: list[Interval]) -> None:
    use = device_use(given_operations, (0.0, 80.0))
    kernel = seconds_of([i[2:4] for i in given_operations if i.stage == "kernel"])
    copies = seconds_of([i[2:4] for i in given_operations if i.stage in ("H2D", "D2H")])
    for share, ours, theirs in (
        (use.kernel_hidden_share, kernel, copies),
        (use.copy_hidden_share, copies, kernel),
    ):
        assert share == (pytest.approx(len(ours & theirs) / len(ours)) if ours else None)


@given(operations)
def test_lanes_of_a_stage_never_overlap(given_operations: list[Interval]) -> None:
    for stage in STAGES:
        rows = lanes_of(given_operations, stage)
        assert sorted(i for row in rows for i in row) == sorted(i for i in given_operations if i.stage == stage)
        assert all(a.end_s <= b.start_s for row in rows for a, b in pairwise(row))


def test_steady_window_runs_from_the_first_result_to_the_last_input() -> None:
    some = [Interval("H2D", n, n, n + 1.0, 1) for n in range(10)] + [
        Interval("D2H", n, n + 2.0, n + 3.0, 1) for n in range(10)
    ]
    assert steady_window(some) == (2.0, 10.0)
    short = [Interval("H2D", 0, 0.0, 1.0, 1), Interval("D2H", 0, 2.0, 3.0, 1)]
    assert steady_window(short) == (0.0, 3.0), "too short for one: everything"
    assert device_use([]).lanes["H2D"].count == 0


def test_waiting_is_put_down_to_the_busiest_lane_at_work() -> None:
    some = [
        Interval("fill", 0, 0.0, 9.0, 1),
        Interval("H2D", 0, 0.0, 3.0, 1),
        Interval("kernel", 0, 8.0, 10.0, 1),
    ]
    use = device_use(some, (0.0, 12.0))
    assert use.lanes["D2H"].waiting_for == {"fill": 9.0, "kernel": 1.0, "host": 2.0}
    assert use.lanes["kernel"].waiting_for == {"fill": 8.0, "host": 2.0}
    assert use.lanes["kernel"].longest_wait_s == 8.0


def test_times_count_from_the_start_of_the_run() -> None:
    recorder = Recorder("sim", keep=2)
    for number in range(3):
        recorder.add("drain", number, 100.0 + number, 101.0 + number, 8)
    timeline = from_recorders([recorder], 100.0, {"sim": "a machine"})
    assert [i.start_s for i in timeline.devices["sim"]] == [1.0, 2.0] and timeline.dropped == 1
    text = "\n".join(use_lines(timeline))
    assert "sim (a machine): 2 chunks" in text and "the earliest 1 operations were not kept" in text
    assert use_lines(Timeline({"cpu": []})) == ["cpu: no operations in the event record"]


SLOW = {
    "fill": Hardware(copy_rate=3e9, copy_threads=2),
    "bus": Hardware(h2d_rate=1e6, d2h_rate=1e6),
    "kernel": Hardware(flop_rate=2e7),
}


@pytest.mark.parametrize("cause", SLOW)
def test_run_on_hardware_with_one_slow_part_waits_for_it(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch, 1024)
    monkeypatch.setattr("pipeline.fleet.open_device", lambda _: SimDevice(SLOW[cause]))
    layer, x = random_layer(16, 16), np.asfortranarray(random_rows(4000, 16))
    with Pipeline(layer, devices="sim", chunk_rows=16) as pipeline:
        stats = pipeline.run(x, np.asfortranarray(np.zeros((4000, 16), np.float32))).stats
    waiting = {name: stage for name, stage in stats.stages.items() if stage.waiting_s > 0.2 * stats.seconds}
    assert len(waiting) >= 2
    for stage in waiting.values():
        first = max(stage.waiting_for, key=lambda name: stage.waiting_for[name])
        assert first in ({"fill", "drain"} if cause == "fill" else {cause}), str(stats)
        assert sum(stage.waiting_for.values()) == pytest.approx(1)
