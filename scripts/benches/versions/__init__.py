"""`scripts/bench versions`: this checkout against another one, in one run, in turns.

Each checkout has a process of its own, which imports its package; one at a time measures. Host memory is shared between
them, so that where it lies favours neither. Times are of the same inputs, and outputs are compared with float64 and,
bit for bit, with each other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benches.case import GPU, Need, Outcome
from benches.common import GIB, ROOT, summary
from benches.layers import ALLOWED
from benches.turns import turns
from benches.versions.tree import Tree

KINDS = ("kernel", "pinned", "ordinary", "short")
PRECISIONS = ("bf16", "tf32", "fp32")
SHORT_ROWS, SHORT_RUNS = 1024, 20
BLOCK_ROWS = 8192  # random numbers are made once, for so many rows
MATTERS = 0.01  # a smaller difference of two medians says nothing


@dataclass(frozen=True)
class Measured:
    """One thing that both checkouts do. `spec` is the worker's; `count` calls a turn, or as many as take `burst_s`."""

    name: str
    spec: dict[str, Any]
    count: int | None = None


def all_measured(options: argparse.Namespace) -> list[Measured]:
    """What the options ask for."""
    kinds = options.case or [kind for kind in KINDS if options.device != "cpu" or kind in ("kernel", "ordinary")]
    common = {"device": options.device, "features": options.features}
    found = []
    if "kernel" in kinds:
        for precision in options.precision or PRECISIONS:
            for rows in options.rows or (1024, 8192):
                spec = {"kind": "kernel", "precision": precision, "rows": rows, **common}
                found.append(Measured(f"kernel {precision}, {rows:,} rows", spec))
    host = {"kind": "host", "precision": "tf32", **common}
    for memory in ("ordinary", "pinned"):
        if memory in kinds:
            name = f"{memory} memory, {options.gib:g} GiB each way"
            found.append(Measured(name, {**host, "memory": memory, "rows": host_rows(options)}, count=1))
    if "short" in kinds:
        spec = {**host, "memory": "pinned", "rows": SHORT_ROWS}
        found.append(Measured(f"{SHORT_ROWS:,} rows, pinned, warm", spec, count=SHORT_RUNS))
    return found


def host_rows(options: argparse.Namespace) -> int:
    """Rows of `--gib` each way, at least enough for the short runs."""
    return max(SHORT_ROWS, int(options.gib * GIB) // (4 * options.features))


def shared_memory(rows: int, features: int) -> int:
    """A descriptor of memory for x and y, float32, x filled with random rows; nobody but its holders sees it."""
    fd = os.memfd_create("versions")
    os.truncate(fd, 2 * rows * features * 4)
    if rows:
        flat = np.memmap(f"/proc/self/fd/{fd}", np.float32, "r+")
        x, y = flat.reshape(2, rows, features)
        block = np.random.default_rng(1).standard_normal((min(rows, BLOCK_ROWS), features), dtype=np.float32)
        for row in range(0, rows, len(block)):
            x[row : row + len(block)] = block[: rows - row]
            x[row : row + len(block), 0] += np.float32(row // len(block))  # so that no two blocks are alike
        y.fill(np.nan)
    return fd


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """This checkout's time by the other's: of the medians, and the quartiles of the rounds' ratios."""
    paired = [after / before for before, after in zip(seconds["before"], seconds["after"], strict=True)]
    low, _, high = statistics.quantiles(paired, n=4, method="inclusive") if len(paired) > 1 else paired * 3
    median = statistics.median(seconds["after"]) / statistics.median(seconds["before"])
    return {"of_medians": median, "lower_quartile": low, "upper_quartile": high}


def verdict(ratio: dict[str, float]) -> str:
    """ "slower" or "faster" where three quarters of the rounds say so, and the medians differ enough to matter."""
    if abs(ratio["of_medians"] - 1) < MATTERS:
        return "within the spread"
    if ratio["lower_quartile"] > 1:
        return "slower"
    return "faster" if ratio["upper_quartile"] < 1 else "within the spread"


def measure(case: Measured, trees: dict[str, Tree], options: argparse.Namespace) -> dict[str, Any]:
    """Both checkouts' seconds of a call, in turns, and whether their results are right and the same."""
    checks = {label: tree.ask("open", case=case.spec) for label, tree in trees.items()}
    count = case.count or trees["before"].ask("count", seconds=options.burst_ms / 1e3)
    seconds: dict[str, list[float]] = {label: [] for label in trees}
    for _, label in turns(trees, options.rounds):
        time.sleep(options.rest_ms / 1e3)
        seconds[label].append(trees[label].ask("measure", count=count))
    for tree in trees.values():
        tree.ask("close")
    precision = "bfloat16" if case.spec["precision"] == "bf16" else case.spec["precision"]
    ratio = ratios(seconds)
    return {
        "seconds": {label: summary(samples) for label, samples in seconds.items()},
        "time_after_by_before": ratio,
        "verdict": verdict(ratio),
        "calls_per_turn": count,
        "worst_difference": {label: check["difference"] for label, check in checks.items()},
        "right": all(check["difference"] <= ALLOWED[precision] for check in checks.values()),
        "same_bits": len({check["digest"] for check in checks.values()}) == 1,
    }


def show(name: str, found: dict[str, Any]) -> None:
    ratio, ms = found["time_after_by_before"], {label: 1e3 * s["median"] for label, s in found["seconds"].items()}
    print(
        f"{name:34} before {ms['before']:9.3f} ms, after {ms['after']:9.3f} ms: {ratio['of_medians']:.3f} of the time "
        f"({ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f}), {found['verdict']}; "
        f"{'right' if found['right'] else 'WRONG RESULT'}, {'same bits' if found['same_bits'] else 'OTHER BITS'}",
        flush=True,
    )


class Versions:
    name = "versions"
    about = "this checkout against another one, in turns"
    needs: tuple[Need, ...] = ()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--against", required=True, type=Path, metavar="DIR", help="the other, earlier checkout")
        parser.add_argument("--case", action="append", choices=KINDS, help="repeatable; default all the device has")
        parser.add_argument("--device", default="cuda:0", help='"cpu", or a GPU; default cuda:0')
        parser.add_argument("--rounds", type=int, default=15)
        parser.add_argument("--burst-ms", type=float, default=40, help="length of a kernel's turn")
        parser.add_argument("--rest-ms", type=float, default=80, help="rest before each turn")
        parser.add_argument("--precision", action="append", choices=PRECISIONS, help="of kernels; repeatable")
        parser.add_argument("--rows", action="append", type=int, help="of kernels; repeatable; default 1024 and 8192")
        parser.add_argument("--features", type=int, default=8192)
        parser.add_argument("--gib", type=float, default=16, help="host to host, each way")

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        if not (options.against / "pipeline" / "__init__.py").is_file():
            raise SystemExit(f"--against is {str(options.against)!r}, expected the folder of a checkout")
        if options.device != "cpu" and not GPU.is_there():
            raise SystemExit(f"scripts/bench versions needs {GPU.missing}: pass --device cpu")
        cases = all_measured(options)
        rows = max([case.spec["rows"] for case in cases if case.spec["kind"] == "host"], default=0)
        results: dict[str, Any] = {}
        with ExitStack() as stack:
            caches = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            fd = shared_memory(rows, options.features)
            stack.callback(os.close, fd)
            folders = {"before": options.against.resolve(), "after": ROOT}
            trees = {label: stack.enter_context(Tree(folder, caches / label, fd)) for label, folder in folders.items()}
            facts = {"trees": {label: tree.about() for label, tree in trees.items()}, "device": options.device}
            for case in cases:
                results[case.name] = measure(case, trees, options)
                show(case.name, results[case.name])
                yield Outcome(results, all(found["right"] for found in results.values()), facts)
