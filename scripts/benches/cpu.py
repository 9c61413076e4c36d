"""`scripts/bench cpu`: array to array without a GPU, against the loop over chunks that people write with torch."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benches.case import Outcome
from benches.common import summary
from benches.layers import ALLOWED, random_layer
from benches.turns import timed, turns

LOOP_ROWS = (1024, 4096)  # what the loop is tried with


def plain_loop(layer: Any, x: Any, y: Any, rows: int) -> None:
    import torch

    weight, bias = torch.from_numpy(layer.weight), torch.from_numpy(layer.bias)
    for row in range(0, len(x), rows):
        z = torch.nn.functional.linear(torch.from_numpy(x[row : row + rows]), weight, bias)
        y[row : row + rows] = torch.add(z, torch.sigmoid(z), alpha=layer.scaling_factor).numpy()


class Cpu:
    name = "cpu"
    about = "array to array without a GPU, against a plain torch loop"
    needs = ()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rows", type=int, default=131_072)
        parser.add_argument("--features", type=int, default=512)
        parser.add_argument("--rounds", type=int, default=9)

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        import numpy as np
        import torch

        from pipeline import Pipeline

        layer = random_layer(options.features, "ieee")
        x = np.random.default_rng(1).standard_normal((options.rows, options.features), dtype=np.float32)
        y, want = np.zeros_like(x), layer.reference(x)
        seconds: dict[str, list[float]] = {}
        worst: dict[str, float] = {}
        with Pipeline(layer, devices="cpu") as pipe:
            contenders: dict[str, Callable[[], object]] = {"pipeline": lambda: pipe.run(x, y)}
            for rows in LOOP_ROWS:
                contenders[f"loop, {rows} rows"] = partial(plain_loop, layer, x, y, rows)
            for n, name in turns(contenders, options.rounds + 1):  # the first round warms up
                y.fill(np.nan)
                taken, _ = timed(contenders[name])
                if n == 0:
                    worst[name] = float((np.abs(y - want) / (1 + np.abs(want))).max())
                else:
                    seconds.setdefault(name, []).append(taken)
        print(f"{options.features} -> {options.features}, {options.rows} rows, {torch.get_num_threads()} threads")
        for name, values in seconds.items():
            rates = [x.nbytes / value / 1e9 for value in values]
            right = "right" if worst[name] <= ALLOWED["ieee"] else "WRONG RESULT"
            print(f"  {name:18}{statistics.median(rates):.3f} GB/s ({min(rates):.3f} to {max(rates):.3f}), {right}")
        fastest = min(statistics.median(values) for name, values in seconds.items() if name != "pipeline")
        print(f"  {fastest / statistics.median(seconds['pipeline']):.2f} of the faster loop's speed")
        found = {
            name: {"seconds": summary(values), "worst_difference": worst[name]} for name, values in seconds.items()
        }
        yield Outcome(found, right=all(value <= ALLOWED["ieee"] for value in worst.values()))
