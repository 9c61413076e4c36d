"""What the event record and the profiler's ranges cost: runs without them, in turns with runs as shipped."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benches.captures.made import context, make_layer, make_rows
from benches.common import GIB, summary

WAYS = ("as shipped", "ranges", "record", "both", "trace")  # left out, but for the first; and a timeline written
# 4096 wide: 1,450 chunks of 32 MiB a second on an H200; then chunks of 4 MiB, as fast as they go.
CHUNK_ROWS = {"chunks of 32 MiB": 2048, "chunks of 4 MiB": 256}


class _NoRanges:
    """In the place of the executor's profiler ranges."""

    def __call__(self, stage: str, chunk: int) -> Any:
        return nullcontext()

    def begin(self, stage: str, chunk: int) -> None:
        return None

    def end(self, begun: None) -> None:
        return None


def _done_without_times(self: Any) -> bool:
    """In the place of `CudaOperation.done`: whether it has ended, without asking when."""
    from pipeline.kernels.driver import call_error, driver

    if self._times is None:
        api = driver()
        (code,) = api.cuEventQuery(self._end)
        if code == api.CUresult.CUDA_ERROR_NOT_READY:
            return False
        if code != 0:
            raise call_error(self._what, code)
        self._set_times(0.0, 0.0)
    return True


@contextmanager
def without(what: str) -> Iterator[None]:
    """Run without NVTX ranges, or without the event record and the times that only it needs."""
    from pipeline import executor, instrument
    from pipeline.devices import cuda_events

    with ExitStack() as replaced:
        if what in ("ranges", "both"):
            replaced.enter_context(patch.object(executor, "Ranges", _NoRanges))
        if what in ("record", "both"):
            replaced.enter_context(patch.object(instrument.Recorder, "add", lambda *_: None))
            replaced.enter_context(patch.object(cuda_events.CudaOperation, "done", _done_without_times))
        yield


def rates(chunk_rows: int, rounds: int, trace: Path) -> dict[str, list[float]]:
    """Rows per second in each way, in turns."""
    import torch

    from pipeline import Pipeline

    found: dict[str, list[float]] = {what: [] for what in WAYS}
    layer = make_layer(4096, 4096, torch.float32, "tf32")
    x, y = make_rows(2 * GIB // (4096 * 4), 4096, 4096, torch.float32, "pinned")
    with Pipeline(layer, devices="cuda:0", chunk_rows=chunk_rows) as pipe:
        for _ in range(rounds):
            for what, samples in found.items():
                with without(what):
                    stats = pipe.run(x, y, trace=trace if what == "trace" else None).stats
                samples.append(stats.rows_per_s)
    return found


def costs(found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """The share of the throughput that each thing costs, from ratios within a round."""
    shipped, cost = found["as shipped"], {}
    for what, samples in found.items():
        if what == "as shipped":
            continue
        ratio = statistics.median(a / b for a, b in zip(shipped, samples, strict=True))
        name, share = ("trace=", ratio - 1) if what == "trace" else (what, 1 - ratio)
        cost[name] = {"cost": share, **summary(samples)}
    return cost


def measure_overhead(rounds: int) -> dict[str, Any]:
    """Throughput as shipped against without ranges, record or both, in turns; and with trace= against without."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, chunk_rows in CHUNK_ROWS.items():
            found = rates(chunk_rows, rounds, Path(folder) / "run.json")
            cost, shipped = costs(found), summary(found["as shipped"])
            chunks_per_s = shipped["median"] / chunk_rows
            results[name] = {"chunks_per_s": chunks_per_s, "as shipped": shipped, "costs": cost}
            told = ", ".join(f"{what} {each['cost']:.2%}" for what, each in cost.items())
            print(f"overhead, {name}, {chunks_per_s:,.0f} chunks/s, {rounds} rounds: {told}")
    return {"bench": "overhead", "context": context(), "rounds": rounds, "results": results}
