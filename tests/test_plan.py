"""Plans: what limits them, what they say, and how far they are from what was measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import BFLOAT16, FLOAT32
from pipeline.errors import FileFormatError, OptionError
from pipeline.plan import Job, Machine, predict

ROOT = Path(__file__).resolve().parents[1]
H200 = Machine.load("h200")
JOB = Job(500_000, 4096, 4096, FLOAT32, "tf32", "pinned", "pinned")


def test_plan_of_pinned_rows_is_bound_by_the_bus() -> None:
    found = predict(JOB, H200)
    assert found.bound in ("H2D", "D2H")
    assert 0.97 * 50.6 < found.gb_per_s_in <= 50.6
    assert found.seconds == pytest.approx(JOB.rows / found.rows_per_s)
    assert found.pinned_bytes == 0 and not found.problems


def test_plan_of_a_slow_kernel_is_bound_by_it() -> None:
    found = predict(replace(JOB, runs_as="ieee", in_features=8192, out_features=8192), H200)
    assert found.bound == "kernel"
    assert found.rows_per_s * 2 * 8192 * 8192 / 1e12 == pytest.approx(41.0, rel=0.02)


def test_plan_of_ordinary_arrays_is_bound_by_the_copy_workers() -> None:
    found = predict(replace(JOB, source="array", out="array"), H200)
    assert found.bound in ("fill", "drain") and found.pinned_bytes > 0
    assert found.gb_per_s_in + found.gb_per_s_out == pytest.approx(H200.copy_gb_per_s, rel=0.03)


def test_plan_of_files_is_bound_by_writing_them() -> None:
    found = predict(replace(JOB, source="file", out="file"), H200)
    assert found.bound == "drain" and found.gb_per_s_out == pytest.approx(H200.file_write_gb_per_s, rel=0.03)


def test_plan_of_one_sided_traffic_uses_the_whole_bus() -> None:
    found = predict(replace(JOB, in_features=8192, out_features=64, dtype=BFLOAT16, runs_as="bfloat16"), H200)
    assert 50.6 < found.gb_per_s_in < 55.3


def test_plan_of_a_short_job_counts_filling_and_emptying_the_lanes() -> None:
    short, long = predict(replace(JOB, rows=4096), H200), predict(JOB, H200)
    assert short.rows_per_s < 0.7 * long.rows_per_s


def test_plan_gpus_of_one_host_share_its_bus_and_hosts_add_up() -> None:
    one, four = predict(JOB, H200), predict(replace(JOB, rows=4 * JOB.rows, gpus=4), H200)
    assert four.gb_per_s_in == pytest.approx(80, rel=0.03) and "share" in four.bound
    apart = predict(replace(JOB, rows=4 * JOB.rows, gpus=4, hosts=4), H200)
    assert apart.rows_per_s == pytest.approx(4 * one.rows_per_s, rel=0.01)


@pytest.mark.parametrize("gpus", [1, 10, 100, 1000])
def test_plan_scales_until_something_shared_is_used_up(gpus: int) -> None:
    job = replace(JOB, rows=10**9, gpus=gpus, hosts=gpus, storage_gb_per_s=2000.0)
    found = predict(job, H200)
    alone = predict(replace(job, storage_gb_per_s=None), H200)
    expected = min(alone.rows_per_s, 2000e9 / (2 * 4096 * 4))
    assert found.rows_per_s == pytest.approx(expected, rel=0.01)
    assert (found.bound == "storage") == (gpus >= 100)


def test_plan_network_limits_each_host() -> None:
    found = predict(replace(JOB, gpus=8, hosts=2, network_gb_per_s=12.5), H200)
    assert found.bound == "network" and found.gb_per_s_in == pytest.approx(25.0, rel=0.02)


def test_plan_counts_split_rows_on_the_gpu() -> None:
    tf32, fp32 = (predict(replace(JOB, runs_as=name), H200) for name in ("tf32", "fp32"))
    weights, rows = 4096 * 4097 * 4, 6 * tf32.chunk_rows * 4096 * 4
    assert tf32.gpu_memory_bytes == weights + 2 * rows
    assert fp32.gpu_memory_bytes == 2 * weights + 3 * rows


def test_plan_says_what_does_not_fit() -> None:
    found = predict(replace(JOB, rows=10**8), H200)
    assert any("keep the rows in files" in problem for problem in found.problems)
    found = predict(replace(JOB, chunk_rows=10**6), H200)
    assert any("smaller chunk_rows" in problem for problem in found.problems)
    assert "it would not run" in "\n".join(found.lines())


def test_plan_refuses_what_it_can_not_know(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="expected a multiple"):
        predict(replace(JOB, gpus=5, hosts=2), H200)
    with pytest.raises(OptionError, match="no kernel_tflops for fp8"):
        predict(replace(JOB, runs_as="fp8"), H200)
    with pytest.raises(OptionError, match="expected one of pinned, array, file"):
        predict(replace(JOB, out="tape"), H200)
    with pytest.raises(OptionError, match="expected one of h200"):
        Machine.load("abacus")
    path = tmp_path / "mine.json"
    path.write_text('{"name": "mine", "speed": 3}')
    with pytest.raises(FileFormatError, match=r"missing \['architecture'.*unknown \['speed'\]"):
        Machine.load(str(path))
    path.write_text("3")
    with pytest.raises(FileFormatError, match="isn't a machine's description"):
        Machine.load(str(path))


def test_plan_takes_a_machine_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**json.loads((ROOT / "pipeline/machines/h200.json").read_text()), "name": "x"}))
    assert Machine.load(str(path)) == replace(H200, name="x")


# -- against measurements ----------------------------------------------------------------------------------------------


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("plan_errors", ROOT / "scripts" / "plan_errors.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CASES = load_script().all_cases()


def test_plan_has_measured_runs_to_compare_with() -> None:
    assert len(CASES) >= 3


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_plan_is_within_ten_percent_of_what_was_measured(case: Any) -> None:
    found = predict(case.job, case.machine)
    assert found.rows_per_s == pytest.approx(case.rows_per_s, rel=0.10), found.lines()
