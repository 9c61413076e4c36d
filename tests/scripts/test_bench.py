"""The benches run: a small smoke run of each that needs no GPU, and what the others say without one."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benches import case
from benches.captures import overhead
from benches.cases import CASES
from benches.layers import larger
from benches.turns import turns
from benches.versions import ratios, verdict
from helpers.data import random_layer, random_rows
from helpers.needs import needs

from pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[2]


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
def test_bench_refuses_a_report_that_cannot_be_written_before_it_measures(
    report: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        case.main(CASES, "", ["cpu", "--json", str(tmp_path / report)])
    shown = capsys.readouterr()
    assert shown.out == "" and "expected a file in a folder that exists" in shown.err


def test_bench_cpu_checks_every_row(tmp_path: Path) -> None:
    report = tmp_path / "cpu.json"
    done = bench("cpu", "--rows", "500", "--features", "64", "--rounds", "2", "--json", str(report))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right") == 3 and "of the faster loop's speed" in done.stdout
    assert set(json.loads(report.read_text())["results"]) == {"pipeline", "loop, 1024 rows", "loop, 4096 rows"}


@pytest.fixture(scope="module")
def other_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package: what an exported tree of another commit is."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pipeline", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def versions(other: Path, *options: str) -> subprocess.CompletedProcess[str]:
    sizes = ("--features", "64", "--rows", "40", "--gib", "0.001", "--burst-ms", "1", "--rest-ms", "0", "--rounds", "2")
    return bench("versions", "--against", str(other), "--device", "cpu", *sizes, *options)


def test_bench_versions_measures_both_checkouts_in_turns(other_checkout: Path, tmp_path: Path) -> None:
    report = tmp_path / "versions.json"
    done = versions(other_checkout, "--precision", "fp32", "--json", str(report))
    assert done.returncode == 0, done.stderr
    document = json.loads(report.read_text())
    assert str(tmp_path) not in document["context"]["command"] and "--against" not in document["context"]["command"]
    assert document["trees"]["before"]["sources_sha256"] == document["trees"]["after"]["sources_sha256"]
    assert set(document["results"]) == {"kernel fp32, 40 rows", "ordinary memory, 0.001 GiB each way"}
    for found in document["results"].values():
        assert found["right"] and found["same_bits"]
        assert set(found["seconds"]) == {"before", "after"} and found["time_after_by_before"]["of_medians"] > 0


def test_bench_versions_sees_another_result(other_checkout: Path, tmp_path: Path) -> None:
    package = other_checkout / "pipeline" / "__init__.py"
    before = package.read_text()
    package.write_text(before + WRONG_LAYER)
    try:
        done = versions(other_checkout, "--case", "kernel", "--precision", "fp32")
    finally:
        package.write_text(before)
    assert done.returncode == 1 and "WRONG RESULT" in done.stdout and "OTHER BITS" in done.stdout


WRONG_LAYER = """
from pipeline.layer import linear

class FusedLinear(linear.FusedLinear):
    def __init__(self, weight, bias, scaling_factor, **options):
        super().__init__(weight, bias, scaling_factor + 1, **options)
"""


def test_bench_versions_refuses_what_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected the folder of a checkout"):
        case.main(CASES, "", ["versions", "--against", str(tmp_path), "--device", "cpu"])


def test_versions_says_slower_only_where_most_rounds_do() -> None:
    slower = ratios({"before": [1.0, 1.0, 1.0, 1.0], "after": [1.1, 1.2, 1.1, 1.2]})
    assert slower["of_medians"] == pytest.approx(1.15) and verdict(slower) == "slower"
    assert verdict(ratios({"before": [1.0, 1.0, 1.0, 1.0], "after": [0.9, 1.2, 0.9, 1.2]})) == "within the spread"
    assert verdict(ratios({"before": [1.1, 1.2], "after": [1.0, 1.0]})) == "faster"


def test_turns_are_everyones_once_a_round() -> None:
    taken = list(turns(["a", "b", "c"], 50))
    assert [n for n, _ in taken] == [n for n in range(50) for _ in range(3)]
    rounds = [tuple(name for _, name in taken[3 * n : 3 * n + 3]) for n in range(50)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds)) > 1


@pytest.mark.parametrize("order", [[0.5, math.nan, 0.1], [math.nan, 0.5], [0.5, math.nan]])
def test_worst_difference_is_nan_where_any_is(order: list[float]) -> None:
    worst = 0.0
    for difference in order:
        worst = larger(worst, difference)
    assert math.isnan(worst)
    assert larger(0.5, 0.1) == larger(0.1, 0.5) == 0.5


@pytest.mark.parametrize("name", ["kernel", "errors", "launch", "stream"])
def test_bench_without_a_gpu_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(case, "_gpus", lambda: 0)
    assert case.main(CASES, "", [name]) == 1
    assert capsys.readouterr().err == f"scripts/bench {name} needs a GPU, and torch sees none here\n"


def test_bench_stream_refuses_a_case_that_needs_more_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "_gpus", lambda: 1)
    with pytest.raises(SystemExit, match="the case gpus needs several GPUs, and torch sees one here"):
        case.main(CASES, "", ["stream", "--case", "gpus"])


def test_capture_without_a_gpu_says_so(tmp_path: Path) -> None:
    done = bench("--out", str(tmp_path / "out"), script="capture")
    assert done.returncode == 1 and "needs a GPU" in done.stderr
    assert not (tmp_path / "out").exists()


@needs("matplotlib", "plot")
@pytest.mark.parametrize("name", ["kernel-h200", "stream-h200", "file-h200", "roofline"])
def test_plot_draws_every_kind_of_record(name: str, tmp_path: Path) -> None:
    from benches import plots

    record = next((ROOT / "profiles").rglob(f"{'kernel-h200' if name == 'roofline' else name}.json"))
    copy = shutil.copy(record, tmp_path)
    assert plots.main([str(copy), *(["--roofline"] if name == "roofline" else [])]) == 0
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plan_errors_lists_the_runs_it_can_read() -> None:
    done = bench(script="plan_errors.py")
    assert done.returncode == 0, done.stderr
    for run in ("stream-h200: pinned to pinned", "stream-fp32-h200: array to array", "largest error"):
        assert run in done.stdout


@pytest.mark.parametrize("what", ["ranges", "record", "both", "as shipped"])
def test_capture_leaves_out_what_it_measures_and_puts_it_back(what: str) -> None:
    from pipeline import executor, instrument
    from pipeline.devices import cuda_events

    def parts() -> tuple[Any, Any, Any]:
        return executor.Ranges, instrument.Recorder.add, cuda_events.CudaOperation.done

    whole = parts()
    with overhead.without(what):
        replaced = [a is not b for a, b in zip(whole, parts(), strict=True)]
        with Pipeline(random_layer(16, 8), devices="cpu", chunk_rows=8) as pipeline:
            assert len(pipeline.run(random_rows(40, 16)).out) == 40
    assert parts() == whole
    assert replaced == {
        "ranges": [True, False, False], "record": [False, True, True], "both": [True] * 3, "as shipped": [False] * 3
    }[what]  # fmt: skip
