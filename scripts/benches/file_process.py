"""The process that `scripts/bench file` measures: one run from file to file, and how much memory was resident."""

import json
import sys
import threading
import time
from pathlib import Path

root, weights, x, y, precision, devices = sys.argv[1:]
sys.path[0] = root  # in place of this folder


def resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


samples: list[tuple[float, int]] = []
stop = threading.Event()


def sample() -> None:
    while not stop.wait(0.1):
        samples.append((time.perf_counter(), resident_bytes()))


threading.Thread(target=sample, daemon=True).start()

from pipeline import FusedLinear, run_pipelined  # noqa: E402

layer = FusedLinear.from_file(weights, 2.0, precision=precision)
start = time.perf_counter()
result = run_pipelined(layer, x, y, devices=devices)
end = time.perf_counter()
stop.set()
running = [n_bytes for when, n_bytes in samples if start < when < end] or [resident_bytes()]
print(
    json.dumps(
        {
            "seconds": end - start,
            "peak_resident_bytes": max(running),
            "resident_bytes_at_quarters": [running[int(q * (len(running) - 1) / 4)] for q in range(5)],
            "stats": result.stats.as_dict(),
        }
    )
)
