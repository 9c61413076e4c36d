"""Ordinary memory to ordinary memory, to a fresh result, pinned to pinned, and bf16 on the wire; what people write."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benches.case import GPU, Case, Outcome
from benches.common import GIB
from benches.pages import thread_counts, touch_fresh
from benches.stream import peers
from benches.stream.compare import ALLOWED_BF16, COPY_WORKERS, Contender, all_right, compare, show
from benches.stream.rows import Rows, rows_for

PEER_CHUNK_ROWS = (1024, 4096)  # what the recipes are tried with; the faster one counts
CLEARED_BYTES = 8 * GIB  # fresh memory that is cleared to see how fast that goes, unless the result is smaller


def fastest(run: Callable[[int], None]) -> int:
    """The chunk size with which a recipe is faster."""
    seconds = {}
    for rows in PEER_CHUNK_ROWS:
        start = time.perf_counter()
        run(rows)
        seconds[rows] = time.perf_counter() - start
    return min(seconds, key=lambda rows: seconds[rows])


def peer_contenders(rows: Rows, quick: bool) -> dict[str, Contender]:
    """What people write, with the chunk size that suits each best."""
    x, y, forward = rows.x, rows.y, peers.torch_layer(rows.layer)
    part = x[: len(x) // 4], y[: len(y) // 4]
    buffered = fastest(lambda n: peers.double_buffered(forward, *part, n))
    loader = fastest(lambda n: peers.data_loader(forward, *part, n, 0))
    runs: dict[str, Callable[[], None]] = {
        f"double-buffered, {buffered} rows": lambda: peers.double_buffered(forward, x, y, buffered),
        f"DataLoader, pin_memory, {loader} rows": lambda: peers.data_loader(forward, x, y, loader, 0),
        "loop, copied back": lambda: peers.copied_back(forward, x, y, 1024),
        "naive loop": lambda: peers.naive_loop(forward, x, y, 1024),
    }
    try:
        import nvidia.dali  # noqa: F401

        dali = fastest(lambda n: peers.dali_source(forward, *part, n))
        runs[f"DALI, external source, {dali} rows"] = lambda: peers.dali_source(forward, x, y, dali)
    except ImportError:
        print("DALI isn't installed: no row for it")
    if not quick:
        runs["DataLoader, pin_memory, 4 workers"] = lambda: peers.data_loader(forward, x, y, loader, 4)
    return {name: Contender(run, y) for name, run in runs.items()}


def from_pinned(rows: Rows, pipe: Any, rounds: int) -> dict[str, Any]:
    """The same arrays once more, registered where they lie."""
    from pipeline import pin

    with pin(rows.x.numpy()) as x, pin(rows.y.numpy()) as y:
        pipe.run(x, y)
        found = compare(rows, {"pipeline": Contender(lambda: pipe.run(x, y), rows.y)}, rounds)
        return {**found, "stats": pipe.run(x, y).stats.as_dict()}


def from_ordinary(rows: Rows, pipe: Any, narrow: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Ordinary memory in NumPy's huge pages and in torch's small ones, bf16 on the wire, and what people write."""
    import torch

    x, y = rows.x.numpy(), rows.y.numpy()
    for warm in (pipe, narrow):
        warm.run(x, y)
    contenders = {
        "pipeline": Contender(lambda: pipe.run(x, y), rows.y),
        "pipeline, wire_dtype bf16": Contender(lambda: narrow.run(x, y), rows.y, ALLOWED_BF16),
    }
    if rows.memory.roomy:
        small = rows.x.clone(), torch.zeros_like(rows.y)
        contenders["pipeline, torch's small pages"] = Contender(lambda: pipe.run(*small), small[1])
    else:
        print("memory is short: no row for torch's small pages")
    if not options.no_peers:
        contenders |= peer_contenders(rows, options.quick)
    found = compare(rows, contenders, options.rounds, alone={COPY_WORKERS: rows.copied_gb_per_s})
    stats = pipe.run(x, y).stats
    print(stats, flush=True)
    return {**found, "stats": stats.as_dict(), "stats_bf16": narrow.run(x, y).stats.as_dict()}


def clearing_gb_per_s(n_bytes: int, threads: int) -> float:
    """How fast so many threads get fresh memory cleared."""
    return n_bytes / touch_fresh(n_bytes, threads) / 1e9


def to_fresh(rows: Rows, pipe: Any, rounds: int) -> dict[str, Any]:
    """The ceiling is the bus, or how fast the system clears the result's pages, with the best number of threads."""
    x, n_bytes = rows.x.numpy(), min(int(rows.y.nbytes), CLEARED_BYTES)
    clearing = {f"clearing fresh pages, {n} threads": partial(clearing_gb_per_s, n_bytes, n) for n in thread_counts()}
    found = compare(rows, {"pipeline": Contender(lambda: pipe.run(x).out)}, rounds, alone=clearing)
    clearing_rate = max(rate["median"] for rate in found["alone_gb_per_s"].values())
    ceiling = min(clearing_rate, found["bytes_out"] / found["ceiling_s"]["median"] / 1e9)
    of_fresh = {name: row["gb_per_s_out"] / ceiling for name, row in found["contenders"].items()}
    fresh = {"clearing_gb_per_s": clearing_rate, "ceiling_gb_per_s": ceiling, "of_ceiling": of_fresh}
    return {**found, "fresh": fresh, "stats": pipe.run(x).stats.as_dict()}


def show_fresh(fresh: dict[str, Any]) -> None:
    clearing, ceiling = fresh["clearing_gb_per_s"], fresh["ceiling_gb_per_s"]
    for name, share in fresh["of_ceiling"].items():
        print(
            f"  {name}: {share:.3f} of what clearing pages ({clearing:.1f} GB/s) and the bus allow together, "
            f"{ceiling:.1f} GB/s",
            flush=True,
        )


class Memory(Case):
    name = "memory"
    about = __doc__
    needs = (GPU,)

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        from pipeline import Pipeline

        rows = rows_for(options, whole_pinned=False)
        results: dict[str, Any] = {}

        def add(title: str, found: dict[str, Any]) -> Outcome:
            results[title] = found
            show(title, found)
            if "fresh" in found:
                show_fresh(found["fresh"])
            return Outcome(results, all_right(results))

        with (
            Pipeline(rows.layer, devices="cuda:0") as pipe,
            Pipeline(rows.without_precision(), devices="cuda:0", wire_dtype="bf16") as narrow,
        ):
            yield add("ordinary to ordinary memory", from_ordinary(rows, pipe, narrow, options))
            yield add("ordinary memory to a fresh result", to_fresh(rows, pipe, options.rounds))
        with Pipeline(rows.layer, devices="cuda:0") as pipe:
            yield add("pinned to pinned", from_pinned(rows, pipe, options.rounds))
