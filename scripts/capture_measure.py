"""What scripts/capture measures beside its timelines: ceilings, runs to compare plans with, the cost of recording, and
the kernels' roofline.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bench_common
import bench_kernel
from bench_common import ALLOWED, GIB, summary

COPY_BYTES = 64 * 2**20


def context() -> dict[str, Any]:
    """What a reader needs to repeat it, as in the benches' records."""
    return {**bench_common.context(), "command": "scripts/capture --out FOLDER"}


def make_layer(in_features: int, out_features: int, dtype: Any, precision: str | None) -> Any:
    import torch

    from pipeline import FusedLinear

    bound = in_features**-0.5
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(out_features, in_features).uniform_(-bound, bound, generator=generator).to(dtype)
    bias = torch.empty(out_features).uniform_(-bound, bound, generator=generator).to(dtype)
    return FusedLinear(weight, bias, 2.0, precision=precision)


def make_rows(rows: int, in_features: int, out_features: int, dtype: Any, memory: str) -> tuple[Any, Any]:
    """Random input rows, and an output that has been touched."""
    import torch

    pinned = memory == "pinned"
    x = torch.empty(rows, in_features, dtype=dtype, pin_memory=pinned)
    for row in range(0, rows, 65536):
        part = x[row : row + 65536]
        part.copy_(torch.randn(part.shape, device="cuda").to(dtype))
    return x, torch.full((rows, out_features), torch.nan, dtype=dtype, pin_memory=pinned)


def check_rows(layer: Any, x: Any, y: Any) -> None:
    """Compare some rows of a result with the float64 reference.

    Raises:
        RuntimeError: they differ by more than the precision explains.
    """
    import torch

    picked = torch.randint(0, len(x), (48,))
    want = torch.from_numpy(layer.reference(x[picked].double().numpy()))
    difference = ((y[picked].double() - want).abs() / (1 + want.abs())).max().item()
    allowed = ALLOWED.get(layer.precision, 2e-2)  # others: one rounding to 8 or 11 bits
    if not difference <= allowed:
        raise RuntimeError(f"the result is {difference:.1e} away from the reference, expected at most {allowed:.0e}")


# --- ceilings --------------------------------------------------------------------------------------------------------


def one_way(torch: Any, pinned: Any, device: Any, to_device: bool, seconds: float = 0.3) -> float:
    """GB/s of pinned copies of 64 MiB in one direction."""
    target, source = (device, pinned) if to_device else (pinned, device)
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(8):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        count += 8
    return float(count * pinned.nbytes / (time.perf_counter() - start) / 1e9)


def duplex(torch: Any, rounds: int = 9, copies: int = 32) -> float:
    """GB/s each way of pinned copies of 64 MiB in both directions at once, nothing else running: a median."""
    pinned = [torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(4)]
    device = [torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(4)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    rates = []
    for _ in range(rounds + 1):  # the first warms up
        torch.cuda.synchronize()
        start = time.perf_counter()
        for number in range(copies):
            with torch.cuda.stream(streams[0]):
                device[number % 2].copy_(pinned[number % 2], non_blocking=True)
            with torch.cuda.stream(streams[1]):
                pinned[2 + number % 2].copy_(device[2 + number % 2], non_blocking=True)
        torch.cuda.synchronize()
        rates.append(copies * COPY_BYTES / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates[1:])


def host_copies(torch: Any, seconds: float = 1.0) -> float:
    """GB/s that the copy workers move, fills and drains together, while the bus runs both ways."""
    import numpy as np

    from pipeline.config import Staging
    from pipeline.flow import Drain, Fill
    from pipeline.io.memory import ArrayRows
    from pipeline.staging.native import open_workers

    staging = Staging.chosen()
    size, pieces = staging.piece_bytes, staging.ring_pieces
    host = np.ones((2, 256, size), np.uint8)  # beyond the caches
    ring = torch.zeros(2, pieces, size, dtype=torch.uint8, pin_memory=True).numpy()
    bus = [torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    gpu = [torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    workers = open_workers(staging.workers)
    jobs: list[Any] = []
    moved, number, start = 0, 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        if all(stream.query() for stream in streams):
            for _ in range(4):
                with torch.cuda.stream(streams[0]):
                    gpu[0].copy_(bus[0], non_blocking=True)
                with torch.cuda.stream(streams[1]):
                    bus[1].copy_(gpu[1], non_blocking=True)
        while len(jobs) < 2 * pieces:
            piece, array = ring[number % 2, number // 2 % pieces], host[number % 2, number // 2 % 256]
            job = (Fill if number % 2 else Drain)(ArrayRows(array[None]), 0, piece[None])
            jobs.append(workers.submit(job))
            number += 1
        left = [job for job in jobs if not job.done()]
        moved += (len(jobs) - len(left)) * size
        jobs = left
        time.sleep(2e-5)
    rate = moved / (time.perf_counter() - start) / 1e9
    workers.close()
    torch.cuda.synchronize()
    return rate


def kernel_rate(torch: Any, precision: str, shape: tuple[int, int, int], contender: str, seconds: float = 0.4) -> float:
    """TFLOP/s of "layer" or "cuBLAS mm" over rows x out x in, sustained for some tenths of a second."""
    contenders = bench_kernel.contenders(torch, precision, shape, False, [])
    launch = next(f for name, f in contenders.items() if (name == bench_kernel.MM) == (contender == bench_kernel.MM))
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    once = bench_kernel.burst_seconds(torch, launch, 3)
    count = max(3, int(seconds / 3 / once))
    bench_kernel.burst_seconds(torch, launch, count)
    flop = 2 * shape[0] * shape[1] * shape[2]
    return flop / bench_kernel.burst_seconds(torch, launch, count) / 1e12


def measure_machine(torch: Any) -> dict[str, Any]:
    """What pipeline.machine.Machine needs, as far as this process can measure it."""
    pinned = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    precisions = ("fp32", "ieee", "tf32", "bfloat16", "float16")
    return {
        "h2d_gb_per_s": {"1": one_way(torch, pinned, device, True)},
        "d2h_gb_per_s": {"1": one_way(torch, pinned, device, False)},
        "duplex_gb_per_s": {"1": duplex(torch)},
        "kernel_tflops": {name: kernel_rate(torch, name, (1024, 8192, 8192), "layer") for name in precisions},
        "copy_gb_per_s": {"1": host_copies(torch)},
    }


# --- plan cases ------------------------------------------------------------------------------------------------------

# name: in_features, out_features, dtype, precision, memory, GiB of the wider side
CASES = {
    "pinned 4096 tf32": (4096, 4096, "float32", "tf32", "pinned", 4.0),
    "pinned 8192 tf32": (8192, 8192, "float32", "tf32", "pinned", 4.0),
    "pinned 8192 fp32": (8192, 8192, "float32", "fp32", "pinned", 4.0),
    "pinned 8192 ieee": (8192, 8192, "float32", "ieee", "pinned", 1.0),
    "pinned 2048 tf32": (2048, 2048, "float32", "tf32", "pinned", 4.0),
    "pinned 8192 bfloat16": (8192, 8192, "bfloat16", "bfloat16", "pinned", 4.0),
    "pinned 8192 to 1024 bfloat16": (8192, 1024, "bfloat16", "bfloat16", "pinned", 4.0),
    "pinned 1024 to 8192 tf32": (1024, 8192, "float32", "tf32", "pinned", 4.0),
    "array 4096 tf32": (4096, 4096, "float32", "tf32", "array", 4.0),
    "array 8192 tf32": (8192, 8192, "float32", "tf32", "array", 4.0),
}


def measure_case(torch: Any, name: str, rounds: int = 5) -> dict[str, Any]:
    from pipeline import Pipeline

    in_features, out_features, dtype_name, precision, memory, gib = CASES[name]
    dtype = getattr(torch, dtype_name)
    rows = int(gib * GIB) // (max(in_features, out_features) * dtype.itemsize)
    layer = make_layer(in_features, out_features, dtype, precision if dtype_name == "float32" else None)
    x, y = make_rows(rows, in_features, out_features, dtype, memory)
    with Pipeline(layer, devices="cuda:0") as pipe:
        pipe.run(x[: 16 * pipe.chunk_rows], y[: 16 * pipe.chunk_rows])
        stats = [pipe.run(x, y).stats for _ in range(rounds)]
        middle = sorted(stats, key=lambda s: s.seconds)[rounds // 2]
        job = {
            "rows": rows, "in_features": in_features, "out_features": out_features, "dtype": dtype_name,
            "runs_as": middle.runs_as, "source": memory, "out": memory, "num_streams": pipe.num_streams,
        }  # fmt: skip
    check_rows(layer, x, y)
    rates = [s.rows_per_s for s in stats]
    print(f"{name}: {middle.rows_per_s:,.0f} rows/s ({min(rates):,.0f} to {max(rates):,.0f}), bound by {middle.bound}")
    spread = {"min": min(rates), "max": max(rates), "bound": middle.bound, "stats": middle.as_dict()}
    return {"name": name, "job": job, "rows_per_s": middle.rows_per_s, **spread}


# --- what the record and the ranges cost -----------------------------------------------------------------------------


@contextmanager
def without(what: str) -> Iterator[None]:
    """Run without NVTX ranges, or without the event record and the times that only it needs."""
    from pipeline import executor, instrument
    from pipeline.devices import cuda

    saved = executor.Ranges, instrument.Recorder.add, cuda._CudaOperation.done

    def done_without_times(self: Any) -> bool:
        if self._times is None:
            api = cuda.driver()
            (code,) = api.cuEventQuery(self._end)
            if code == api.CUresult.CUDA_ERROR_NOT_READY:
                return False
            if code != 0:
                raise cuda.call_error(self._what, code)
            self._set_times(0.0, 0.0)
        return True

    class _NoRanges:
        def __call__(self, stage: str, chunk: int) -> Any:
            return instrument._NO_RANGE

        def begin(self, stage: str, chunk: int) -> None:
            return None

        def end(self, begun: None) -> None:
            return None

    try:
        if what in ("ranges", "both"):
            executor.Ranges = _NoRanges
        if what in ("record", "both"):
            instrument.Recorder.add = lambda *_: None
            cuda._CudaOperation.done = done_without_times
        yield
    finally:
        executor.Ranges, instrument.Recorder.add, cuda._CudaOperation.done = saved


def measure_overhead(torch: Any, rounds: int) -> dict[str, Any]:
    """Throughput as shipped against without ranges, record or both, in turns; and with trace= against without."""
    from pipeline import Pipeline

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "run.json"
        # 4096 wide: 1,450 chunks of 32 MiB a second on an H200; then chunks of 4 MiB, as fast as they go
        for name, chunk_rows in (("chunks of 32 MiB", 2048), ("chunks of 4 MiB", 256)):
            layer = make_layer(4096, 4096, torch.float32, "tf32")
            x, y = make_rows(2 * GIB // (4096 * 4), 4096, 4096, torch.float32, "pinned")
            rates: dict[str, list[float]] = {what: [] for what in ("as shipped", "ranges", "record", "both", "trace")}
            with Pipeline(layer, devices="cuda:0", chunk_rows=chunk_rows) as pipe:
                for _ in range(rounds):
                    for what, samples in rates.items():
                        with without(what):
                            stats = pipe.run(x, y, trace=trace if what == "trace" else None).stats
                        samples.append(stats.rows_per_s)
            shipped = rates.pop("as shipped")
            cost = {}
            for what, samples in rates.items():
                ratios = [a / b for a, b in zip(shipped, samples, strict=True)]
                share = statistics.median(ratios) - 1 if what == "trace" else 1 - statistics.median(ratios)
                cost[f"{'trace=' if what == 'trace' else what}"] = {"cost": share, **summary(samples)}
            chunks_per_s = statistics.median(shipped) / chunk_rows
            results[name] = {"chunks_per_s": chunks_per_s, "as shipped": summary(shipped), "costs": cost}
            told = ", ".join(f"{what} {each['cost']:.2%}" for what, each in cost.items())
            print(f"overhead, {name}, {chunks_per_s:,.0f} chunks/s, {rounds} rounds: {told}")
    return {"bench": "overhead", "context": context(), "rounds": rounds, "results": results}


# --- roofline --------------------------------------------------------------------------------------------------------


def measure_roofline(torch: Any) -> dict[str, Any]:
    """The layer's and cuBLAS's rates from few rows to many, with the memory's measured rate."""
    source = torch.empty(4 * GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = bench_kernel.burst_seconds(torch, lambda _: target.copy_(source), 10)
    points = []
    for precision, itemsize in (("bfloat16", 2), ("tf32", 4), ("ieee", 4)):
        for rows in (16, 64, 256, 1024, 4096, 16384):
            if precision == "ieee" and rows > 4096:
                continue
            moved = itemsize * (rows * 8192 * 2 + 8192 * 8192)
            rates = {
                "layer": kernel_rate(torch, precision, (rows, 8192, 8192), "layer", 0.15),
                "cuBLAS mm": kernel_rate(torch, precision, (rows, 8192, 8192), "cuBLAS mm", 0.15),
            }
            points.append({"precision": precision, "rows": rows, "flop_per_byte": 2 * rows * 8192**2 / moved, **rates})
            print(f"roofline {precision} {rows} rows: layer {rates['layer']:.1f}, cuBLAS mm {rates['cuBLAS mm']:.1f}")
    memory_gb_per_s = 2 * source.nbytes / copy_s / 1e9
    return {"bench": "roofline", "context": context(), "memory_gb_per_s": memory_gb_per_s, "points": points}
