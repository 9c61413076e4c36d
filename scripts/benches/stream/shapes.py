"""Narrow and wide layers: the bound that each hits and the fraction reached."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from benches.case import GPU, Case, Outcome
from benches.common import GIB
from benches.stream.compare import Contender, all_right, compare, show
from benches.stream.rows import Rows, rows_for

SHAPES = ((1024, 8192), (8192, 1024), (512, 512), (16384, 256))  # in_features, out_features


def measure_shape(rows: Rows, rounds: int) -> dict[str, Any]:
    """From pinned and from ordinary memory: the comparison, and each one's bound and how near it came."""
    from pipeline import Pipeline
    from pipeline.report.stages import nearness

    ends = {"pinned": (rows.x_pinned, rows.y_pinned), "ordinary": (rows.x.numpy(), rows.y.numpy())}
    with Pipeline(rows.layer, devices="cuda:0") as pipe:
        for both in ends.values():
            pipe.run(*both)
        contenders = {
            "pipeline, pinned": Contender(lambda: pipe.run(*ends["pinned"]), rows.y_pinned),
            "pipeline, ordinary memory": Contender(lambda: pipe.run(*ends["ordinary"]), rows.y),
        }
        found = compare(rows, contenders, rounds)
        for name, both in ends.items():
            stats = pipe.run(*both).stats
            found[f"stats_{name}"] = stats.as_dict()
            found[f"bound_{name}"] = stats.bound, max(map(nearness, stats.stages.values()))
    return found


class Shapes(Case):
    name = "shapes"
    about = __doc__
    needs = (GPU,)

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        whole = rows_for(options)
        results: dict[str, Any] = {}
        for widths in SHAPES:
            rows = int(options.gib / 2 * GIB) // (4 * max(widths))
            part = Rows.make(whole.memory, whole.copier, rows, widths, whole.precision)
            title = f"{widths[0]} -> {widths[1]}"
            results[title] = found = measure_shape(part, options.rounds)
            show(title, found)
            for name in ("pinned", "ordinary"):
                print("  {}: bound by {}, {:.2f} of a limit reached".format(name, *found[f"bound_{name}"]))
            yield Outcome(results, all_right(results))
        whole.fill()
