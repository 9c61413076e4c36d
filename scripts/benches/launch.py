"""`scripts/bench launch`: host time of a call in steady state, and of getting a kernel compiled or from the cache."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from benches.case import GPU, Outcome
from benches.common import summary
from benches.turns import turns


def calls() -> dict[str, Callable[[], object]]:
    """A layer that takes the GPU no time, called in every way there is, and torch's own calls."""
    import torch

    from pipeline import FusedLinear, fused_gemm_sigmoid_scale_add

    layer = FusedLinear(torch.randn(512, 512).bfloat16(), torch.randn(512).bfloat16(), 2.0)
    x, y = torch.randn(64, 512, device="cuda").bfloat16(), torch.empty(64, 512, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(512, 512, device="cuda").bfloat16(), torch.randn(512, device="cuda").bfloat16()
    fp32 = FusedLinear(torch.randn(512, 512), torch.randn(512), 2.0)
    x32, y32 = x.float(), y.float()
    return {
        "layer(x, out=y)": lambda: layer(x, out=y),
        "layer(x)": lambda: layer(x),
        "layer(x, out=y), fp32": lambda: fp32(x32, out=y32),
        "fused_gemm_sigmoid_scale_add": lambda: fused_gemm_sigmoid_scale_add(x, weight, bias, 2.0),
        "torch.mm(out=)": lambda: torch.mm(x, weight, out=y),
        "eager layer": lambda: torch.sigmoid(z := torch.nn.functional.linear(x, weight, bias)) * 2.0 + z,
    }


def measure_calls(rounds: int, count: int) -> dict[str, list[float]]:
    """Microseconds of host time a call. The first round warms up."""
    import torch

    found = calls()
    samples: dict[str, list[float]] = {name: [] for name in found}
    with torch.inference_mode():
        for _, name in turns(found, rounds + 1):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(count):  # fewer than the driver queues before it makes a caller wait
                found[name]()
            samples[name].append((time.perf_counter() - begin) / count * 1e6)
            torch.cuda.synchronize()
    return {name: values[1:] for name, values in samples.items()}


def measure_compiling() -> dict[str, list[float]]:
    """Seconds of each of the Hopper kernel's variants: compiled, then loaded from the cache."""
    from pipeline.kernels.choose import all_variants
    from pipeline.kernels.compile import compile_variant

    times: dict[str, list[float]] = {"compile": [], "load from the cache": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PIPELINE_CACHE_DIR"] = folder
        variants = [variant for variant in all_variants("sm_90a") if variant.kernel == "fused_linear_sm90"]
        for passes in times.values():
            for variant in variants:
                begin = time.perf_counter()
                compile_variant(variant, "sm_90a")
                passes.append(time.perf_counter() - begin)
    return times


class Launch:
    name = "launch"
    about = "host time of a call, and of compiling or loading a kernel"
    needs = (GPU,)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rounds", type=int, default=9)
        parser.add_argument("--calls", type=int, default=300, help="calls in a row")

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        import torch

        results: dict[str, Any] = {}
        for name, values in measure_calls(options.rounds, options.calls).items():
            results[name] = {"host_us": summary(values)}
            print(f"{name:30} {statistics.median(values):7.2f} us of host time a call")
        for name, values in measure_compiling().items():
            results[name] = {"seconds": summary(values), "variants": len(values)}
            print(f"{name:30} {statistics.median(values) * 1e3:7.2f} ms a variant, slowest {max(values) * 1e3:.2f} ms")
        yield Outcome(results, facts={"torch": torch.__version__})
