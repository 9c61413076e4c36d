"""The first chunk after the call and resident memory, each in a process of its own, at two sizes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from benches.case import GPU, Case, Outcome
from benches.common import GIB, run_process, summary


def processes(gib: float) -> tuple[tuple[str, float, str, str], ...]:
    """Name, GiB each way, whether CUDA is started before the call, and how the call is made."""
    return (
        ("a quarter, CUDA started", gib / 4, "context", "whole"),
        ("whole, CUDA started", gib, "context", "whole"),
        ("a quarter, CUDA not started", gib / 4, "no context", "whole"),
        ("a quarter, in steps", gib / 4, "context", "steps"),
    )


class Start(Case):
    name = "start"
    about = __doc__
    needs = (GPU,)

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        results: dict[str, Any] = {}
        for name, gib, cuda, way in processes(options.gib):
            rows = int(gib * GIB) // (4 * options.features)
            arguments = str(rows), str(options.features), options.precision, cuda, way
            found = [run_process("stream/start_process.py", *arguments) for _ in range(1 + min(3, options.rounds))]
            # The first process warms the caches.
            results[name] = {key: summary([float(each[key]) for each in found[1:]]) for key in found[0]}
            middle = {key: value["median"] for key, value in results[name].items()}
            told = f"{middle['first_chunk_s']:.3f} s after the call (imports {middle['import_s']:.3f}, opening "
            told += f"{middle['open_s']:.3f}, then {middle['run_to_first_chunk_s']:.3f})"
            print(
                f"{gib:g} GiB each way, {name}: first chunk {told}, all done after {middle['seconds']:.2f} s, "
                f"{middle['pinned_bytes'] / 2**20:.0f} MiB pinned, peak resident "
                f"{middle['peak_beyond_arrays_bytes'] / 1e6:.0f} MB beyond the arrays (before the call "
                f"{middle['resident_before_bytes'] / 1e6:.0f})",
                flush=True,
            )
            yield Outcome(results)
