"""NumPy data and files through a layer without torch: its import alone takes longer than many a job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent / "helpers" / "without_torch.py"


def run_without_torch(device: str, folder: Path) -> dict[str, list[str]]:
    command = [sys.executable, str(PROGRAM), device, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_runs_of_numpy_data_and_files_import_no_torch(tmp_path: Path) -> None:
    """From start to exit: report, JSON, trace and progress bar too. The first run has loaded nothing heavy either."""
    assert run_without_torch("sim", tmp_path) == {"tried": [], "loaded": []}
