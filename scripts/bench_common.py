"""What the benches share: the context of a run, summaries, a random layer, the check of every row."""

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

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
sys.path.insert(0, str(ROOT))


def output_of(*command: str) -> str:
    """What a command prints, stripped; "" where it isn't installed or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def context() -> dict[str, Any]:
    """What a reader needs to repeat a run: commit, machine, command, time."""
    query = "--query-gpu=name,driver_version,power.limit,clocks.max.sm"
    return {
        "command": re.sub(r" --(json|directory) \S+", "", " ".join(["scripts/bench", *sys.argv[1:]])),
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


# The largest |y - reference| / (1 + |reference|) that rounding explains with this file's data, z of standard deviation
# 0.6. tf32: both operands of each product are off by at most 2**-12, together 1.2e-4 of z's size at one standard
# deviation, 8e-4 at the 6.5 that billions of results reach. fp32: sums of thousands of terms.
ALLOWED = {"tf32": 2e-3, "ieee": 1e-5, "fp32": 1e-5}
ALLOWED_CUBLAS = {**ALLOWED, "ieee": 4e-5, "fp32": 4e-5}  # which sums fp32 products one after another


def verdict(difference: float, precision: str) -> str:
    return f"every row right, worst difference {difference:.1e}" if difference <= ALLOWED[precision] else "WRONG RESULT"


def worst_difference(torch: Any, layer: Any, x: Any, y: Any, rows: int = 8192) -> float:
    """The largest |y - float64 reference| / (1 + |reference|) over ALL rows, computed on the GPU chunk by chunk."""
    weight = torch.from_numpy(layer.weight).cuda().double().T
    bias = torch.from_numpy(layer.bias).cuda().double()
    worst = 0.0
    for row in range(0, len(x), rows):
        z = torch.addmm(bias, torch.asarray(x[row : row + rows], copy=True).cuda().double(), weight)
        want = layer.scaling_factor * torch.sigmoid(z) + z
        got = torch.asarray(y[row : row + rows], copy=True).cuda().double()
        difference = ((got - want).abs() / (1 + want.abs())).max().item()
        if not difference <= worst:  # NaN counts
            worst = difference
    return worst


def random_layer(features: int, precision: str, out_features: int | None = None) -> Any:
    """A layer of random weights, as wide at its end as at its beginning unless `out_features` says otherwise."""
    import numpy as np

    from pipeline import FusedLinear

    rng = np.random.default_rng(0)
    bound, out_features = features**-0.5, out_features or features
    weight = rng.uniform(-bound, bound, (out_features, features)).astype(np.float32)
    return FusedLinear(weight, rng.uniform(-bound, bound, out_features).astype(np.float32), 2.0, precision=precision)
