"""Plans: what limits them, and what they say."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.data import random_layer

from pipeline import Pipeline
from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32
from pipeline.errors import OptionError
from pipeline.io.registry import SourceRequest
from pipeline.io.sources import open_source
from pipeline.options import RunOptions
from pipeline.plan.machine import Machine
from pipeline.plan.predict import predict
from pipeline.plan.workload import Workload

H200 = Machine.load("h200")
WORK = Workload(500_000, 4096, 4096, FLOAT32, "tf32", "pinned", "pinned")


def test_plan_of_pinned_rows_is_bound_by_the_bus() -> None:
    found = predict(WORK, H200)
    assert found.bound in ("H2D", "D2H")
    assert 0.97 * 50.6 < found.gb_per_s_in <= 50.6
    assert found.seconds == pytest.approx(WORK.rows / found.rows_per_s)
    assert found.pinned_bytes == 0 and not found.problems


def test_plan_of_a_slow_kernel_is_bound_by_it() -> None:
    found = predict(replace(WORK, runs_as="ieee", in_features=8192, out_features=8192), H200)
    assert found.bound == "kernel"
    assert found.rows_per_s * 2 * 8192 * 8192 / 1e12 == pytest.approx(41.0, rel=0.02)


def test_plan_of_ordinary_arrays_is_bound_by_the_host_memory() -> None:
    far = replace(H200, copy_gb_per_s={"1": 80.0})
    found = predict(replace(WORK, source="array", out="array"), far)
    assert found.bound == "host memory" and found.pinned_bytes > 0
    assert found.gb_per_s_in + found.gb_per_s_out == pytest.approx(80.0, rel=0.03)
    one_end = predict(replace(WORK, source="array"), replace(H200, fill_gb_per_s=30.0))
    assert one_end.bound == "fill" and one_end.gb_per_s_in == pytest.approx(30.0, rel=0.03)


def test_plan_of_files_is_bound_by_the_disk() -> None:
    found = predict(replace(WORK, source="file", out="file"), H200)
    assert found.bound == "disk write" and found.gb_per_s_out == pytest.approx(H200.disk_write_gb_per_s, rel=0.03)
    assert "page cache" in found.limits and "disk read" not in found.limits
    large = predict(replace(WORK, source="file", out="pinned", rows=10**7, out_features=64), H200)
    assert large.bound == "disk read" and large.gb_per_s_in == pytest.approx(H200.disk_read_gb_per_s, rel=0.03)
    assert "memory can't hold it" in "\n".join(large.lines())


def test_plan_of_a_fresh_result_is_bound_by_its_new_pages() -> None:
    found = predict(replace(WORK, source="array", out="fresh"), H200)
    assert found.bound == "drain" and found.gb_per_s_out == pytest.approx(H200.fresh_gb_per_s, rel=0.03)
    assert found.host_memory_bytes > 2 * WORK.rows * 4096 * 4


def test_plan_of_a_narrow_wire_halves_what_crosses_the_bus_and_stages_pinned_rows() -> None:
    wide, narrow = (predict(replace(WORK, options=RunOptions(wire_dtype=wire)), H200) for wire in (None, BFLOAT16))
    assert narrow.limits["H2D"] == pytest.approx(2 * wide.limits["H2D"])
    assert wide.pinned_bytes == 0 and narrow.pinned_bytes > 0 and narrow.bound == "host memory"
    assert narrow.gb_per_s_in + narrow.gb_per_s_out == pytest.approx(H200.copy_gb_per_s["1"], rel=0.03)
    assert narrow.chunk_rows == 2 * wide.chunk_rows


def test_plan_of_a_narrow_result_counts_its_bytes() -> None:
    found = predict(replace(WORK, options=RunOptions(out_dtype=BFLOAT16)), H200)
    assert found.gb_per_s_out == pytest.approx(found.gb_per_s_in / 2)
    assert found.limits["D2H"] > 1.9 * found.limits["H2D"] * 0.95


def test_plan_of_one_sided_traffic_uses_the_whole_bus() -> None:
    found = predict(replace(WORK, in_features=8192, out_features=64, dtype=BFLOAT16, runs_as="bfloat16"), H200)
    assert 50.6 < found.gb_per_s_in < 55.3


def test_plan_of_a_short_job_counts_filling_and_emptying_the_lanes() -> None:
    short, long = predict(replace(WORK, rows=4096), H200), predict(WORK, H200)
    assert short.rows_per_s < 0.7 * long.rows_per_s
    assert short.bound == "none" and short.lowest == long.bound == long.lowest, "nothing is at its limit all along"
    assert f"bound by none, at {short.lowest_share:.0%} of the lowest limit, {short.lowest}" in "\n".join(short.lines())
    assert "lanes are empty" in "\n".join(short.lines()) and "lanes are empty" not in "\n".join(long.lines())


@pytest.mark.parametrize(("rows", "gpus", "hosts"), [(1024, 1, 1), (60_000, 1, 1), (60_000, 4, 2), (10**6, 1, 1)])
def test_plan_has_the_chunks_of_a_run(rows: int, gpus: int, hosts: int) -> None:
    found = predict(replace(WORK, rows=rows, gpus=gpus, hosts=hosts), H200)
    with Pipeline(random_layer(4096, 4096), devices="sim") as pipe:
        source = open_source(
            np.broadcast_to(np.float32(0), (rows // hosts, 4096)), SourceRequest(4096, pipe.layer.dtype)
        )
        assert found.chunk_rows == pipe.fleet.rows_per_chunk(source.rows, gpus // hosts)


@pytest.mark.parametrize("end", ["pinned", "array"])
def test_plan_adds_what_a_run_takes_beyond_its_lanes(end: str) -> None:
    work = replace(WORK, rows=1024, source=end, out=end)
    before, after = (
        predict(work, replace(H200, pinned_run_us=us, staged_run_us=2 * us)).seconds for us in (100.0, 200.0)
    )
    assert after - before == pytest.approx(100e-6 if end == "pinned" else 200e-6)


def test_plan_pauses_copy_engines_between_chunks() -> None:
    work = replace(WORK, options=RunOptions(chunk_rows=256))  # 0.08 ms a chunk
    found, without = predict(work, H200), predict(work, replace(H200, copy_pause_us=1e-9))
    assert found.seconds - without.seconds == pytest.approx(500_000 / 256 * 13e-6, rel=0.02)


def test_plan_gpus_of_one_host_share_its_bus_and_hosts_add_up() -> None:
    one, four = predict(WORK, H200), predict(replace(WORK, rows=4 * WORK.rows, gpus=4), H200)
    assert four.gb_per_s_in == pytest.approx(80, rel=0.03) and four.bound in ("H2D", "D2H")
    assert any("share its bus: 80.0" in note for note in four.notes) and not one.notes
    apart = predict(replace(WORK, rows=4 * WORK.rows, gpus=4, hosts=4), H200)
    assert apart.rows_per_s == pytest.approx(4 * one.rows_per_s, rel=0.01)


def test_plan_gpus_of_one_host_share_its_bus_one_way_too() -> None:
    work = replace(WORK, rows=4 * WORK.rows, in_features=8192, out_features=64, dtype=BFLOAT16, runs_as="bfloat16")
    assert predict(replace(work, gpus=4), H200).gb_per_s_in == pytest.approx(159, rel=0.05)
    assert predict(replace(work, gpus=3), H200).gb_per_s_in == pytest.approx((108 + 159) / 2, rel=0.05)


def test_plan_gpus_of_one_host_share_its_memory() -> None:
    work, far = replace(WORK, source="array", out="array"), replace(H200, copy_gb_per_s={"1": 80.0})
    one, four = predict(work, far), predict(replace(work, gpus=4), far)
    assert four.bound == "host memory" and four.rows_per_s == pytest.approx(one.rows_per_s, rel=0.02)
    wider = replace(H200, copy_gb_per_s={"1": 90.0, "4": 140.0})
    assert predict(replace(work, gpus=4), wider).limits["host memory"] == pytest.approx(140e9 / (2 * 4096 * 4))
    apart = predict(replace(work, rows=4 * WORK.rows, gpus=4, hosts=4), far)
    assert apart.rows_per_s == pytest.approx(4 * one.rows_per_s, rel=0.02)


@pytest.mark.parametrize("gpus", [1, 10, 100, 1000])
def test_plan_scales_until_something_shared_is_used_up(gpus: int) -> None:
    work = replace(WORK, rows=10**9, source="file", out="file", gpus=gpus, hosts=gpus, storage_gb_per_s=2000.0)
    found = predict(work, H200)
    alone = predict(replace(work, storage_gb_per_s=10**9), H200)
    expected = min(alone.rows_per_s, 2000e9 / (2 * 4096 * 4))
    assert found.rows_per_s == pytest.approx(expected, rel=0.01) and not found.problems
    assert (found.bound == "storage") == (gpus >= 100)


def test_plan_network_limits_each_host() -> None:
    work = replace(WORK, source="file", out="file", gpus=8, hosts=2, network_gb_per_s=12.5)
    found = predict(work, H200)
    assert found.bound == "network" and found.gb_per_s_in == pytest.approx(25.0, rel=0.02)


def test_plan_counts_storage_and_network_for_files_only() -> None:
    shared = {"storage_gb_per_s": 3.0, "network_gb_per_s": 2.0}
    found = predict(replace(WORK, **shared), H200)
    assert found.rows_per_s == predict(WORK, H200).rows_per_s and not {"storage", "network"} & found.limits.keys()
    assert "storage and network don't count" in "\n".join(found.lines())
    row_bytes = 4096 * 4
    read = predict(replace(WORK, source="file", **shared), H200)
    assert (read.limits["storage"], read.limits["network"]) == (3e9 / row_bytes, 2e9 / row_bytes)
    both = predict(replace(WORK, source="file", out="file", **shared), H200)
    assert (both.limits["storage"], both.limits["network"]) == (3e9 / (2 * row_bytes), 2e9 / row_bytes)
    assert not {"disk write", "disk read", "page cache"} & both.limits.keys()


def test_plan_counts_split_rows_on_the_gpu() -> None:
    tf32, fp32 = (predict(replace(WORK, runs_as=name), H200) for name in ("tf32", "fp32"))
    weights, rows = 4096 * 4097 * 4, 6 * tf32.chunk_rows * 4096 * 4
    assert tf32.gpu_memory_bytes == weights + 2 * rows
    assert fp32.gpu_memory_bytes == 2 * weights + 3 * rows


def test_plan_says_what_does_not_fit() -> None:
    found = predict(replace(WORK, rows=10**8), H200)
    assert any("keep the rows in files" in problem for problem in found.problems)
    assert "it would not run" in "\n".join(found.lines())


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"options": RunOptions(chunk_rows=10**6)}, "use chunk_rows of at most 762,598,"),
        ({"options": RunOptions(chunk_rows=2**63 - 1)}, "use chunk_rows of at most 762,598,"),
        ({"in_features": 10**15}, "use a narrower layer"),
        ({"out_features": 10**15, "source": "array", "out": "array"}, "use a narrower layer"),
    ],
)
def test_plan_of_what_no_gpu_can_hold_simulates_nothing(change: dict[str, Any], remedy: str) -> None:
    found = predict(replace(WORK, **change), H200)
    assert remedy in found.problems[0] and found.rows_per_s is None and found.seconds is None
    text = "\n".join(found.lines())
    assert "it would not run" in text and "rows/s that each part alone allows" in text and "in all" not in text


@pytest.mark.parametrize("debug", ["", "1"])
def test_plan_takes_no_memory_for_rows(debug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEBUG", debug)
    work = replace(
        WORK, in_features=2**31, out_features=1, rows=64, source="array", options=RunOptions(chunk_rows=2)
    )  # 8 GiB a row
    tracemalloc.start()
    try:
        found = predict(work, H200)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.rows_per_s is not None and peak_bytes < 2**24


def test_plan_of_very_many_streams_and_pieces_is_quick() -> None:
    start = time.perf_counter()
    assert predict(replace(WORK, rows=10**10, options=RunOptions(num_streams=10**6, chunk_rows=1)), H200).rows_per_s > 0
    assert (
        predict(
            replace(WORK, rows=10**10, options=RunOptions(chunk_rows=500_000), source="file", out="file"), H200
        ).rows_per_s
        > 0
    )
    assert time.perf_counter() - start < 60  # some seconds; without a limit it takes hours


def test_plan_refuses_what_it_can_not_know() -> None:
    with pytest.raises(OptionError, match="expected a multiple"):
        predict(replace(WORK, gpus=5, hosts=2), H200)
    with pytest.raises(OptionError, match="no kernel_tflops for fp8"):
        predict(replace(WORK, runs_as="fp8"), H200)
    with pytest.raises(OptionError, match="expected one of pinned, array, file, fresh"):
        predict(replace(WORK, out="tape"), H200)
    with pytest.raises(OptionError, match="source is 'fresh', expected one of pinned, array, file"):
        predict(replace(WORK, source="fresh"), H200)
    with pytest.raises(OptionError, match="expected a whole number from 1"):
        predict(replace(WORK, in_features=2**70), H200)
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match=r"storage_gb_per_s is .*, expected a number above 0"):
            predict(replace(WORK, storage_gb_per_s=rate), H200)
    with pytest.raises(OptionError, match="expected 'bf16' or 'fp16' for a layer of float32"):
        predict(replace(WORK, dtype=BFLOAT16, runs_as="bfloat16", options=RunOptions(wire_dtype=FLOAT16)), H200)
    with pytest.raises(OptionError, match="expected one of h200"):
        Machine.load("abacus")
