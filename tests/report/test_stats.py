"""Reports: ceilings, the bound's sentence, advice, and progress against the ceiling."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import poisoned, random_layer, random_rows
from helpers.leaks import small_rings
from helpers.pipelines import X, open_pipeline

from pipeline import Pipeline, Progress, run_pipelined
from pipeline.config import MIB, Staging
from pipeline.devices.sim import Hardware, SimDevice
from pipeline.instrument import STAGES, Ceilings, Recorder
from pipeline.report.record import Ends, Parts, Record, Setup
from pipeline.report.stages import stage_stats
from pipeline.report.stats import ceiling_rows_per_s, stats_of


def test_stats_compare_with_the_ceilings_of_all_devices() -> None:
    recorders = [Recorder("a"), Recorder("b")]
    for recorder in recorders:
        recorder.add("H2D", 0, 0.0, 1.0, 4 * 10**9)
        recorder.add("kernel", 0, 0.0, 0.5)
    ceilings = {"a": Ceilings(5.0, 5.0, kernel_tflops=3.0), "b": Ceilings(3.0, 3.0)}
    found = stage_stats(recorders, 2.0, (), ceilings, flop=2e12)
    assert (found["H2D"].rate, found["H2D"].ceiling, found["H2D"].ceiling_share) == (4.0, 8.0, 0.5)
    assert (found["kernel"].rate, found["kernel"].ceiling) == (1.0, None), "one of them has none"
    assert found["D2H"].ceiling_share is None, "it did nothing"
    assert stage_stats(recorders, 2.0)["H2D"].ceiling is None


@pytest.mark.parametrize("slow_s", [0.0, 0.3])
def test_seconds_of_a_run_hold_what_completing_its_result_took(
    slow_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    monkeypatch.setattr("os.fsync", lambda fd: (time.sleep(slow_s), fsync(fd)))
    start = time.perf_counter()
    stats = run_pipelined(random_layer(24, 16), random_rows(300, 24), tmp_path / "y.npy", devices="cpu").stats
    assert slow_s <= stats.finish_s <= stats.seconds <= time.perf_counter() - start
    assert stats.rows_per_s == pytest.approx(300 / stats.seconds)
    if slow_s:
        assert stats.bound == "disk" and "bound by disk" in str(stats) and "after the last row" in str(stats)
        assert f"finishing {stats.finish_s:.3f} s" in str(stats)


def test_files_are_not_compared_with_the_ceilings_of_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", random_rows(300, 24))
    with Pipeline(random_layer(24, 16), devices="cpu") as pipeline:
        pipeline.ceilings["cpu"] = Ceilings(1.0, 1.0, 1.0, 1.0)
        stages = pipeline.run(tmp_path / "x.npy", tmp_path / "y.npy").stats.stages
        of_memory = pipeline.run(np.asfortranarray(random_rows(300, 24)), np.empty((300, 16), np.float32)).stats.stages
    assert stages["fill"].ceiling is stages["drain"].ceiling is None and stages["H2D"].ceiling == 1.0
    assert of_memory["fill"].ceiling == 1.0


def test_ceiling_in_rows_is_that_of_the_slowest_part() -> None:
    devices = {"a": Ceilings(4.0, 8.0), "b": Ceilings(4.0, 8.0, kernel_tflops=1e-3)}
    assert ceiling_rows_per_s(devices, ["a"], 4, 4, 10) == 1e9
    assert ceiling_rows_per_s(devices, ["a", "b"], 4, 4, 10) == 1.1e9
    assert ceiling_rows_per_s(devices, ["a", "c"], 4, 4, 10) is None
    assert ceiling_rows_per_s({"a": Ceilings()}, ["a"], 4, 4, 10) is None


def test_run_reports_ceilings_progress_and_everything_as_json() -> None:
    seen: list[Progress] = []
    with Pipeline(random_layer(24, 16), devices="cpu", chunk_rows=64) as pipeline:
        pipeline.run(random_rows(300, 24), progress=seen.append)
        assert {progress.ceiling_rows_per_s for progress in seen} == {None}
        pipeline.ceilings["cpu"] = Ceilings(1.0, 1.0, origin="made up for this test")
        x, y = np.asfortranarray(random_rows(300, 24)), np.empty((300, 16), np.float32, order="F")
        stats = pipeline.run(x, y, progress=seen.append).stats
    assert seen[-1].ceiling_rows_per_s == 1e9 / (24 * 4)
    printed = json.loads(json.dumps(stats.as_dict()))
    assert printed["ceilings"]["cpu"]["origin"] == "made up for this test"
    for name in ("H2D", "D2H"):
        stage = printed["stages"][name]
        assert stage["ceiling"] == 1.0 and stage["ceiling_share"] == pytest.approx(stage["rate"])
        assert stage["waiting_s"] >= 0 and set(stage["waiting_for"]) <= {"fill", "bus", "kernel", "drain", "host"}
    text = str(stats)
    for expected in ("waits for", "ceiling", "bound by", f"to go faster: {stats.advice}"):
        assert expected in text


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_stats_add_up(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch, 500)
    x, out = np.asfortranarray(X), np.asfortranarray(poisoned((200, 7)))
    with open_pipeline(devices=device) as pipeline:
        stats = pipeline.run(x, out).stats
        again = pipeline.run(x, out).stats
    assert stats.rows == 200 and stats.chunks == 13 and stats.chunk_rows == 16 and stats.num_streams == 3
    assert stats.bytes_in == x.nbytes and stats.bytes_out == out.nbytes
    assert stats.rows_per_s == pytest.approx(200 / stats.seconds)
    assert stats.gb_per_s_in == pytest.approx(x.nbytes / stats.seconds / 1e9)
    assert list(stats.stages) == list(STAGES)
    for name in ("fill", "H2D"):
        assert stats.stages[name].bytes == x.nbytes
    for name in ("D2H", "drain"):
        assert stats.stages[name].bytes == out.nbytes
    for stage in stats.stages.values():
        assert 0 < stage.busy_s <= stats.run_s and 0 < stage.busy_share <= 1
        assert stage.count >= 13
    assert stats.seconds == stats.setup_s + stats.run_s + stats.finish_s and min(stats.setup_s, stats.finish_s) >= 0
    assert stats.kernel_hidden_share is not None and 0 <= stats.kernel_hidden_share <= 1
    assert stats.copy_hidden_share is not None and 0 <= stats.copy_hidden_share <= 1
    assert list(stats.devices) == [device] and stats.kernel and stats.copy_workers and stats.source == "NumPy array"
    assert stats.precision == "fp32" and stats.runs_as == "ieee"
    assert stats.pinned_bytes == again.pinned_bytes > 0
    assert again.rows == 200 and again.stages["H2D"].bytes == x.nbytes, "a run's figures are its own"
    assert json.loads(json.dumps(stats.as_dict()))["stages"]["fill"]["bytes"] == x.nbytes
    text = str(stats)
    assert "200 rows" in text and f"bound by {stats.bound}" in text and device in text


@pytest.mark.parametrize(
    ("stage", "hardware"),
    [
        ("H2D", {"h2d_rate": 1e5}),
        ("D2H", {"d2h_rate": 1e5}),
        ("kernel", {"flop_rate": 1e5}),
        ("fill", {"copy_rate": 1e6, "copy_threads": 1}),
    ],
)
def test_stats_name_the_stage_that_bounds_the_run(
    stage: str, hardware: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On simulated hardware with one slow part, that part is busy nearly all the time."""
    small_rings(monkeypatch, 500)
    monkeypatch.setattr("pipeline.fleet.open_device", lambda name: SimDevice(Hardware(latency_s=0.0, **hardware)))
    out: Any = None
    with open_pipeline(devices="sim") as pipeline:
        if stage == "fill":  # nothing to drain, so that one worker has the fills alone
            device = pipeline.fleet.stations[0].device
            assert isinstance(device, SimDevice)
            out = device.pin(poisoned((200, 7)))
        stats = pipeline.run(X, out).stats
    assert stats.bound == stage
    assert stats.stages[stage].busy_share > 0.8


def test_stats_without_copies_by_workers_have_no_fill_and_no_drain() -> None:
    with open_pipeline() as pipeline:
        stats = pipeline.run(X).stats
    assert stats.stages["fill"].count == stats.stages["drain"].count == 0
    assert stats.pinned_bytes == 0


def test_stats_are_made_from_the_record_alone() -> None:
    recorder = Recorder("cuda:0")
    for chunk in range(4):
        recorder.add("H2D", chunk, 10 + chunk, 10.5 + chunk, 2 * 10**9)
        recorder.add("kernel", chunk, 10.5 + chunk, 11.0 + chunk)
        recorder.add("D2H", chunk, 11.0 + chunk, 11.5 + chunk, 10**9)
    setup = Setup(
        devices={"cuda:0": "a GPU"},
        ceilings={"cuda:0": Ceilings(4.0, 2.0, 9.0, 9.0, origin="made up")},
        kernel="a kernel",
        precision="fp32",
        runs_as="tf32",
        in_features=500,
        out_features=250,
        in_row_bytes=2000,
        out_row_bytes=1000,
        wire="float32",
        chunk_rows=10**6,
        num_streams=3,
        copy_workers="copy workers: 2",
        staging=Staging(8 * MIB, 4, 2, origin="defaults"),
        pinned_bytes=0,
        source="NumPy array",
        ends=Ends("memory", "file"),
    )
    parts = Parts(setup_s=0.5, run_s=3.0, finish_s=4.5)
    record = Record(setup, rows=4 * 10**6, start_s=10.0, parts=parts, exact_rows=7, recorders=[recorder])
    stats = stats_of(record)
    assert (stats.seconds, stats.setup_s, stats.run_s, stats.finish_s) == (8.0, 0.5, 3.0, 4.5)
    assert (stats.rows_per_s, stats.gb_per_s_in, stats.gb_per_s_out, stats.chunks) == (500_000, 1.0, 0.5, 4)
    assert stats.tflops == pytest.approx(2 * 4e6 * 500 * 250 / 8e12)
    h2d = stats.stages["H2D"]
    assert (h2d.busy_share, h2d.rate, h2d.ceiling_share) == pytest.approx((2 / 3, 8 / 3, 2 / 3)), "while rows moved"
    assert stats.ceilings["cuda:0"].fill_gb_per_s == 9.0 and stats.ceilings["cuda:0"].drain_gb_per_s is None
    assert stats.bound == "disk" and stats.exact_rows == 7 and stats.copy_hidden_share is not None
    assert json.loads(json.dumps(stats.as_dict()))["staging_origin"] == "defaults"
    assert [len(each) for each in record.timeline().devices.values()] == [12]
    assert record.timeline().hardware == {"cuda:0": "a GPU"}
