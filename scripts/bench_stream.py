"""`scripts/bench stream`: host to host through Pipeline, against the bus's bare ceiling and what people write.

The contenders of a case move the same bytes and take turns; figures are medians with their range. What `Bench.compare`
times is compared with the float64 layer, all rows, and an output that is given to it was NaN before; the cases short,
start and sweep are timed only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_peers as peers
import numpy as np
from bench_common import ALLOWED, ALLOWED_CUBLAS, GIB, ROOT, context, random_layer, summary, write_json
from bench_places import Copier, places

# The result of bf16 arithmetic, relative to 1 + |y|: operands, weights and results are off by 2**-9 of their size.
ALLOWED_BF16 = 3e-2
PEER_CHUNK_ROWS = (1024, 4096)  # what the recipes are tried with; the faster one counts
NARROW = ((1024, 8192), (8192, 1024), (512, 512), (16384, 256))  # in_features, out_features

Contender = Callable[[], None]


class Memory:
    """Six flat float32 arrays of one length: two near and pinned, two near, two far (`Places`)."""

    def __init__(self, torch: Any, length: int) -> None:
        self.copier = Copier()
        found = places(torch, self.copier, length, near=4, far=2, later=3)  # small pages, a fresh result
        self.copies_gb_per_s = found.copies_gb_per_s
        self.near, self.pinned, self.far = found.near[:2], found.near[2:], found.far
        for array in self.pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(array.ctypes.data, array.nbytes, 0))

    def close(self, torch: Any) -> None:
        torch.cuda.synchronize()
        for array in self.pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(array.ctypes.data))
        self.copier.close()


class Bench:
    """The layer, x and y in pinned, near and far memory, and the float64 result, rounded to float32, on the GPU.

    All memory is NumPy's, which asks for huge pages; these are torch's views of it.
    """

    def __init__(
        self, torch: Any, memory: Memory, rows: int, in_features: int, out_features: int, precision: str
    ) -> None:
        def view(flat: Any, features: int) -> Any:
            return torch.from_numpy(flat[: rows * features]).view(rows, features)

        self.torch, self.memory, self.rows, self.precision = torch, memory, rows, precision
        self.layer = random_layer(in_features, precision, out_features)
        self.x_pinned, self.y_pinned = view(memory.pinned[0], in_features), view(memory.pinned[1], out_features)
        self.x, self.y = view(memory.near[0], in_features), view(memory.near[1], out_features)
        self.x_far, self.y_far = view(memory.far[0], in_features), view(memory.far[1], out_features)
        self.want = torch.empty(rows, out_features, device="cuda")
        self.fill()

    def fill(self) -> None:
        """Give x its rows, the same every time. Another bench of the same memory leaves its own there."""
        torch = self.torch
        torch.manual_seed(0)
        w, b = (torch.from_numpy(array).cuda().double() for array in (self.layer.weight, self.layer.bias))
        for row in range(0, self.rows, 8192):
            part = torch.randn(min(8192, self.rows - row), self.x.shape[1], device="cuda")
            self.x_pinned[row : row + 8192].copy_(part)
            z = torch.addmm(b, part.double(), w.T)
            self.want[row : row + 8192] = 2.0 * torch.sigmoid(z) + z
        self.x.copy_(self.x_pinned)
        self.x_far.copy_(self.x_pinned)

    @property
    def bytes_in(self) -> int:
        return int(self.x.nbytes)

    @property
    def bytes_out(self) -> int:
        return int(self.y.nbytes)

    def ceiling_s(self) -> float:
        return peers.bare_copies(self.torch, self.x_pinned, self.y_pinned)

    def worst_difference(self, y: Any) -> float:
        """The largest |y - reference| / (1 + |reference|) over all rows. NaN where y has one."""
        y = self.torch.as_tensor(y)
        worst = 0.0
        for row in range(0, self.rows, 65536):
            want = self.want[row : row + 65536]
            difference = ((y[row : row + 65536].cuda() - want).abs() / (1 + want.abs())).max().item()
            if not difference <= worst:
                worst = difference
        return worst

    def compare(
        self,
        contenders: dict[str, tuple[Contender, Any]],
        rounds: int,
        allowed: dict[str, float] | None = None,
        memory: tuple[Any, Any] | None = None,
    ) -> dict[str, Any]:
        """Time the contenders in turns and check what each of them wrote: name -> (run, the tensor it writes).

        `memory`, a source and a target, is copied by the copy workers alone once a round.

        A contender runs twice in its turn where it takes less than 3 s, and the second run counts, as with the bare
        copies: the processor's clocks and threads that have rested for seconds take a while to come up. `first_seconds`
        are of the first.
        """
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        first_seconds: dict[str, list[float]] = {name: [] for name in contenders}
        worst: dict[str, float] = {}
        ceilings: list[float] = []
        copies: list[float] = []
        for n in range(rounds):
            if memory is not None:
                source, target = (tensor.numpy().reshape(-1) for tensor in memory)
                copies.append(source.nbytes / self.memory.copier.seconds(target, source) / 1e9)
            order = list(contenders)
            random.shuffle(order)
            for name in order:
                run, y = contenders[name]
                if n >= 2 and statistics.median(seconds[name]) > 3:
                    continue  # two rounds tell enough of what takes seconds
                if n == 0 and y is not None:
                    y.fill_(self.torch.nan)
                self.ceiling_s()
                ceilings.append(self.ceiling_s())
                start = time.perf_counter()
                result = run()
                took_s = time.perf_counter() - start
                first_seconds[name].append(took_s)
                if n == 0:
                    worst[name] = self.worst_difference(y if y is not None else result)
                del result
                if took_s < 3:
                    start = time.perf_counter()
                    result = run()
                    took_s = time.perf_counter() - start
                    del result
                seconds[name].append(took_s)
        limit = {
            name: (ALLOWED if name.startswith("pipeline") else ALLOWED_CUBLAS)[self.precision] for name in contenders
        } | (allowed or {})
        ceiling = statistics.median(ceilings)
        return {
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "ceiling_s": summary(ceilings),
            "memory_gb_per_s": summary(copies) if copies else None,
            "contenders": {
                name: {
                    "seconds": summary(values),
                    "first_seconds": summary(first_seconds[name]),
                    "rounds": len(values),
                    "gb_per_s_in": self.bytes_in / statistics.median(values) / 1e9,
                    "gb_per_s_out": self.bytes_out / statistics.median(values) / 1e9,
                    "of_ceiling": ceiling / statistics.median(values),
                    "worst_difference": worst[name],
                    "allowed_difference": limit[name],
                    "right": bool(worst[name] <= limit[name]),
                }
                for name, values in seconds.items()
            },
        }


def show(case: str, found: dict[str, Any]) -> None:
    gb = max(found["bytes_in"], found["bytes_out"]) / 1e9
    ceiling = found["ceiling_s"]
    print(
        f"{case}: {found['bytes_in'] / 1e9:.2f} GB in, {found['bytes_out'] / 1e9:.2f} GB out; bare copies "
        f"{gb / ceiling['median']:.1f} GB/s ({gb / ceiling['max']:.1f} to {gb / ceiling['min']:.1f})"
    )
    if memory := found["memory_gb_per_s"]:
        print(
            f"  copy workers alone, array to array: {memory['median']:.1f} GB/s ({memory['min']:.1f} to "
            f"{memory['max']:.1f})"
        )
    for name, row in sorted(found["contenders"].items(), key=lambda item: item[1]["seconds"]["median"]):
        seconds = row["seconds"]
        right = "right" if row["right"] else "WRONG RESULT"
        print(
            f"  {name:34} {gb / seconds['median']:6.2f} GB/s ({gb / seconds['max']:.2f} to {gb / seconds['min']:.2f}), "
            f"{row['of_ceiling']:.3f} of the ceiling; first run {gb / row['first_seconds']['median']:.2f}; worst "
            f"difference {row['worst_difference']:.1e}, {right}",
            flush=True,
        )


def fastest(run: Callable[[int], None]) -> int:
    """The chunk size with which a recipe is faster."""
    seconds = {}
    for rows in PEER_CHUNK_ROWS:
        start = time.perf_counter()
        run(rows)
        seconds[rows] = time.perf_counter() - start
    return min(seconds, key=lambda rows: seconds[rows])


# --- the cases -------------------------------------------------------------------------------------------------------


def case_memory(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Pinned to pinned, ordinary memory to ordinary memory, near and far, to a fresh result, and bf16 on the wire."""
    from pipeline import FusedLinear, Pipeline

    torch = bench.torch
    results = {}
    with Pipeline(bench.layer, devices="cuda:0") as pipe:
        pipe.run(bench.x_pinned, bench.y_pinned)
        found = bench.compare(
            {"pipeline": (lambda: pipe.run(bench.x_pinned, bench.y_pinned), bench.y_pinned)}, options.rounds
        )
        found["stats"] = pipe.run(bench.x_pinned, bench.y_pinned).stats.as_dict()
        results["pinned to pinned"] = found
        show("pinned to pinned", found)

    small_pages = bench.x.clone(), torch.zeros_like(bench.y)  # as torch allocates them
    plain = FusedLinear(bench.layer.weight, bench.layer.bias, bench.layer.scaling_factor)  # wire_dtype is its precision
    with (
        Pipeline(bench.layer, devices="cuda:0") as pipe,
        Pipeline(plain, devices="cuda:0", wire_dtype="bf16") as narrow,
    ):
        for case, x, y in (
            ("ordinary to ordinary memory", bench.x, bench.y),
            ("far to far memory", bench.x_far, bench.y_far),
        ):
            arrays = x.numpy(), y.numpy()
            for warm in (pipe, narrow):
                warm.run(*arrays)
            contenders: dict[str, tuple[Contender, Any]] = {
                "pipeline": (lambda arrays=arrays: pipe.run(*arrays), y),
                "pipeline, wire_dtype bf16": (lambda arrays=arrays: narrow.run(*arrays), y),
            }
            if x is bench.x:
                contenders["pipeline, torch's small pages"] = (lambda: pipe.run(*small_pages), small_pages[1])
                if not options.no_peers:
                    contenders |= peer_contenders(bench, options.quick)
            found = bench.compare(contenders, options.rounds, {"pipeline, wire_dtype bf16": ALLOWED_BF16}, (x, y))
            stats = pipe.run(*arrays).stats
            found["stats"] = stats.as_dict()
            found["stats_bf16"] = narrow.run(*arrays).stats.as_dict()
            results[case] = found
            show(case, found)
            print(stats, flush=True)

        x = bench.x.numpy()
        found = bench.compare({"pipeline": (lambda: pipe.run(x).out, None)}, options.rounds)
        found["stats"] = pipe.run(x).stats.as_dict()
        results["ordinary memory to a fresh result"] = found
        show("ordinary memory to a fresh result", found)
    return results


def peer_contenders(bench: Bench, quick: bool) -> dict[str, tuple[Contender, Any]]:
    """What people write, with the chunk size that suits each best."""
    torch, x, y = bench.torch, bench.x, bench.y
    forward = peers.torch_layer(torch, bench.layer)
    part = x[: bench.rows // 4], y[: bench.rows // 4]
    rows = fastest(lambda n: peers.double_buffered(torch, forward, *part, n))
    loader_rows = fastest(lambda n: peers.data_loader(torch, forward, *part, n, 0))
    contenders: dict[str, tuple[Contender, Any]] = {
        f"double-buffered, {rows} rows": (lambda: peers.double_buffered(torch, forward, x, y, rows), y),
        f"DataLoader, pin_memory, {loader_rows} rows": (
            lambda: peers.data_loader(torch, forward, x, y, loader_rows, 0),
            y,
        ),
        "loop, copied back": (lambda: peers.copied_back(torch, forward, x, y, 1024), y),
        "naive loop": (lambda: peers.naive_loop(torch, forward, x, y, 1024), y),
    }
    try:
        import nvidia.dali  # noqa: F401

        dali_rows = fastest(lambda n: peers.dali_source(torch, forward, *part, n))
        contenders[f"DALI, external source, {dali_rows} rows"] = (
            lambda: peers.dali_source(torch, forward, x, y, dali_rows),
            y,
        )
    except ImportError:
        print("DALI isn't installed: no row for it")
    if not quick:
        contenders["DataLoader, pin_memory, 4 workers"] = (
            lambda: peers.data_loader(torch, forward, x, y, loader_rows, 4),
            y,
        )
    return contenders


def case_pin(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Ordinary memory registered with pipeline.pin: what registering costs, and the runs after it."""
    from pipeline import Pipeline, pin

    x, y = bench.x.numpy(), bench.y.numpy()
    start = time.perf_counter()
    with pin(x), pin(y):
        pinned_s = time.perf_counter() - start
        with Pipeline(bench.layer, devices="cuda:0") as pipe:
            pipe.run(x, y)
            found = bench.compare({"pipeline, pinned by pin()": (lambda: pipe.run(x, y), bench.y)}, options.rounds)
        start = time.perf_counter()
    found["pin_seconds"], found["unpin_seconds"] = pinned_s, time.perf_counter() - start
    show("ordinary memory, registered", found)
    print(f"  registering took {pinned_s:.2f} s, unregistering {found['unpin_seconds']:.2f} s")
    return {"registered": found}


def case_sweep(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Ordinary to ordinary memory for many rings, worker counts and ways to wait."""
    from pipeline import Pipeline
    from pipeline.devices.cuda import CudaDevice

    arrays = bench.x.numpy(), bench.y.numpy()
    rates: dict[str, list[float]] = {}
    waits = {"sleep 5 us": CudaDevice.idle, "sleep 0": lambda device: time.sleep(0)}
    cores = len(os.sched_getaffinity(0))
    settings = [(8, 6, cores - 2, "sleep 5 us"), (8, 6, cores - 2, "sleep 0")]
    settings += [(mib, 6, cores - 2, "sleep 5 us") for mib in (4, 6, 10, 12, 16)]
    settings += [(8, pieces, cores - 2, "sleep 5 us") for pieces in (4, 5, 8, 10)]
    settings += [(12, 4, cores - 2, "sleep 5 us"), (16, 4, cores - 2, "sleep 5 us"), (4, 12, cores - 2, "sleep 5 us")]
    settings += [(8, 6, workers, "sleep 5 us") for workers in (cores // 2, cores - 4, cores - 3, cores - 1, cores)]
    settings = [(mib, pieces, max(1, workers), wait) for mib, pieces, workers, wait in settings]
    for _ in range(options.rounds):
        random.shuffle(settings)
        for mib, pieces, workers, wait in settings:
            os.environ["PIPELINE_PIECE_BYTES"] = str(mib * 2**20)
            os.environ["PIPELINE_RING_PIECES"], os.environ["PIPELINE_COPY_WORKERS"] = str(pieces), str(workers)
            before, CudaDevice.idle = CudaDevice.idle, waits[wait]  # type: ignore[method-assign]
            with Pipeline(bench.layer, devices="cuda:0") as pipe:
                pipe.run(arrays[0][: bench.rows // 8], arrays[1][: bench.rows // 8])
                name = f"{pieces} x {mib} MiB, {workers} workers, {wait}"
                rates.setdefault(name, []).append(pipe.run(*arrays).stats.gb_per_s_in)
            CudaDevice.idle = before  # type: ignore[method-assign]
    for name in ("PIPELINE_PIECE_BYTES", "PIPELINE_RING_PIECES", "PIPELINE_COPY_WORKERS"):
        del os.environ[name]
    ceiling = bench.bytes_in / statistics.median(bench.ceiling_s() for _ in range(3)) / 1e9
    print(f"ring and workers, ordinary to ordinary memory; ceiling {ceiling:.1f} GB/s each way")
    for name, values in sorted(rates.items(), key=lambda item: -statistics.median(item[1])):
        print(f"  {name:44} {statistics.median(values):6.2f} ({min(values):.2f} to {max(values):.2f})", flush=True)
    return {"ceiling_gb_per_s": ceiling, "gb_per_s": {name: summary(values) for name, values in rates.items()}}


def case_gpus(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """One GPU, and all of them together: pinned memory, ordinary memory, and bf16 on the wire."""
    from pipeline import FusedLinear, Pipeline

    count = bench.torch.cuda.device_count()
    if count < 2:
        raise SystemExit("the case gpus needs several GPUs, torch sees one here")
    plain = FusedLinear(bench.layer.weight, bench.layer.bias, bench.layer.scaling_factor)
    with (
        Pipeline(bench.layer, devices="cuda:0") as one,
        Pipeline(bench.layer) as all_gpus,
        Pipeline(plain, devices="cuda:0", wire_dtype="bf16") as one_narrow,
        Pipeline(plain, wire_dtype="bf16") as all_narrow,
    ):
        together = f"{count} GPUs"
        wide = {"pipeline, 1 GPU": one, f"pipeline, {together}": all_gpus}
        narrow = {"pipeline, wire_dtype bf16, 1 GPU": one_narrow, f"pipeline, wire_dtype bf16, {together}": all_narrow}
        results = {}
        for case, x, y, pipelines in (
            ("pinned to pinned", bench.x_pinned, bench.y_pinned, wide),  # narrowing would stage it like other memory
            ("ordinary to ordinary memory", bench.x, bench.y, wide | narrow),
        ):
            ends = (x, y) if x is bench.x_pinned else (x.numpy(), y.numpy())
            contenders: dict[str, tuple[Contender, Any]] = {}
            for name, pipe in pipelines.items():
                pipe.run(*ends)
                contenders[name] = (lambda pipe=pipe, ends=ends: pipe.run(*ends)), y
            allowed = dict.fromkeys(narrow, ALLOWED_BF16)
            found = bench.compare(contenders, options.rounds, allowed, None if x is bench.x_pinned else (x, y))
            stats = all_gpus.run(*ends).stats
            found["stats"] = stats.as_dict()
            if pipelines is not wide:
                found["stats_bf16"] = all_narrow.run(*ends).stats.as_dict()
            results[case] = found
            show(case, found)
            print(stats, flush=True)
    return results


def case_short(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """1,024 rows in a warm Pipeline, against eager torch on pinned tensors."""
    from pipeline import Pipeline

    torch, forward = bench.torch, peers.torch_layer(bench.torch, bench.layer)
    x, y = bench.x_pinned[:1024], bench.y_pinned[:1024]

    def eager() -> None:
        y.copy_(forward(x.to("cuda", non_blocking=True)), non_blocking=True)
        torch.cuda.synchronize()

    with Pipeline(bench.layer, devices="cuda:0") as pipe:
        runs: dict[str, Contender] = {"eager torch, pinned": eager, "pipeline, pinned": lambda: pipe.run(x, y)}
        runs["pipeline, ordinary memory"] = lambda: pipe.run(bench.x[:1024].numpy(), bench.y[:1024].numpy())
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for n in range(20 * options.rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if n >= 5:
                    seconds[name].append(time.perf_counter() - start)
        stats = pipe.run(x, y).stats
    eager_s = statistics.median(seconds["eager torch, pinned"])
    print("1,024 rows, warm")
    for name, values in seconds.items():
        print(
            f"  {name:34} {1e3 * statistics.median(values):.3f} ms ({1e3 * min(values):.3f} to "
            f"{1e3 * max(values):.3f}), {eager_s / statistics.median(values):.2f} of eager torch's speed"
        )
    print("\n".join(f"    {line}" for line in stats.lines()), flush=True)
    return {"seconds": {name: summary(values) for name, values in seconds.items()}, "stats": stats.as_dict()}


def case_shapes(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Narrow and wide layers: the bound that each hits and the fraction reached."""
    from pipeline import Pipeline
    from pipeline.report.stages import nearness

    results = {}
    for in_features, out_features in NARROW:
        rows = int(options.gib / 2 * GIB) // (4 * max(in_features, out_features))
        narrow = Bench(bench.torch, bench.memory, rows, in_features, out_features, bench.precision)
        with Pipeline(narrow.layer, devices="cuda:0") as pipe:
            pinned = narrow.x_pinned, narrow.y_pinned
            ordinary = narrow.x.numpy(), narrow.y.numpy()
            for both in (pinned, ordinary):
                pipe.run(*both)
            found = narrow.compare(
                {
                    "pipeline, pinned": (lambda pipe=pipe, pinned=pinned: pipe.run(*pinned), narrow.y_pinned),
                    "pipeline, ordinary memory": (lambda pipe=pipe, pair=ordinary: pipe.run(*pair), narrow.y),
                },
                options.rounds,
            )
            for name, both in (("pinned", pinned), ("ordinary", ordinary)):
                stats = pipe.run(*both).stats
                found[f"stats_{name}"] = stats.as_dict()
                found[f"bound_{name}"] = stats.bound, nearness(stats.stages[stats.bound])
        results[f"{in_features} -> {out_features}"] = found
        show(f"{in_features} -> {out_features}", found)
        for name in ("pinned", "ordinary"):
            print("  {}: bound by {}, at {:.2f} of its limit".format(name, *found[f"bound_{name}"]))
    bench.fill()
    return results


def case_file(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """A warm .npy to a pinned result, and to another .npy, against what the disk writes."""
    from pipeline import Pipeline
    from pipeline.flow import Drain
    from pipeline.io.files import FileLayout, FileRows
    from pipeline.staging.native import open_workers

    torch, rows = bench.torch, bench.rows // 2
    part = Bench.__new__(Bench)
    part.__dict__.update(bench.__dict__, rows=rows, x=bench.x[:rows], y=bench.y[:rows], want=bench.want[:rows])
    part.x_pinned, part.y_pinned = bench.x_pinned[:rows], bench.y_pinned[:rows]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as folder, Pipeline(bench.layer, devices="cuda:0") as pipe:
        x_path, y_path, z_path = (Path(folder) / name for name in ("x.npy", "y.npy", "z"))
        np.save(x_path, part.x.numpy())
        offset = x_path.stat().st_size - part.x.nbytes
        workers = open_workers(pipe.staging.workers)

        def write_and_sync() -> None:
            """The bytes of the result, from memory, in pieces, with the same workers, preallocated and synchronised."""
            fd = os.open(z_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.posix_fallocate(fd, 0, part.y.nbytes)
            array, step = part.y.numpy(), max(1, 2**26 // (part.y.shape[1] * 4))
            for row in range(0, rows, step):
                piece = array[row : row + step]
                layout = FileLayout.in_order(fd, z_path, row * part.y.shape[1] * 4, part.y.shape[1], 4, reads=False)
                workers.run(Drain(FileRows(layout, 0, None), 0, piece))
            os.fsync(fd)
            os.close(fd)

        contenders: dict[str, tuple[Contender, Any]] = {
            "pipeline, .npy to pinned": (lambda: pipe.run(x_path, part.y_pinned), part.y_pinned)
        }
        try:
            import kvikio  # noqa: F401

            forward = peers.torch_layer(torch, bench.layer)
            contenders["KvikIO to pinned"] = (
                lambda: peers.kvikio_file(torch, forward, str(x_path), offset, part.y_pinned, 1024),
                part.y_pinned,
            )
        except ImportError:
            print("KvikIO isn't installed: no row for it")
        pipe.run(x_path, part.y_pinned)
        found["warm .npy to pinned"] = part.compare(contenders, options.rounds)
        show("warm .npy to pinned", found["warm .npy to pinned"])

        writes, runs = [], []
        for _ in range(min(3, options.rounds)):
            start = time.perf_counter()
            write_and_sync()
            writes.append(time.perf_counter() - start)
            z_path.unlink()
            y_path.unlink(missing_ok=True)  # neither pays for what was there before
            start = time.perf_counter()
            stats = pipe.run(x_path, y_path).stats
            runs.append(time.perf_counter() - start)
        difference = part.worst_difference(torch.from_numpy(np.load(y_path)))
        workers.close()
    ratio = statistics.median(writes) / statistics.median(runs)
    right = difference <= ALLOWED[bench.precision]
    print(
        f"warm .npy to .npy, {part.y.nbytes / 1e9:.2f} GB: {statistics.median(runs):.2f} s, writing and syncing the "
        f"result alone {statistics.median(writes):.2f} s: {ratio:.2f} of the disk; "
        f"{'right' if right else 'WRONG RESULT'}"
    )
    found["warm .npy to .npy"] = {
        "bytes": part.y.nbytes,
        "seconds": summary(runs),
        "write_seconds": summary(writes),
        "of_disk": ratio,
        "worst_difference": difference,
        "stats": stats.as_dict(),
        "contenders": {"pipeline": {"right": right}},
    }
    return found


# One process: the first chunk after the call, and the peak of resident memory beyond the arrays. No torch.
START_JOB = """
import json, sys, time
import numpy as np
from pathlib import Path

def status(field):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024

rows, features, precision, ready = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "context"
rng = np.random.default_rng(0)
block = rng.standard_normal((1024, features), np.float32)
x = np.empty((rows, features), np.float32)
for row in range(0, rows, 1024):
    x[row : row + 1024] = block[: rows - row]
y = np.zeros_like(x); y[:] = np.nan
weight = (rng.random((features, features), np.float32) * 2 - 1) / np.float32(features) ** 0.5
arrays = x.nbytes + y.nbytes + weight.nbytes
del block
import pipeline
layer = pipeline.FusedLinear(weight, None, 2.0, precision=precision)
if ready:
    from pipeline.kernels.launch import Launcher
    Launcher.for_device(0)
before = status("VmRSS")
moments = []
start = time.perf_counter()
if sys.argv[5] == "whole":
    result = pipeline.run_pipelined(
        layer, x, y, devices="cuda:0", progress=lambda p: moments.append(time.perf_counter())
    )
    imported = opened = start
else:  # the same in steps
    from pipeline import Pipeline
    imported = time.perf_counter()
    with Pipeline(layer, devices="cuda:0") as pipe:
        opened = time.perf_counter()
        result = pipe.run(x, y, progress=lambda p: moments.append(time.perf_counter()))
end = time.perf_counter()
assert not np.isnan(y[-1]).any()
print(json.dumps({
    "first_chunk_s": moments[0] - start,
    "seconds": end - start,
    "import_s": imported - start,
    "open_s": opened - imported,
    "run_to_first_chunk_s": moments[0] - opened,
    "pinned_bytes": result.stats.pinned_bytes,
    "array_bytes": arrays,
    "resident_before_bytes": before - arrays,
    "peak_beyond_arrays_bytes": status("VmHWM") - arrays,
    "torch_imported": "torch" in sys.modules,
}))
"""


def case_start(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """The first chunk after the call and resident memory, each in a process of its own, at two sizes."""
    features = bench.layer.in_features
    results: dict[str, Any] = {}
    for name, gib, cuda, way in (
        ("a quarter, CUDA started", options.gib / 4, "context", "whole"),
        ("whole, CUDA started", options.gib, "context", "whole"),
        ("a quarter, CUDA not started", options.gib / 4, "no context", "whole"),
        ("a quarter, in steps", options.gib / 4, "context", "steps"),
    ):
        rows = int(gib * GIB) // (4 * features)
        command = [sys.executable, "-c", START_JOB, str(rows), str(features), bench.precision, cuda, way]
        found = []
        for _ in range(1 + min(3, options.rounds)):  # the first one warms the caches
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            found.append(json.loads(done.stdout))
        results[name] = {key: summary([float(each[key]) for each in found[1:]]) for key in found[0]}
        middle = {key: value["median"] for key, value in results[name].items()}
        print(
            f"{gib:g} GiB each way, {name}: first chunk {middle['first_chunk_s']:.3f} s after the call (imports "
            f"{middle['import_s']:.3f}, opening {middle['open_s']:.3f}, then {middle['run_to_first_chunk_s']:.3f}), "
            f"all done after {middle['seconds']:.2f} s, {middle['pinned_bytes'] / 2**20:.0f} MiB pinned, peak resident "
            f"{middle['peak_beyond_arrays_bytes'] / 1e6:.0f} MB beyond the arrays (before the call "
            f"{middle['resident_before_bytes'] / 1e6:.0f})",
            flush=True,
        )
    return results


CASES = {
    "memory": case_memory,
    "gpus": case_gpus,
    "short": case_short,
    "file": case_file,
    "start": case_start,
    "pin": case_pin,
    "shapes": case_shapes,
    "sweep": case_sweep,
}


def run(arguments: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print("scripts/bench stream needs a GPU, and torch sees none here", file=sys.stderr)
        return 1
    features = arguments.features
    rows = int(arguments.gib * GIB) // (features * 4)
    memory = Memory(torch, rows * features)
    print(
        "one half of an array copied to the other, GB/s by place: {}".format(
            ", ".join(f"{rate:.0f}" for rate in memory.copies_gb_per_s)
        )
    )
    bench = Bench(torch, memory, rows, features, features, arguments.precision)
    results: dict[str, Any] = {}
    document = {
        "bench": "stream",
        "context": context(),
        "features": features,
        "precision": arguments.precision,
        "memory_gb_per_s": memory.copies_gb_per_s,
    }
    several = torch.cuda.device_count() > 1
    for name in arguments.case or [name for name in CASES if name != "sweep" and (several or name != "gpus")]:
        start = time.perf_counter()
        results[name] = CASES[name](bench, arguments)
        print(f"-- {name} took {time.perf_counter() - start:.0f} s", flush=True)
        write_json(arguments.json, {**document, "results": results})
    memory.close(torch)
    rows_found = [
        row
        for case in results.values()
        for found in case.values()
        if isinstance(found, dict)
        for row in found.get("contenders", {}).values()
    ]
    return int(not all(row["right"] for row in rows_found))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write results and context there, after each case")
    which = "repeatable; default all but sweep, and gpus only where there are several"
    parser.add_argument("--case", action="append", choices=CASES, help=which)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gib", type=float, default=8, help="GiB each way")
    parser.add_argument("--features", type=int, default=8192, help="width of the layer, in and out")
    parser.add_argument("--precision", default="tf32", choices=("tf32", "ieee", "fp32"))
    parser.add_argument("--quick", action="store_true", help="leave out the slowest recipe")
    parser.add_argument("--no-peers", action="store_true", help="leave out all recipes")
    parser.add_argument("--directory", help="where files go; default: the system's folder for temporary files")
    parser.set_defaults(run=run)
