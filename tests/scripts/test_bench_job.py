"""`scripts/bench job`: whole processes on a machine without a GPU, and the parts that check and measure them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benches import case
from benches.cases import CASES
from benches.job import contenders, dataset, table
from benches.job.contenders import IMPORT, OURS, PLAIN, REST, Contender, run_whole
from benches.job.dataset import MEMORY_FILE_SYSTEMS, Dataset, file_system, lacks_room
from benches.layers import random_layer

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--features", "64", "--precision", "ieee", "--devices", "cpu")


def test_job_measures_whole_processes_and_checks_their_results(tmp_path: Path) -> None:
    folder, report = tmp_path / "files", tmp_path / "job.json"
    folder.mkdir()
    command = [sys.executable, str(ROOT / "scripts" / "bench"), "job", *SMALL, "--gib", "0.002", "--rounds", "1"]
    places = ("--directory", str(folder), "--json", str(report))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *places], capture_output=True, text=True, timeout=110, env=environment)
    assert done.returncode == 0, done.stderr
    assert "touched" in done.stdout and done.stdout.count(", right") == 2 and "as the plain script" in done.stdout
    document = json.loads(report.read_text())
    assert str(tmp_path) not in report.read_text() and list(folder.iterdir()) == []
    ((title, found),) = document["results"].items()
    assert title == f"0.002 GiB, {file_system(tmp_path)}, warm"
    assert set(found["processes"]) == {OURS, PLAIN, IMPORT} and found["right"]
    for name in (OURS, PLAIN):
        row = found["processes"][name]
        assert sum(part["median"] for part in row["parts_s"].values()) == pytest.approx(row["wall_s"]["median"])
        assert row["parts_s"][REST]["median"] > 0 and row["user_s"]["median"] > 0
        assert row["peak_resident_bytes"]["median"] > 2**24
    assert found["times_as_fast_as_plain"]["of_medians"] > 0


def test_job_leaves_out_what_has_no_room(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    too_much = ("--gib", "1e9", "--touch-gib", "0.001", "--directory", str(tmp_path))
    assert case.main(CASES, "", ["job", *SMALL, *too_much]) == 0
    assert "left out, it takes 2000000000.0 GiB" in capsys.readouterr().out


def test_job_refuses_a_contender_that_there_is_not() -> None:
    with pytest.raises(SystemExit, match="--only is 'nobody', expected one of 'pipeline run'"):
        case.main(CASES, "", ["job", *SMALL, "--only", "nobody"])


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Rows and weights in a folder, and a right result of several pages a row."""
    made = Dataset(tmp_path, random_layer(64, "ieee", 2560))
    made.write(64 * 4 * 300 / 2**30)
    np.save(made.y, made.layer.reference(np.load(made.x)).astype(np.float32))
    return made


def test_dataset_check_accepts_a_right_result(data: Dataset) -> None:
    assert data.worst_difference() < 1e-6


def unwritten_page(y: Any) -> None:
    y[123, 1024:2048] = 0


def not_finite(y: Any) -> None:
    y[7] = math.nan


def rows_moved(y: Any) -> None:
    y[:] = np.roll(y, 1, axis=0)


@pytest.mark.parametrize("spoil", [unwritten_page, not_finite, rows_moved])
def test_dataset_check_refuses_a_wrong_result(spoil: Any, data: Dataset) -> None:
    y = np.load(data.y, mmap_mode="r+")
    spoil(y)
    y.flush()
    assert not data.worst_difference() <= 1e-2


def test_dataset_blocks_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "BLOCK_ROWS", 10)
    made = Dataset(tmp_path, random_layer(64, "ieee"))
    made.write(64 * 4 * 100 / 2**30)
    x = np.load(made.x)
    assert len(x) == 100 and len(np.unique(x, axis=0)) == 100 and np.abs(x).min(axis=1).all()


def test_dataset_knows_what_is_cached_and_drops_it(data: Dataset) -> None:
    assert data.cached_share() == 1
    data.drop_cache()
    if file_system(data.folder) not in MEMORY_FILE_SYSTEMS:
        assert data.cached_share() < 1


def test_file_system_is_that_of_the_nearest_mount_point() -> None:
    assert file_system(Path("/proc/self")) == "proc"


def test_lacks_room_tells_how_much(tmp_path: Path) -> None:
    assert lacks_room(tmp_path, 1e-6, 0) is None
    assert "it takes 2000000000.0 GiB" in str(lacks_room(tmp_path, 1e9, 0))


def process(text: str) -> Contender:
    return Contender(lambda _: [sys.executable, "-c", text])


def test_run_whole_measures_the_process_and_not_the_bench(data: Dataset) -> None:
    ballast = np.ones(2**28, np.uint8)  # which the peak of a child of this process would have
    found = run_whole(process("sum(range(10**6)); print('done')"), data)
    assert found["output"] == "done\n" and found["user_s"] > 0 and found["wall_s"] >= 0.5 * found["user_s"]
    assert 2**20 < found["peak_resident_bytes"] < 2**26 < len(ballast)


def test_run_whole_raises_what_a_failed_process_wrote(data: Dataset) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 3:.*half a result"):
        run_whole(process("import sys; print('half a result'); sys.exit(3)"), data)


def test_run_whole_stops_a_process_that_hangs(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "LIMIT_S", 0.2)
    with pytest.raises(RuntimeError, match="ended with status -9"):
        run_whole(process("import threading; threading.Event().wait()"), data)


def test_ours_parts_are_those_of_the_report_with_and_without_a_set_up() -> None:
    new = {"stats": {"seconds": 2.0, "setup_s": 0.5, "run_s": 1.25, "finish_s": 0.25}, "process_seconds": 2.5}
    assert contenders.ours_parts(json.dumps(new)) == {"set-up": 0.5, "run": 1.25, "finish": 0.25}
    assert contenders.ours_says_s(json.dumps(new)) == 2.5
    old = {"stats": {"seconds": 2.0, "finish_s": 0.25}}
    assert contenders.ours_parts(json.dumps(old)) == {"set-up": 0.0, "run": 1.75, "finish": 0.25}
    assert contenders.ours_says_s(json.dumps(old)) is None


def test_one_wrong_result_makes_all_of_a_contender_wrong(data: Dataset) -> None:
    found = table.Processes(Contender(lambda _: [], json.loads, allowed=1e-5))
    took = {"wall_s": 2.0, "user_s": 1.0, "system_s": 0.1, "peak_resident_bytes": 1, "output": '{"loop": 1.5}'}
    for counts, worst in ((False, math.nan), (True, 0.0), (True, 0.0)):
        found.add(took, 1.0, worst, counts=counts)
    row = table.summarized(data, {PLAIN: found})
    assert not row["right"] and row["processes"][PLAIN]["parts_s"][REST]["median"] == 0.5
