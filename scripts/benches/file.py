"""`scripts/bench file`: a .npy through run_pipelined in a process of its own, with its resident memory; every row is
checked."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benches.case import Outcome
from benches.common import GIB, run_process
from benches.layers import ALLOWED, random_layer, verdict, worst_difference


def write_rows(path: Path, rows: int, features: int, block_rows: int = 65536) -> None:
    """A .npy of random rows, of which no two blocks are alike."""
    import numpy as np

    x = np.lib.format.open_memmap(path, "w+", np.float32, (rows, features))
    block = np.random.default_rng(1).standard_normal((min(rows, block_rows), features), dtype=np.float32)
    for row in range(0, rows, len(block)):
        x[row : row + len(block)] = block[: rows - row]
        x[row : row + len(block), 0] += np.float32(row // len(block))
    x.flush()


def difference(layer: Any, x_path: Path, y_path: Path, devices: str) -> float:
    """The worst difference of all rows; of 512 of them where there is no GPU to compute the others."""
    import numpy as np

    x, y = np.load(x_path, mmap_mode="r"), np.load(y_path, mmap_mode="r")
    if devices != "cpu":
        return worst_difference(layer, x, y)
    picked = np.random.default_rng(2).choice(len(x), min(len(x), 512), replace=False)
    want = layer.reference(x[picked])
    return float((np.abs(y[picked] - want) / (1 + np.abs(want))).max())


class File:
    name = "file"
    about = "a .npy through run_pipelined, with the resident memory of the process"
    needs = ()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--gib", type=float, default=16)
        parser.add_argument("--features", type=int, default=4096)
        parser.add_argument("--precision", default="tf32", choices=("tf32", "ieee", "fp32"))
        parser.add_argument("--devices", default="cuda:0")
        parser.add_argument("--directory", help="where the files go; default: the system's folder for temporary files")

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        from safetensors.numpy import save_file

        rows = int(options.gib * GIB) // (options.features * 4)
        layer = random_layer(options.features, options.precision)
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            x, y, weights = (Path(folder) / name for name in ("x.npy", "y.npy", "layer.safetensors"))
            save_file({"weight": layer.weight, "bias": layer.bias}, weights)
            write_rows(x, rows, options.features)
            result = run_process("file_process.py", str(weights), str(x), str(y), options.precision, options.devices)
            worst = difference(layer, x, y, options.devices)
        result["worst_difference"] = worst
        quarters = ", ".join(f"{value / GIB:.2f}" for value in result["resident_bytes_at_quarters"])
        print(
            f"{options.gib:g} GiB .npy to .npy in {result['seconds']:.1f} s: peak resident "
            f"{result['peak_resident_bytes'] / GIB:.2f} GiB ({quarters} GiB at the quarters of the run), "
            f"{verdict(worst, options.precision)}, bound by {result['stats']['bound']}"
        )
        right = worst <= ALLOWED[options.precision]
        yield Outcome(result, right=right, facts={"features": options.features})
