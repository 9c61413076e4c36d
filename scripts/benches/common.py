"""What all benches share: the context of a run, summaries of samples, the report."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
sys.path.insert(0, str(ROOT))  # this checkout is what is measured, whatever is installed


def output_of(*command: str) -> str:
    """What a command prints, stripped; "" where it isn't installed or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def context(command: str | None = None) -> dict[str, Any]:
    """What a reader needs to repeat a run: commit, machine, command, time."""
    query = "--query-gpu=name,driver_version,power.limit,clocks.max.sm"
    return {
        "command": command
        or re.sub(r" --(json|out|directory|against) \S+", "", " ".join(["scripts/bench", *sys.argv[1:]])),
        "commit": os.environ.get("PIPELINE_COMMIT")  # where the checkout has no .git
        or output_of("git", "describe", "--always", "--abbrev=40", "--dirty")
        or "unknown",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpus": output_of("nvidia-smi", query, "--format=csv,noheader").splitlines(),
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def summary(samples: list[float]) -> dict[str, float]:
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def write_json(path: str | None, document: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(document, indent=2) + "\n")


def run_process(program: str, *arguments: str) -> dict[str, Any]:
    """What a program beside this file prints as JSON, run in a process of its own with this checkout's package. The
    program is given the checkout's folder before the arguments.

    Raises:
        RuntimeError: it failed; the text is what it wrote to standard error.
    """
    command = [sys.executable, str(Path(__file__).parent / program), str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
