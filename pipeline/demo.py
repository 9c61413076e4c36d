"""The demonstration that `pipeline demo` shows: a random dataset through the layer, checked and timed."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import OutputError
from pipeline.layer.linear import FusedLinear
from pipeline.report.stats import Stats

if TYPE_CHECKING:
    import torch

_SAMPLED_ROWS = 64
_REPEATS = 3
_SLOW_S = 4.0  # after a run that takes longer, one timed repeat has to do


@dataclass(frozen=True)
class Demo:
    """What the demonstration found. Errors are relative to the largest value; seconds are of runs after the first."""

    stats: Stats
    sampled_rows: int
    error: float
    torch_error: float
    allowed_error: float
    torch_device: str
    seconds: list[float]
    torch_seconds: list[float]

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed_error

    @property
    def ratio(self) -> float:
        """How many times as long the plain torch loop took."""
        return statistics.median(self.torch_seconds) / statistics.median(self.seconds)


def run_demo(
    names: list[str], rows: int | None, in_features: int | None, out_features: int | None, say: Callable[[str], object]
) -> Demo:
    """Stream random rows from file to file on the named devices, check sampled rows, and time a plain torch loop too.

    Sizes of None are chosen for the device. `say` is given lines about what is being done.
    """
    import torch
    from safetensors.torch import save_file

    from pipeline.api import Pipeline

    on_gpu = names[0].startswith("cuda")
    rows = rows or (65_536 if on_gpu else 16_384)
    in_features, out_features = (n or (4_096 if on_gpu else 1_024) for n in (in_features, out_features))
    small = rows * max(in_features, out_features) < 2**26  # fewer than 8 chunks of the automatic size
    chunks = 8 if on_gpu else 2
    torch_device = names[0] if on_gpu and torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")  # NOTE: some containers turn tf32 on by an environment variable

    with tempfile.TemporaryDirectory(prefix="pipeline-demo-") as folder:
        n_bytes, free_bytes = rows * (in_features + 2 * out_features) * 4, shutil.disk_usage(folder).free
        if n_bytes > free_bytes:
            raise OutputError(
                f"the demo's files need {n_bytes / 2**30:,.1f} GiB in {tempfile.gettempdir()}, "
                f"{free_bytes / 2**30:,.1f} GiB are free; use fewer --rows, or set TMPDIR to another folder"
            )
        source, weights, out, torch_out = (
            Path(folder, f) for f in ("x.npy", "layer.safetensors", "y.npy", "torch.npy")
        )
        _write_random_npy(source, rows, in_features)
        linear = torch.nn.Linear(in_features, out_features)
        save_file(linear.state_dict(), weights)
        layer, linear = FusedLinear.from_file(weights, scaling_factor=2.0), linear.to(torch_device)
        gib_in, gib_out = (rows * n * 4 / 2**30 for n in (in_features, out_features))
        say(f"dataset: {rows:,} random rows, {gib_in:.3g} GiB in, {gib_out:.3g} GiB out")
        say(f"layer: {in_features} -> {out_features}, float32, scaling_factor {layer.scaling_factor}")

        seconds: list[float] = []
        torch_seconds: list[float] = []
        with Pipeline(layer, devices=names, chunk_rows=max(1, rows // chunks) if small else "auto") as pipe:
            repeats = _REPEATS
            while len(seconds) <= repeats:  # the first of each warms up
                out.unlink(missing_ok=True)
                torch_out.unlink(missing_ok=True)
                start = time.perf_counter()
                stats = pipe.run(source, out).stats
                middle = time.perf_counter()
                _torch_loop(linear, layer.scaling_factor, source, torch_out, pipe.chunk_rows)
                seconds.append(middle - start)
                torch_seconds.append(time.perf_counter() - middle)
                if max(seconds[-1], torch_seconds[-1]) > _SLOW_S:
                    repeats = 1
        sampled, error = _largest_error(layer, source, out)
        _, torch_error = _largest_error(layer, source, torch_out)

    # Rounding errors of a sum of n terms in order grow like sqrt(n), here counted from float32's 2**-23 (Higham,
    # Accuracy and Stability of Numerical Algorithms, 2.8); twice that leaves room for the largest of many results.
    allowed = 2 * 2**-23 * max(in_features, 64) ** 0.5
    return Demo(stats, sampled, error, torch_error, allowed, torch_device, seconds[1:], torch_seconds[1:])


def _write_random_npy(path: Path, rows: int, features: int) -> None:
    import numpy as np

    random = np.random.default_rng()
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, features)})
        for row in range(0, rows, 1024):
            file.write(random.standard_normal((min(1024, rows - row), features), np.float32).data)


def _torch_loop(linear: torch.nn.Linear, scaling_factor: float, source: Path, out: Path, chunk_rows: int) -> None:
    """The same run as a plain loop over chunks: read, copy to the device, compute, copy back, write."""
    import numpy as np
    import torch

    x, device = np.load(source, mmap_mode="c"), linear.weight.device
    with out.open("wb") as file, torch.no_grad():
        shape = (len(x), linear.out_features)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for row in range(0, len(x), chunk_rows):
            z = linear(torch.from_numpy(x[row : row + chunk_rows]).to(device))
            file.write((scaling_factor * torch.sigmoid(z) + z).cpu().numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _largest_error(layer: FusedLinear, source: Path, out: Path) -> tuple[int, float]:
    """Sampled rows of a result against float64: how many, and the largest error by the largest value.

    The first row, the last, and a random one in each of 62 equal parts.
    """
    import numpy as np

    x, y = np.load(source, mmap_mode="r"), np.load(out, mmap_mode="r")
    if y.shape != (len(x), layer.out_features):
        return 0, float("inf")
    edges = np.linspace(0, len(x), min(_SAMPLED_ROWS - 2, len(x)) + 1).astype(int)
    rows = np.unique([0, *np.random.default_rng().integers(edges[:-1], edges[1:]), len(x) - 1])
    expected = layer.reference(x[rows])
    return len(rows), float(np.abs(y[rows] - expected).max() / np.abs(expected).max())
