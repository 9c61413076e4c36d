"""A small smoke run of each bench that needs a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.devices.cuda import count_gpus

if not count_gpus():
    pytest.skip("no NVIDIA GPU is visible", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "kernel": ("--smoke", "--rounds", "1", "--burst-ms", "1", "--peer", "linear", "--peer", "eager"),
    "errors": ("--smoke",),
    "launch": ("--rounds", "1", "--calls", "20"),
    "stream": ("--gib", "0.05", "--features", "512", "--rounds", "1", "--quick"),
    "file": ("--gib", "0.05", "--features", "512"),
    "versions": ("--against", str(ROOT), "--features", "512", "--rows", "256", "--gib", "0.05", "--rounds", "2"),
}


@pytest.mark.parametrize("name", SMALL)
def test_bench_runs(name: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "scripts" / "bench"), name, *SMALL[name], "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text())["results"]
