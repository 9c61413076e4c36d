"""The process that the case `start` measures: the first chunk after the call, and the peak of resident memory beyond
the arrays. It never imports torch."""

import json
import sys
import time
from pathlib import Path

root, rows, features, precision, cuda, way = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:7]
sys.path[0] = root  # in place of this folder

import numpy as np  # noqa: E402


def status_bytes(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def random_rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    block = rng.standard_normal((1024, features), np.float32)
    x = np.empty((rows, features), np.float32)
    for row in range(0, rows, 1024):
        x[row : row + 1024] = block[: rows - row]
    return x


x = random_rows()
y = np.zeros_like(x)
y[:] = np.nan
weight = (np.random.default_rng(1).random((features, features), np.float32) * 2 - 1) / np.float32(features) ** 0.5
array_bytes = x.nbytes + y.nbytes + weight.nbytes

import pipeline  # noqa: E402

layer = pipeline.FusedLinear(weight, None, 2.0, precision=precision)
if cuda == "context":
    from pipeline.kernels.launch import Launcher

    Launcher.for_device(0)
before_bytes = status_bytes("VmRSS")
moments: list[float] = []
start = time.perf_counter()
if way == "whole":
    result = pipeline.run_pipelined(
        layer, x, y, devices="cuda:0", progress=lambda _: moments.append(time.perf_counter())
    )
    imported = opened = start
else:  # the same in steps
    from pipeline import Pipeline

    imported = time.perf_counter()
    with Pipeline(layer, devices="cuda:0") as pipe:
        opened = time.perf_counter()
        result = pipe.run(x, y, progress=lambda _: moments.append(time.perf_counter()))
end = time.perf_counter()
if np.isnan(y[-1]).any():
    raise SystemExit("the last row of the result wasn't written")
print(
    json.dumps(
        {
            "first_chunk_s": moments[0] - start,
            "seconds": end - start,
            "import_s": imported - start,
            "open_s": opened - imported,
            "run_to_first_chunk_s": moments[0] - opened,
            "pinned_bytes": result.stats.pinned_bytes,
            "array_bytes": array_bytes,
            "resident_before_bytes": before_bytes - array_bytes,
            "peak_beyond_arrays_bytes": status_bytes("VmHWM") - array_bytes,
            "torch_imported": "torch" in sys.modules,
        }
    )
)
