"""`scripts/bench cpu`: array to array without a GPU, against the loop over chunks that people write with torch."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench_common import ALLOWED, context, random_layer, summary, write_json

LOOP_ROWS = (1024, 4096)  # what the loop is tried with


def plain_loop(torch: Any, layer: Any, x: Any, y: Any, rows: int) -> None:
    weight, bias = torch.from_numpy(layer.weight), torch.from_numpy(layer.bias)
    for row in range(0, len(x), rows):
        z = torch.nn.functional.linear(torch.from_numpy(x[row : row + rows]), weight, bias)
        y[row : row + rows] = torch.add(z, torch.sigmoid(z), alpha=layer.scaling_factor).numpy()


def run(arguments: argparse.Namespace) -> int:
    import numpy as np
    import torch

    from pipeline import Pipeline

    layer = random_layer(arguments.features, "ieee")
    x = np.random.default_rng(1).standard_normal((arguments.rows, arguments.features), dtype=np.float32)
    y = np.zeros_like(x)
    seconds: dict[str, list[float]] = {}
    worst: dict[str, float] = {}
    with Pipeline(layer, devices="cpu") as pipe:
        contenders: dict[str, Callable[[], object]] = {"pipeline": lambda: pipe.run(x, y)}
        for rows in LOOP_ROWS:
            contenders[f"loop, {rows} rows"] = lambda rows=rows: plain_loop(torch, layer, x, y, rows)
        want = layer.reference(x)
        for n in range(arguments.rounds + 1):  # the first round warms up
            for name in random.sample(list(contenders), len(contenders)):
                y.fill(np.nan)
                start = time.perf_counter()
                contenders[name]()
                taken = time.perf_counter() - start
                if n == 0:
                    worst[name] = float((np.abs(y - want) / (1 + np.abs(want))).max())
                else:
                    seconds.setdefault(name, []).append(taken)
    print(f"{arguments.features} -> {arguments.features}, {arguments.rows} rows, {torch.get_num_threads()} threads")
    for name, values in seconds.items():
        rates = [x.nbytes / value / 1e9 for value in values]
        right = "right" if worst[name] <= ALLOWED["ieee"] else "WRONG RESULT"
        print(f"  {name:18}{statistics.median(rates):.3f} GB/s ({min(rates):.3f} to {max(rates):.3f}), {right}")
    fastest = min(statistics.median(values) for name, values in seconds.items() if name != "pipeline")
    print(f"  {fastest / statistics.median(seconds['pipeline']):.2f} of the faster loop's speed")
    rows_of = {name: {"seconds": summary(values), "worst_difference": worst[name]} for name, values in seconds.items()}
    write_json(arguments.json, {"bench": "cpu", "context": context(), "results": rows_of})
    return int(not all(value <= ALLOWED["ieee"] for value in worst.values()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write results and context there")
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.set_defaults(run=run)
