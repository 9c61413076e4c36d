"""The benches run: a small smoke run of each that needs no GPU, and what the others say without one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_tests import random_layer, random_rows

from pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[1]


def bench(*arguments: str, gpus: str = "", script: str = "bench") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
    return subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)


def test_bench_file_checks_every_row_and_reports_memory(tmp_path: Path) -> None:
    report = tmp_path / "file.json"
    options = ("--gib", "0.01", "--features", "64", "--precision", "ieee", "--devices", "cpu")
    done = bench("file", *options, "--directory", str(tmp_path), "--json", str(report))
    assert done.returncode == 0, done.stderr
    assert "every row right" in done.stdout
    found = json.loads(report.read_text())
    assert found["results"]["peak_resident_bytes"] > 0
    assert len(found["results"]["resident_bytes_at_quarters"]) == 5
    assert str(tmp_path) not in found["context"]["command"]
    assert list(tmp_path.iterdir()) == [report]


@pytest.mark.parametrize("report", ["", "none/file.json"])
def test_bench_refuses_a_report_that_cannot_be_written_before_it_measures(report: str, tmp_path: Path) -> None:
    done = bench("cpu", "--json", str(tmp_path / report))
    assert done.returncode == 2 and done.stdout == "" and "expected a file in a folder that exists" in done.stderr


def test_bench_cpu_checks_every_row(tmp_path: Path) -> None:
    report = tmp_path / "cpu.json"
    done = bench("cpu", "--rows", "500", "--features", "64", "--rounds", "2", "--json", str(report))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right") == 3 and "of the faster loop's speed" in done.stdout
    assert set(json.loads(report.read_text())["results"]) == {"pipeline", "loop, 1024 rows", "loop, 4096 rows"}


def test_bench_places_keeps_the_fastest_and_the_slowest_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench_places = importlib.import_module("bench_places")
    gb_per_s = iter([30, 30, 30, 80, 10, 80, 50, 50, 50, 20, 90, 20, *[40] * 24])  # three of each array

    class Copier:
        def seconds(self, target: Any, source: Any) -> float:
            assert target.shape == source.shape == (500,) and not np.shares_memory(target, source)
            source[0] = rate = next(gb_per_s)
            return float(source.nbytes / 1e9 / rate)

    found = bench_places.places(torch, Copier(), 1000, near=2, far=1, later=1)
    assert [array[0] for array in (*found.near, *found.far)] == [80, 50, 20]
    assert found.copies_gb_per_s == pytest.approx([80, 50, *[40] * 8, 30, 20])
    with pytest.raises(SystemExit, match=r"take 1024\.0 GiB, and \d+\.\d GiB are free for it: pass a smaller --gib"):
        bench_places.places(torch, Copier(), 2**36, near=2, far=1, later=1)


@pytest.mark.parametrize("name", ["kernel", "launch", "stream"])
def test_bench_without_a_gpu_says_so(name: str) -> None:
    done = bench(name)
    assert done.returncode == 1 and "needs a GPU" in done.stderr


def test_capture_without_a_gpu_says_so(tmp_path: Path) -> None:
    done = bench("--out", str(tmp_path / "out"), script="capture")
    assert done.returncode == 1 and "needs a GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_plan_errors_lists_the_runs_it_can_read() -> None:
    done = bench(script="plan_errors.py")
    assert done.returncode == 0, done.stderr
    for run in ("bench/stream-h200: pinned to pinned", "bench/stream-fp32-h200: array to array", "largest error"):
        assert run in done.stdout


@pytest.mark.parametrize("what", ["ranges", "record", "both", "as shipped"])
def test_capture_leaves_out_what_it_measures_and_puts_it_back(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from pipeline import executor, instrument
    from pipeline.devices import cuda

    def parts() -> tuple[Any, Any, Any]:
        return executor.Ranges, instrument.Recorder.add, cuda._CudaOperation.done

    capture_measure = importlib.import_module("capture_measure")
    whole = parts()
    with capture_measure.without(what):
        replaced = [a is not b for a, b in zip(whole, parts(), strict=True)]
        with Pipeline(random_layer(16, 8), devices="cpu", chunk_rows=8) as pipeline:
            assert len(pipeline.run(random_rows(40, 16)).out) == 40
    assert parts() == whole
    assert replaced == {
        "ranges": [True, False, False], "record": [False, True, True], "both": [True] * 3, "as shipped": [False] * 3
    }[what]  # fmt: skip
