"""NumPy data and files through a GPU without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[1] / "helpers" / "without_torch.py"


def test_gpu_runs_of_numpy_data_and_files_import_no_torch(tmp_path: Path) -> None:
    """From start to exit: report, JSON, trace and progress bar too. The first run has loaded nothing heavy either."""
    found = {}
    for attempt in ("compiling", "cached"):  # compiling takes cuda.core
        folder = tmp_path / attempt
        folder.mkdir()
        command = [sys.executable, str(PROGRAM), "cuda:0", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["tried"] == []
    assert found["loaded"] == []
