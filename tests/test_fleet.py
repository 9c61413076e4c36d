"""`Fleet`: what it refuses, what it keeps warm for consecutive runs, what it leaves behind."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import assert_same_bits, poisoned, random_layer
from helpers.leaks import PlannedError, nothing_left_behind, small_rings
from helpers.pipelines import LAYER, X, open_pipeline

from pipeline import run_pipelined
from pipeline.devices.cpu import CpuDevice
from pipeline.devices.names import open_device
from pipeline.dtypes import FLOAT32
from pipeline.errors import DeviceMemoryError, OptionError
from pipeline.fleet import Fleet
from pipeline.options import RunOptions
from pipeline.report.stats import stats_of
from pipeline.run import run_dataset


@pytest.mark.parametrize("layer", [None, torch.nn.Linear(3, 2), np.zeros((3, 2))])
def test_pipeline_refuses_what_is_no_layer(layer: Any) -> None:
    with pytest.raises(OptionError, match=r"expected a FusedLinear.*from_linear"):
        run_pipelined(layer, X, devices="cpu")


def test_pipeline_memory_check_names_what_would_fit() -> None:
    with pytest.raises(DeviceMemoryError, match=r"free: pass fewer num_streams$"):
        open_pipeline(num_streams=10**12)


@pytest.mark.parametrize("name", ["PIPELINE_PIECE_BYTES", "PIPELINE_RING_PIECES", "PIPELINE_COPY_WORKERS"])
@pytest.mark.parametrize("value", ["0", "many", "-1", "1.5"])
def test_pipeline_bad_environment_is_named_and_leaves_no_thread(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with nothing_left_behind(), pytest.raises(OptionError, match=f"{name} is '{value}', expected a whole number"):
        open_pipeline()


def test_pipeline_chunk_that_does_not_fit_is_refused_by_name() -> None:
    with nothing_left_behind(), pytest.raises(DeviceMemoryError, match=f"{10**17} rows"):
        open_pipeline(chunk_rows=10**17)


def test_pipeline_memory_check_names_the_rows_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuDevice, "free_bytes", lambda self: 100_000)
    with nothing_left_behind(), pytest.raises(DeviceMemoryError, match=r"pass chunk_rows=\d+ or less") as caught:
        open_pipeline(chunk_rows=10_000)
    rows = int(str(caught.value).split("chunk_rows=")[1].split()[0])
    with open_pipeline(chunk_rows=rows) as pipeline:
        assert_same_bits(pipeline.run(X).out, LAYER(X))


def test_pipeline_second_device_that_fails_closes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        if name == "sim":
            raise PlannedError
        return open_device(name)

    monkeypatch.setattr("pipeline.fleet.open_device", fail)
    with nothing_left_behind(), pytest.raises(PlannedError):
        open_pipeline(devices=["cpu", "sim"])


def test_debug_mode_poisons_buffers_and_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEBUG", "1")
    small_rings(monkeypatch, 500)
    with open_pipeline() as pipeline:
        assert_same_bits(pipeline.run(np.asfortranarray(X), np.asfortranarray(poisoned((200, 7)))).out, LAYER(X))
        assert all((memory == 0xFF).all() for memory in pipeline.fleet.stations[0].movers.rings["Python"].load._memory)


def test_result_keeps_neither_device_nor_weights() -> None:
    pipeline = open_pipeline(random_layer(12, 7))
    result = pipeline.run(X)
    kept = [weakref.ref(pipeline.fleet.stations[0].device), weakref.ref(pipeline.layer)]
    pipeline.close()
    del pipeline
    gc.collect()
    assert [each() for each in kept] == [None, None] and result.stats.rows == 200


# -- shared by consecutive runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", ["cpu", "sim", ["cpu", "sim"]])
def test_fleet_is_shared_by_consecutive_runs(devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch)
    options = RunOptions(devices=devices, chunk_rows=16)
    with nothing_left_behind():
        fleet = Fleet(LAYER, options)
        fleet.open()
        opened = [station.device for station in fleet.stations]
        for x in (X, X[:33], X + 1):
            out, record = run_dataset(fleet, np.asfortranarray(x), None, options)
            assert_same_bits(out, LAYER(x))
            assert record.rows == len(x) and list(record.setup.devices) == fleet.device_names
            assert 0 < record.parts.run_s <= record.parts.seconds and stats_of(record).rows == len(x)
        assert [station.device for station in fleet.stations] == opened, "they stay open"
        fleet.close()
        fleet.close()
        assert fleet.stations == []


def test_fleet_keeps_the_buffers_that_iterables_are_gathered_in() -> None:
    options = RunOptions(devices="cpu", chunk_rows=16)
    fleet = Fleet(LAYER, options)
    pinned = []
    for _ in range(3):
        out, _ = run_dataset(fleet, iter([X[:50], X[50:]]), None, options)
        assert_same_bits(out, LAYER(X))
        pinned.append([id(buffer) for buffer in fleet.gather_buffers])
    assert pinned[0] and pinned[1][: len(pinned[0])] == pinned[0]
    fleet.close()
    assert fleet.gather_buffers == []


def test_fleet_after_a_failed_run_is_ready(tmp_path: Path) -> None:
    options = RunOptions(devices="cpu", chunk_rows=16)
    fleet = Fleet(LAYER, options)
    fleet.open()

    def fail(progress: Any) -> None:
        raise PlannedError

    with nothing_left_behind(tmp_path):
        with pytest.raises(PlannedError):
            run_dataset(fleet, X, tmp_path / "y.npy", options.with_values({"progress": fail}))
        assert_same_bits(run_dataset(fleet, X, None, options)[0], LAYER(X))
    fleet.close()


def test_fleet_with_a_narrow_wire_says_what_crosses_the_bus() -> None:
    fleet = Fleet(LAYER, RunOptions(devices="cpu", wire_dtype="bf16"))
    fleet.open()
    try:
        assert fleet.wire_row_bytes == (12 * 2, 7 * 2) and fleet.out_dtype is FLOAT32
        assert fleet.stations_for(None, None) == fleet.stations
        with pytest.raises(OptionError, match="the source is a CUDA tensor; leave it out"):
            fleet.stations_for(torch.empty(1), None)
    finally:
        fleet.close()
