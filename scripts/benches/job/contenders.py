"""The processes that `scripts/bench job` times: our command line, the plain script, and what they can't do without."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benches.common import ROOT
from benches.job.dataset import Dataset
from benches.layers import ALLOWED, ALLOWED_CUBLAS

OURS, PLAIN = "pipeline run", "plain script"
CONTEXT = "CUDA context alone, cuda.core"
IMPORT, TORCH_CONTEXT = "import torch", "import torch and a context"
SCALE = 2.0
LIMIT_S = 300  # a process that takes longer is stopped and has failed
REST = "interpreter, imports, exit"


@dataclass(frozen=True)
class Contender:
    """A process. `command` says what it runs for a dataset, `parts` what it printed about its own time."""

    command: Callable[[Dataset], list[str]]
    parts: Callable[[str], dict[str, float]] | None = None
    """None: it moves no rows, and says nothing."""
    allowed: float = 0.0
    """How far its results may be from float64."""

    @property
    def moves_rows(self) -> bool:
        return self.parts is not None


def all_contenders(options: argparse.Namespace) -> dict[str, Contender]:
    """All that this machine can run, by name."""
    files = ("--precision", options.precision, "--scale", str(SCALE))
    ours = [sys.executable, "-m", "pipeline", "run", "--json", "--no-progress", "--devices", options.devices, *files]
    device = options.devices.split(",")[0]
    plain = [sys.executable, str(Path(__file__).parent / "plain_script.py"), *files, "--device", device]
    plain += ["--chunk-mib", str(options.plain_mib)]
    found = {
        OURS: Contender(lambda data: [*ours, *_ends(data)], ours_parts, ALLOWED[options.precision]),
        PLAIN: Contender(lambda data: [*plain, *_ends(data)], plain_parts, ALLOWED_CUBLAS[options.precision]),
        IMPORT: _program("import torch"),
    }
    if options.devices != "cpu":
        found[CONTEXT] = _program("from cuda.core import Device; Device(0).set_current()")
        found[TORCH_CONTEXT] = _program("import torch; torch.zeros(1, device='cuda'); torch.cuda.synchronize()")
    return found


def _ends(data: Dataset) -> list[str]:
    return [str(data.x), "--weights", str(data.weights), "--out", str(data.y)]


def _program(text: str) -> Contender:
    return Contender(lambda _: [sys.executable, "-c", text])


def ours_parts(printed: str) -> dict[str, float]:
    """Where our process's time went by its own word: set-up, run and finish of the call, by `--json`."""
    stats = json.loads(printed)["stats"]
    finish_s, setup_s = stats.get("finish_s", 0.0), stats.get("setup_s", 0.0)
    run_s = stats.get("run_s", stats["seconds"] - setup_s - finish_s)
    return {"set-up": setup_s, "run": run_s, "finish": finish_s}


def ours_says_s(printed: str) -> float | None:
    """What the whole process took by our own word."""
    found = json.loads(printed)
    said = found.get("process_seconds", found["stats"].get("process_seconds"))
    return None if said is None else float(said)


def plain_parts(printed: str) -> dict[str, float]:
    return {name: float(seconds) for name, seconds in json.loads(printed).items()}


def run_whole(contender: Contender, data: Dataset) -> dict[str, Any]:
    """One process, from before it is started until it has ended.

    Raises:
        RuntimeError: it failed; the text is what it wrote.
    """
    spawn = [sys.executable, str(Path(__file__).parent / "spawn.py"), str(LIMIT_S), *contender.command(data)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(spawn, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    if found["status"]:
        command = " ".join(spawn[3:])
        raise RuntimeError(f"{command} ended with status {found['status']}:\n{found['output']}{found['errors']}")
    return found
