"""A warm .npy to a pinned result, and to another .npy, against what the disk writes."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benches.case import GPU, Case, Outcome
from benches.common import summary
from benches.layers import ALLOWED
from benches.stream import peers
from benches.stream.compare import Contender, all_right, compare, show
from benches.stream.rows import Rows, rows_for
from benches.turns import timed


def write_and_sync(array: Any, path: Path, workers: Any) -> None:
    """What the disk alone takes: a result's bytes, from memory, in pieces, with the pipeline's copy workers,
    preallocated and synchronised."""
    from pipeline.io.files import FileLayout, FileRows
    from pipeline.rows import Drain

    width = array.shape[1]
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.posix_fallocate(fd, 0, array.nbytes)
    step = max(1, 2**26 // (width * 4))
    for row in range(0, len(array), step):
        layout = FileLayout.in_order(fd, path, row * width * 4, width, 4, reads=False)
        workers.run(Drain(FileRows(layout, 0, None), 0, array[row : row + step]))
    os.fsync(fd)
    os.close(fd)


def to_pinned(rows: Rows, pipe: Any, x_path: Path, rounds: int) -> dict[str, Any]:
    """From the file to pinned memory, beside KvikIO where it is installed."""
    y, runs = rows.y_pinned, {"pipeline, .npy to pinned": lambda: pipe.run(x_path, rows.y_pinned)}
    offset = x_path.stat().st_size - rows.x.nbytes
    try:
        import kvikio  # noqa: F401

        forward = peers.torch_layer(rows.layer)
        runs["KvikIO to pinned"] = lambda: peers.kvikio_file(forward, str(x_path), offset, y, 1024)
    except ImportError:
        print("KvikIO isn't installed: no row for it")
    pipe.run(x_path, y)
    return compare(rows, {name: Contender(run, y) for name, run in runs.items()}, rounds)


def to_file(rows: Rows, pipe: Any, folder: Path, x_path: Path, rounds: int) -> dict[str, Any]:
    """From file to file, and the disk alone, in turns: neither pays for what was there before."""
    from pipeline.staging.native import open_workers

    y_path, alone = folder / "y.npy", folder / "z"
    workers = open_workers(pipe.staging.workers)
    writes, runs = [], []
    for _ in range(rounds):
        writes.append(timed(partial(write_and_sync, rows.y.numpy(), alone, workers))[0])
        alone.unlink()
        y_path.unlink(missing_ok=True)
        taken, result = timed(partial(pipe.run, x_path, y_path))
        runs.append(taken)
    workers.close()
    difference = rows.worst_difference(np.load(y_path))
    return {
        "bytes": int(rows.y.nbytes),
        "seconds": summary(runs),
        "write_seconds": summary(writes),
        "of_disk": statistics.median(writes) / statistics.median(runs),
        "worst_difference": difference,
        "stats": result.stats.as_dict(),
        "contenders": {"pipeline": {"right": difference <= ALLOWED[rows.precision]}},
    }


def show_file(found: dict[str, Any]) -> None:
    right = "right" if found["contenders"]["pipeline"]["right"] else "WRONG RESULT"
    print(
        f"warm .npy to .npy, {found['bytes'] / 1e9:.2f} GB: {found['seconds']['median']:.2f} s, writing and syncing "
        f"the result alone {found['write_seconds']['median']:.2f} s: {found['of_disk']:.2f} of the disk; {right}"
    )


class Files(Case):
    name = "file"
    about = __doc__
    needs = (GPU,)

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        from pipeline import Pipeline

        whole = rows_for(options)
        rows = whole.first(len(whole.x) // 2)
        results: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(dir=options.directory) as name, Pipeline(rows.layer, devices="cuda:0") as pipe:
            folder = Path(name)
            x_path = folder / "x.npy"
            np.save(x_path, rows.x.numpy())
            results["warm .npy to pinned"] = found = to_pinned(rows, pipe, x_path, options.rounds)
            show("warm .npy to pinned", found)
            yield Outcome(results, all_right(results))
            results["warm .npy to .npy"] = found = to_file(rows, pipe, folder, x_path, min(3, options.rounds))
            show_file(found)
        yield Outcome(results, all_right(results))
