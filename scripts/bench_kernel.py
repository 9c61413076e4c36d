"""`scripts/bench kernel` and `scripts/bench launch`: the fused layer on the device, and what a call costs the host."""

from __future__ import annotations

import argparse
import functools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from bench_common import context, summary, write_json

PRECISIONS = ("bfloat16", "float16", "tf32", "fp32", "ieee")
SHAPES = [(1024, 8192, 8192), (4096, 8192, 8192), (4096, 4096, 4096)]  # rows, out_features, in_features
MM = "cuBLAS mm"  # the bare product, which every ratio is against
PEERS = ("linear", "eager", "compile", "parts")  # parts: of ours as fp32, without some of its launches
BUFFERS = 3  # operands rotate over so many, together larger than L2

Contenders = dict[str, Callable[[int], object]]


def shape(text: str) -> tuple[int, int, int]:
    """ "1024" is rows of the reference layer, "1024x4096x8192" rows, out_features and in_features."""
    sizes = [int(size) for size in text.split("x")]
    if len(sizes) not in (1, 3) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"shape is {text!r}, expected ROWS or ROWSxOUTxIN")
    return (sizes[0], 8192, 8192) if len(sizes) == 1 else (sizes[0], sizes[1], sizes[2])


class Telemetry:
    """The GPU's SM clock and power, sampled by nvidia-smi for as long as the `with` block runs."""

    def __enter__(self) -> Telemetry:
        self.samples: list[tuple[float, float, float]] = []  # time, MHz, W
        query = ["nvidia-smi", "-i", "0", "--query-gpu=clocks.sm,power.draw.instant", "-lms", "20"]
        command = [*query, "--format=csv,noheader,nounits"]
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except FileNotFoundError:
            self._process = None
            return self
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        for line in self._process.stdout:
            try:
                clock, power = (float(field) for field in line.split(","))
            except ValueError:  # "[N/A]" where a GPU doesn't tell
                continue
            self.samples.append((time.perf_counter(), clock, power))

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()

    def between(self, begin: float, end: float) -> list[tuple[float, float]]:
        """Clock (MHz) and power (W) of the samples taken between two times of the performance counter."""
        return [(clock, power) for when, clock, power in list(self.samples) if begin < when <= end]


def burst_seconds(torch: Any, launch: Callable[[int], object], count: int) -> float:
    """Seconds per launch of `count` launches back to back, by CUDA events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for i in range(count):
        launch(i)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / count


def _matrix(tensor: Any) -> Any:
    from pipeline.kernels.fused_linear import Matrix

    return Matrix(tensor.data_ptr(), *tensor.shape, tensor.stride(0))


def contenders(
    torch: Any, precision: str, sizes: tuple[int, int, int], every_tile: bool, peers: list[str]
) -> Contenders:
    """Functions that queue one product or layer each; operands rotate over `BUFFERS` buffers."""
    from pipeline.dtypes import parse_dtype
    from pipeline.epilogues import SigmoidScaleResidual
    from pipeline.kernels.choose import Problem, candidates
    from pipeline.kernels.fused_layer import Weights, describe, prepare, prepare_split, split_weights
    from pipeline.kernels.launch import Launcher

    rows, out_features, in_features = sizes
    dtype = getattr(torch, "float32" if precision in ("tf32", "fp32", "ieee") else precision)
    bound = in_features**-0.5
    xs = [torch.randn(rows, in_features, device="cuda").to(dtype) for _ in range(BUFFERS)]
    ws = [torch.empty(out_features, in_features, device="cuda").uniform_(-bound, bound).to(dtype) for _ in xs]
    bias = torch.empty(out_features, device="cuda").uniform_(-bound, bound).to(dtype)
    ys = [torch.empty(rows, out_features, device="cuda", dtype=dtype) for _ in xs]

    launcher = Launcher.for_device(torch.cuda.current_device())
    problem = Problem(parse_dtype(dtype), parse_dtype(dtype), precision, in_features, out_features)

    split = split_weights(launcher, problem)
    parameters = SigmoidScaleResidual(2.0).pack({})
    weights, memory = [], []  # the latter is kept for as long as addresses point there
    for w in ws:
        parts = None
        if split is not None:
            memory.append(torch.empty(split.n_bytes, dtype=torch.uint8, device="cuda"))
            parts = split._replace(address=memory[-1].data_ptr())
            prepare_split(launcher, _matrix(w), parts).queue(0)
        weights.append(Weights(_matrix(w), bias.data_ptr(), parameters, parts))
    scratch = torch.empty(weights[0].scratch_bytes(rows), dtype=torch.uint8, device="cuda")

    @functools.cache
    def launch(place: int, variant: Any) -> Any:
        x, y, alive = _matrix(xs[place]), _matrix(ys[place]), (memory, bias, scratch)
        return prepare(launcher, problem, weights[place], x, y, alive[-1].data_ptr(), variant=variant)

    def ours(i: int, variant: Any = None) -> None:
        launch(i % BUFFERS, variant).queue(torch.cuda.current_stream().cuda_stream)

    def layer(x: Any, w: Any, b: Any) -> Any:
        z = torch.nn.functional.linear(x, w, b)
        return 2.0 * torch.sigmoid(z) + z

    found: Contenders = {MM: lambda i: torch.mm(xs[i % BUFFERS], ws[i % BUFFERS].T, out=ys[i % BUFFERS])}
    if every_tile:
        for variant in candidates(launcher.arch, problem, 16):
            found[variant.description] = lambda i, variant=variant: ours(i, variant)  # type: ignore[misc]
    else:
        found[describe(launcher, problem, rows)] = ours
    if "parts" in peers and split is not None:

        def part(i: int, first: int, last: int) -> None:
            for operation in launch(i % BUFFERS, None).operations[first:last]:
                operation.queue(torch.cuda.current_stream().cuda_stream)

        found["without the exact rows"] = lambda i: part(i, 0, 2)
        found["without the split of x, either"] = lambda i: part(i, 1, 2)
    if "linear" in peers:
        linear = torch.nn.functional.linear
        found["cuBLAS linear with bias"] = lambda i: linear(xs[i % BUFFERS], ws[i % BUFFERS], bias)
    if "eager" in peers:
        found["eager layer"] = lambda i: layer(xs[i % BUFFERS], ws[i % BUFFERS], bias)
    if "compile" in peers:
        torch._dynamo.reset()
        compiled = torch.compile(layer, mode="max-autotune-no-cudagraphs", dynamic=False)
        found["torch.compile'd layer"] = lambda i: compiled(xs[i % BUFFERS], ws[i % BUFFERS], bias)
    return found


def measure(torch: Any, found: Contenders, rounds: int, burst_s: float, telemetry: Telemetry) -> dict[str, Any]:
    """For each contender the seconds of each round, and its mean clock and power where they were sampled."""
    with torch.inference_mode():
        for launch in found.values():  # the first calls compile, load kernels and choose algorithms
            burst_seconds(torch, launch, 3)
        counts = {name: max(3, int(burst_s / burst_seconds(torch, launch, 5))) for name, launch in found.items()}
        seconds: dict[str, list[float]] = {name: [] for name in found}
        sampled: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
        # NOTE: in random order. The power limit works over tens of milliseconds: whoever follows a slow contender,
        # which draws less, runs up to 10% faster (measured, H200).
        order = list(found)
        for _ in range(rounds):
            random.shuffle(order)
            for name in order:
                begin = time.perf_counter()
                seconds[name].append(burst_seconds(torch, found[name], counts[name]))
                sampled[name] += telemetry.between(begin + 0.02, time.perf_counter())
    return {
        name: {
            "seconds": seconds[name],
            "clock_mhz": statistics.mean(clock for clock, _ in sampled[name]) if sampled[name] else None,
            "power_w": statistics.mean(power for _, power in sampled[name]) if sampled[name] else None,
        }
        for name in found
    }


def bench_kernel(arguments: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print("scripts/bench kernel needs a GPU, and torch sees none here", file=sys.stderr)
        return 1
    results = []
    print(
        f"{torch.cuda.get_device_name()}; TFLOP/s, median of {arguments.rounds} rounds (min to max); ratio to mm; "
        f"MHz, TFLOP/s per W"
    )
    with Telemetry() as telemetry:
        for precision in arguments.precision or PRECISIONS:
            torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
            for sizes in (arguments.shape or SHAPES)[: 1 if arguments.smoke else None]:
                rows, out_features, in_features = (size // 8 for size in sizes) if arguments.smoke else sizes
                shown = f"{precision:9} {rows:5} x {out_features} x {in_features}"
                flop = 2 * rows * out_features * in_features / 1e12
                found = contenders(
                    torch, precision, (rows, out_features, in_features), arguments.every_tile, arguments.peer or []
                )
                measured = measure(torch, found, arguments.rounds, arguments.burst_ms / 1e3, telemetry)
                vendor = measured[MM]["seconds"]
                for name, values in measured.items():
                    rates = [flop / seconds for seconds in values["seconds"]]
                    ratios = [theirs / ours for ours, theirs in zip(values["seconds"], vendor, strict=True)]
                    rate, power = statistics.median(rates), values["power_w"]
                    row = {
                        "precision": precision,
                        "rows": rows,
                        "out_features": out_features,
                        "in_features": in_features,
                        "name": name,
                        "tflops": summary(rates),
                        "ratio": summary(ratios),
                        "clock_mhz": values["clock_mhz"],
                        "power_w": power,
                        "tflops_per_w": None if power is None else rate / power,
                    }
                    results.append(row)
                    efficiency = "" if power is None else f"{values['clock_mhz']:5.0f} {rate / power:5.2f}"
                    print(
                        f"{shown}  {rate:7.1f} ({min(rates):.1f} to {max(rates):.1f}) {statistics.median(ratios):6.3f}"
                        f"  {efficiency:11}  {name}",
                        flush=True,
                    )
                write_json(
                    arguments.json,
                    {"bench": "kernel", "context": context(), "torch": torch.__version__, "results": results},
                )
    return 0


def bench_launch(arguments: argparse.Namespace) -> int:
    """Host time of a call in steady state, and of getting a kernel compiled or from the cache."""
    import torch

    from pipeline import FusedLinear, fused_gemm_sigmoid_scale_add
    from pipeline.kernels.choose import all_variants
    from pipeline.kernels.compile import compile_variant

    if not torch.cuda.is_available():
        print("scripts/bench launch needs a GPU, and torch sees none here", file=sys.stderr)
        return 1
    results: dict[str, Any] = {}
    layer = FusedLinear(torch.randn(512, 512).bfloat16(), torch.randn(512).bfloat16(), 2.0)
    x, y = torch.randn(64, 512, device="cuda").bfloat16(), torch.empty(64, 512, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(512, 512, device="cuda").bfloat16(), torch.randn(512, device="cuda").bfloat16()
    fp32 = FusedLinear(torch.randn(512, 512), torch.randn(512), 2.0)
    x32, y32 = x.float(), y.float()
    calls: dict[str, Callable[[], object]] = {
        "layer(x, out=y)": lambda: layer(x, out=y),
        "layer(x)": lambda: layer(x),
        "layer(x, out=y), fp32": lambda: fp32(x32, out=y32),
        "fused_gemm_sigmoid_scale_add": lambda: fused_gemm_sigmoid_scale_add(x, weight, bias, 2.0),
        "torch.mm(out=)": lambda: torch.mm(x, weight, out=y),
        "eager layer": lambda: torch.sigmoid(z := torch.nn.functional.linear(x, weight, bias)) * 2.0 + z,
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(arguments.rounds + 1):
            for name, call in calls.items():
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(arguments.calls):  # fewer than the driver queues before it makes a caller wait
                    call()
                samples[name].append((time.perf_counter() - begin) / arguments.calls * 1e6)
                torch.cuda.synchronize()
    for name, values in samples.items():
        results[name] = {"host_us": summary(values[1:])}  # the first round warms up
        print(f"{name:30} {statistics.median(values[1:]):7.2f} us of host time a call")

    with tempfile.TemporaryDirectory() as folder:
        os.environ["PIPELINE_CACHE_DIR"] = folder
        variants = [variant for variant in all_variants("sm_90a") if variant.kernel == "fused_linear_sm90"]
        times: dict[str, list[float]] = {"compile": [], "load from the cache": []}
        for passes in times.values():
            for variant in variants:
                begin = time.perf_counter()
                compile_variant(variant, "sm_90a")
                passes.append(time.perf_counter() - begin)
    for name, values in times.items():
        results[name] = {"seconds": summary(values), "variants": len(variants)}
        print(f"{name:30} {statistics.median(values) * 1e3:7.2f} ms a variant, slowest {max(values) * 1e3:.2f} ms")
    write_json(
        arguments.json, {"bench": "launch", "context": context(), "torch": torch.__version__, "results": results}
    )
    return 0


def add_parsers(commands: Any) -> None:
    kernel = commands.add_parser("kernel", help="the whole fused layer against cuBLAS's bare product, on the device")
    kernel.add_argument("--json", metavar="FILE", help="write results and context there")
    kernel.add_argument("--rounds", type=int, default=9)
    kernel.add_argument("--burst-ms", type=float, default=70, help="length of one contender's turn in a round")
    kernel.add_argument("--precision", action="append", choices=PRECISIONS, help="repeatable; default all")
    kernel.add_argument(
        "--shape", action="append", type=shape, metavar="ROWS[xOUTxIN]", help="repeatable; default a few around 8192"
    )
    kernel.add_argument("--peer", action="append", choices=PEERS, help="repeatable: measure these, too")
    kernel.add_argument("--every-tile", action="store_true", help="measure every tile, not only the selected one")
    kernel.add_argument("--smoke", action="store_true", help="one small shape, to see that it runs")
    kernel.set_defaults(run=bench_kernel)

    launch = commands.add_parser("launch", help="host time of a call, and of compiling or loading a kernel")
    launch.add_argument("--json", metavar="FILE", help="write results and context there")
    launch.add_argument("--rounds", type=int, default=9)
    launch.add_argument("--calls", type=int, default=300, help="calls in a row")
    launch.set_defaults(run=bench_launch)
