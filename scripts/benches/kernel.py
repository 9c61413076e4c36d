"""`scripts/bench kernel`: the whole fused layer against cuBLAS's bare product, on the device."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benches.bursts import Telemetry, burst_seconds
from benches.case import GPU, Outcome
from benches.common import summary
from benches.device_contenders import MM, PEERS, Contenders, Operands, contenders
from benches.turns import turns

PRECISIONS = ("bfloat16", "float16", "tf32", "fp32", "ieee")
SHAPES = [(1024, 8192, 8192), (4096, 8192, 8192), (4096, 4096, 4096)]  # rows, out_features, in_features
SETTLE_S = 0.02  # a turn's telemetry counts from then on


def shape(text: str) -> tuple[int, int, int]:
    """ "1024" is rows of the reference layer, "1024x4096x8192" rows, out_features and in_features."""
    sizes = [int(size) for size in text.split("x")]
    if len(sizes) not in (1, 3) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"shape is {text!r}, expected ROWS or ROWSxOUTxIN")
    return (sizes[0], 8192, 8192) if len(sizes) == 1 else (sizes[0], sizes[1], sizes[2])


def measure(found: Contenders, rounds: int, burst_s: float, telemetry: Telemetry) -> dict[str, Any]:
    """For each contender the seconds of each round, and its mean clock and power where they were sampled."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in found}
    sampled: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    with torch.inference_mode():
        for launch in found.values():  # the first calls compile, load kernels and choose algorithms
            burst_seconds(launch, 3)
        counts = {name: max(3, int(burst_s / burst_seconds(launch, 5))) for name, launch in found.items()}
        for _, name in turns(found, rounds):
            begin = time.perf_counter()
            seconds[name].append(burst_seconds(found[name], counts[name]))
            sampled[name] += telemetry.between(begin + SETTLE_S, time.perf_counter())
    return {
        name: {
            "seconds": seconds[name],
            "clock_mhz": statistics.mean(clock for clock, _ in sampled[name]) if sampled[name] else None,
            "power_w": statistics.mean(power for _, power in sampled[name]) if sampled[name] else None,
        }
        for name in found
    }


def as_row(name: str, values: dict[str, Any], vendor: list[float], operands: Operands) -> dict[str, Any]:
    """One contender's figures as the report has them; `vendor`: seconds of cuBLAS's product in the same rounds."""
    flop = 2 * operands.rows * operands.out_features * operands.in_features / 1e12
    rates = [flop / seconds for seconds in values["seconds"]]
    ratios = [theirs / ours for ours, theirs in zip(values["seconds"], vendor, strict=True)]
    power = values["power_w"]
    return {
        "precision": operands.precision,
        "rows": operands.rows,
        "out_features": operands.out_features,
        "in_features": operands.in_features,
        "name": name,
        "tflops": summary(rates),
        "ratio": summary(ratios),
        "clock_mhz": values["clock_mhz"],
        "power_w": power,
        "tflops_per_w": None if power is None else statistics.median(rates) / power,
    }


def show(row: dict[str, Any]) -> None:
    shown = f"{row['precision']:9} {row['rows']:5} x {row['out_features']} x {row['in_features']}"
    rate, efficiency = row["tflops"], ""
    if row["power_w"] is not None:
        efficiency = f"{row['clock_mhz']:5.0f} {row['tflops_per_w']:5.2f}"
    print(
        f"{shown}  {rate['median']:7.1f} ({rate['min']:.1f} to {rate['max']:.1f}) {row['ratio']['median']:6.3f}"
        f"  {efficiency:11}  {row['name']}",
        flush=True,
    )


class Kernel:
    name = "kernel"
    about = "the whole fused layer against cuBLAS's bare product, on the device"
    needs = (GPU,)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rounds", type=int, default=9)
        parser.add_argument("--burst-ms", type=float, default=70, help="length of one contender's turn in a round")
        parser.add_argument("--precision", action="append", choices=PRECISIONS, help="repeatable; default all")
        parser.add_argument(
            "--shape", action="append", type=shape, metavar="ROWS[xOUTxIN]", help="repeatable; default some around 8192"
        )
        parser.add_argument("--peer", action="append", choices=PEERS, help="repeatable: measure these, too")
        parser.add_argument("--every-tile", action="store_true", help="measure every tile, not only the selected one")
        parser.add_argument("--smoke", action="store_true", help="one small shape, to see that it runs")

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        import torch

        shapes = options.shape or SHAPES
        if options.smoke:
            rows, out_features, in_features = shapes[0]
            shapes = [(rows // 8, out_features // 8, in_features // 8)]
        results = []
        print(
            f"{torch.cuda.get_device_name()}; TFLOP/s, median of {options.rounds} rounds (min to max); ratio to mm; "
            f"MHz, TFLOP/s per W"
        )
        with Telemetry() as telemetry:
            for precision in options.precision or PRECISIONS:
                torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
                for sizes in shapes:
                    operands = Operands(precision, sizes)
                    found = contenders(operands, every_tile=options.every_tile, peers=tuple(options.peer or ()))
                    measured = measure(found, options.rounds, options.burst_ms / 1e3, telemetry)
                    for name, values in measured.items():
                        results.append(as_row(name, values, measured[MM]["seconds"], operands))
                        show(results[-1])
                    yield Outcome(results, facts={"torch": torch.__version__})
