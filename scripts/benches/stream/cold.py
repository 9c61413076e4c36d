"""`run_pipelined` in fresh processes: the first call, the second and later ones beyond a warm Pipeline of the same
arrays, the first chunk after the call, resident memory."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benches.case import GPU, Case, Outcome
from benches.common import GIB, run_process, summary
from benches.layers import ALLOWED, larger
from benches.turns import turns

SHORT_ROWS = 1024
BESIDE = ("first_chunk_s", "first_setup_s", "first_run_s", "modules_imported_by_first_call", "pinned_bytes")
RESIDENT = ("resident_before_bytes", "peak_beyond_arrays_bytes")


@dataclass(frozen=True)
class Kind:
    """What a process has before its first call, and how many rows it calls with."""

    rows: int
    memory: str  # "pinned", by pipeline.pin, or "ordinary"
    cuda: str = "context"  # or "no context": CUDA starts within the first call


def kinds(gib: float, features: int) -> dict[str, Kind]:
    """The processes by name. Two sizes tell what memory grows with."""
    rows = int(gib * GIB) // (4 * features)
    return {
        f"{gib:g} GiB pinned": Kind(rows, "pinned"),
        f"{gib:g} GiB ordinary": Kind(rows, "ordinary"),
        f"{SHORT_ROWS:,} rows pinned": Kind(SHORT_ROWS, "pinned"),
        f"{gib / 4:g} GiB ordinary": Kind(rows // 4, "ordinary"),
        f"{gib / 4:g} GiB ordinary, CUDA not started": Kind(rows // 4, "ordinary", "no context"),
    }


def run_kind(kind: Kind, features: int, precision: str, device: str = "cuda:0") -> dict[str, Any]:
    """One process: what it took, in seconds, and whether its rows are right."""
    arguments = str(kind.rows), str(features), precision, device, kind.memory, kind.cuda
    found = run_process("stream/cold_process.py", *arguments)
    warm_s, calls = statistics.median(found["warm_runs_s"]), found["calls_s"]
    later_s = statistics.median(calls[2:])
    seconds = {"first_s": calls[0], "second_s": calls[1], "later_s": later_s, "warm_s": warm_s}
    beyond = {"first_beyond_warm_s": calls[0] - warm_s, "second_beyond_warm_s": calls[1] - warm_s}
    return {**found, **seconds, **beyond, "right": found["worst_difference"] <= ALLOWED[precision]}


def summarized(processes: list[dict[str, Any]]) -> dict[str, Any]:
    """Several processes of a kind: medians with their range."""
    times = ("first_s", "second_s", "later_s", "warm_s", "first_beyond_warm_s", "second_beyond_warm_s")
    found: dict[str, Any] = {
        name: summary([float(each[name]) for each in processes])
        for name in (*times, *BESIDE, *RESIDENT)
        if processes[0][name] is not None  # a version that doesn't tell
    }
    return {
        **found,
        "processes": len(processes),
        "all_calls_s": [each["calls_s"] for each in processes],
        "torch_imported": any(each["torch_imported"] for each in processes),
        "worst_difference": functools.reduce(larger, (each["worst_difference"] for each in processes)),
        "right": all(each["right"] for each in processes),
    }


def show(name: str, found: dict[str, Any]) -> None:
    def ms(what: str) -> str:
        return f"{1e3 * found[what]['median']:.1f} ({1e3 * found[what]['min']:.1f} to {1e3 * found[what]['max']:.1f})"

    right = "right" if found["right"] else "WRONG RESULT"
    torch = ", torch was imported" if found["torch_imported"] else ""
    print(
        f"{name}, {found['processes']} processes, {right}{torch}\n"
        f"  first call {ms('first_s')} ms, second {ms('second_s')}, later {ms('later_s')}, warm Pipeline "
        f"{ms('warm_s')}\n"
        f"  first call beyond a warm Pipeline: {ms('first_beyond_warm_s')} ms; second call beyond: "
        f"{ms('second_beyond_warm_s')} ms\n"
        f"  first chunk {1e3 * found['first_chunk_s']['median']:.0f} ms after the first call, which imported "
        f"{found['modules_imported_by_first_call']['median']:.0f} modules; "
        f"{found['pinned_bytes']['median'] / 2**20:.0f} MiB pinned; peak resident "
        f"{found['peak_beyond_arrays_bytes']['median'] / 1e6:.0f} MB beyond the arrays (before the call "
        f"{found['resident_before_bytes']['median'] / 1e6:.0f})",
        flush=True,
    )


class Cold(Case):
    name = "cold"
    about = __doc__
    needs = (GPU,)

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        tried = kinds(options.gib, options.features)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in tried}
        for kind in tried.values():  # kernels are compiled and the machine is measured once
            run_kind(kind, options.features, options.precision)
        begin = time.perf_counter()
        results: dict[str, Any] = {}
        for n, name in turns(tried, options.rounds):
            found[name].append(run_kind(tried[name], options.features, options.precision))
            if all(len(processes) == n + 1 for processes in found.values()):
                results = {each: summarized(processes) for each, processes in found.items()}
                print(f"round {n + 1} of {options.rounds}: {time.perf_counter() - begin:.0f} s", flush=True)
                yield Outcome(results, all(each["right"] for each in results.values()))
        for name, each in results.items():
            show(name, each)
