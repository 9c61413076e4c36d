"""Ordinary to ordinary memory for many rings and worker counts."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from typing import Any

from benches.case import GPU, Case, Outcome
from benches.common import summary
from benches.stream.rows import rows_for
from benches.turns import turns


def settings() -> dict[str, dict[str, str]]:
    """Name -> the environment variables that choose a ring and its workers."""
    cores = len(os.sched_getaffinity(0))
    sizes = [(mib, 6) for mib in (8, 4, 6, 10, 12, 16)]
    sizes += [(8, pieces) for pieces in (4, 5, 8, 10)] + [(12, 4), (16, 4), (4, 12)]
    chosen = [(mib, pieces, cores - 2) for mib, pieces in sizes]
    chosen += [(8, 6, workers) for workers in (cores // 2, cores - 4, cores - 3, cores - 1, cores)]
    return {
        f"{pieces} x {mib} MiB, {max(1, workers)} workers": {
            "PIPELINE_PIECE_BYTES": str(mib * 2**20),
            "PIPELINE_RING_PIECES": str(pieces),
            "PIPELINE_COPY_WORKERS": str(max(1, workers)),
        }
        for mib, pieces, workers in chosen
    }


class Sweep(Case):
    name = "sweep"
    about = __doc__
    needs = (GPU,)

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        from pipeline import Pipeline

        rows, tried = rows_for(options), settings()
        x, y = rows.x.numpy(), rows.y.numpy()
        rates: dict[str, list[float]] = {}
        before = dict(os.environ)
        for _, name in turns(tried, options.rounds):
            os.environ.update(tried[name])
            with Pipeline(rows.layer, devices="cuda:0") as pipe:
                pipe.run(x[: len(x) // 8], y[: len(y) // 8])
                rates.setdefault(name, []).append(pipe.run(x, y).stats.gb_per_s_in)
        for name in ("PIPELINE_PIECE_BYTES", "PIPELINE_RING_PIECES", "PIPELINE_COPY_WORKERS"):
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]
        ceiling = int(rows.x.nbytes) / statistics.median(rows.ceiling_s() for _ in range(3)) / 1e9
        print(f"ring and workers, ordinary to ordinary memory; ceiling {ceiling:.1f} GB/s each way")
        for name, values in sorted(rates.items(), key=lambda item: -statistics.median(item[1])):
            print(f"  {name:44} {statistics.median(values):6.2f} ({min(values):.2f} to {max(values):.2f})", flush=True)
        found: dict[str, Any] = {name: summary(values) for name, values in rates.items()}
        yield Outcome({"ceiling_gb_per_s": ceiling, "gb_per_s": found})
