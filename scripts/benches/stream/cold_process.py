"""The process that the case `cold` measures: `run_pipelined` for the first time, again and again, and a warm Pipeline
of the same arrays. It never imports torch itself.

Its arguments: the checkout's folder, rows, features, precision, device, "pinned" or "ordinary", "context" where CUDA is
started before the first call.
"""

import itertools
import json
import sys
import time
from pathlib import Path

root, precision, device, memory, cuda = sys.argv[1], *sys.argv[4:8]
rows, features = int(sys.argv[2]), int(sys.argv[3])
sys.path[0] = root  # in place of this folder
sys.path.insert(1, f"{root}/scripts")

import numpy as np  # noqa: E402

from benches.pages import cores, in_threads  # noqa: E402

BLOCK_ROWS = 1024
CALLS, WARM_RUNS = 5, 5


def status_bytes(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def written_arrays() -> tuple[np.ndarray, np.ndarray]:
    """Random rows, of which no two blocks are alike, and a result of NaN."""
    block = np.random.default_rng(0).standard_normal((BLOCK_ROWS, features), np.float32)
    x, y = np.empty((rows, features), np.float32), np.empty((rows, features), np.float32)
    numbers = itertools.count()

    def write() -> None:
        while (row := next(numbers) * BLOCK_ROWS) < rows:
            x[row : row + BLOCK_ROWS] = block[: rows - row]
            x[row : row + BLOCK_ROWS, 0] += np.float32(row // BLOCK_ROWS / 1024)
            y[row : row + BLOCK_ROWS] = np.nan

    in_threads(write, cores())
    return x, y


x, y = written_arrays()
weight = (np.random.default_rng(1).random((features, features), np.float32) * 2 - 1) / np.float32(features) ** 0.5
array_bytes = x.nbytes + y.nbytes + weight.nbytes
picked = np.unique(np.append(np.random.default_rng(2).choice(rows, min(rows, 64), replace=False), [0, rows - 1]))

import pipeline  # noqa: E402
from pipeline import FusedLinear, Pipeline, run_pipelined  # noqa: E402

layer = FusedLinear(weight, None, 2.0, precision=precision)
if cuda == "context":
    from pipeline.kernels.launch import Launcher

    Launcher.for_device(0)
pins = [pipeline.pin(array) for array in (x, y)] if memory == "pinned" else []
before_bytes, modules = status_bytes("VmRSS"), len(sys.modules)
moments: list[float] = []


def note(_: pipeline.Progress) -> None:
    moments.append(time.perf_counter())


calls: list[float] = []
for number in range(CALLS):
    start = time.perf_counter()
    result = run_pipelined(layer, x, y, devices=device, progress=note)
    calls.append(time.perf_counter() - start)
    if number == 0:
        first_chunk_s, first_modules = moments[0] - start, len(sys.modules) - modules
        peak_bytes, first_rows, first = status_bytes("VmHWM"), y[picked], result.stats.as_dict()

release = getattr(pipeline, "release", None)
if release is not None:
    release()  # what calls have kept: a Pipeline has its own
warm: list[float] = []
with Pipeline(layer, devices=device) as pipe:
    for _ in range(1 + WARM_RUNS):
        start = time.perf_counter()
        pipe.run(x, y, progress=note)
        warm.append(time.perf_counter() - start)

want = layer.reference(x[picked])
differences = [np.abs(got - want) / (1 + np.abs(want)) for got in (first_rows, y[picked])]
for pinned in pins:
    pinned.close()
print(
    json.dumps(
        {
            "calls_s": calls,
            "warm_runs_s": warm[1:],
            "first_chunk_s": first_chunk_s,
            "first_setup_s": first.get("setup_s"),
            "first_run_s": first.get("run_s"),
            "first_stats_s": first["seconds"],
            "modules_imported_by_first_call": first_modules,
            "pinned_bytes": first["pinned_bytes"],
            "array_bytes": array_bytes,
            "resident_before_bytes": before_bytes - array_bytes,
            "peak_beyond_arrays_bytes": peak_bytes - array_bytes,
            "worst_difference": float(np.max(differences)),  # NaN where a row wasn't written
            "torch_imported": "torch" in sys.modules,
        }
    )
)
