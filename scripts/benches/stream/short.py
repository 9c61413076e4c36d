"""1,024 rows in a warm Pipeline, against eager torch on pinned tensors."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator

from benches.case import GPU, Case, Outcome
from benches.common import summary
from benches.stream import peers
from benches.stream.rows import rows_for
from benches.turns import timed, turns

ROWS, WARM_UP, TURNS_PER_ROUND = 1024, 5, 20


class Short(Case):
    name = "short"
    about = __doc__
    needs = (GPU,)

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        import torch

        from pipeline import Pipeline

        rows = rows_for(options, whole_pinned=False)
        forward = peers.torch_layer(rows.layer)
        x, y = rows.x_pinned[:ROWS], rows.y_pinned[:ROWS]
        ordinary = rows.x[:ROWS].numpy(), rows.y[:ROWS].numpy()

        def eager() -> None:
            y.copy_(forward(x.to("cuda", non_blocking=True)), non_blocking=True)
            torch.cuda.synchronize()

        with Pipeline(rows.layer, devices="cuda:0") as pipe:
            runs: dict[str, Callable[[], object]] = {
                "eager torch, pinned": eager,
                "pipeline, pinned": lambda: pipe.run(x, y),
                "pipeline, ordinary memory": lambda: pipe.run(*ordinary),
            }
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for n, name in turns(runs, TURNS_PER_ROUND * options.rounds):
                taken, _ = timed(runs[name])
                if n >= WARM_UP:
                    seconds[name].append(taken)
            stats = pipe.run(x, y).stats
        eager_s = statistics.median(seconds["eager torch, pinned"])
        print("1,024 rows, warm")
        for name, values in seconds.items():
            print(
                f"  {name:34} {1e3 * statistics.median(values):.3f} ms ({1e3 * min(values):.3f} to "
                f"{1e3 * max(values):.3f}), {eager_s / statistics.median(values):.2f} of eager torch's speed"
            )
        print("\n".join(f"    {line}" for line in stats.lines()), flush=True)
        yield Outcome(
            {"seconds": {name: summary(values) for name, values in seconds.items()}, "stats": stats.as_dict()}
        )
