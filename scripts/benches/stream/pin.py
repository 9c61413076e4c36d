"""Ordinary memory registered with pipeline.pin: what registering costs, and the runs after it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from benches.case import GPU, Case, Outcome
from benches.stream.compare import Contender, all_right, compare, show
from benches.stream.rows import rows_for


class Pin(Case):
    name = "pin"
    about = __doc__
    needs = (GPU,)

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        from pipeline import Pipeline, pin

        rows = rows_for(options, whole_pinned=False)
        x, y = rows.x.numpy(), rows.y.numpy()
        start = time.perf_counter()
        with pin(x), pin(y):
            pin_s = time.perf_counter() - start
            with Pipeline(rows.layer, devices="cuda:0") as pipe:
                pipe.run(x, y)
                contenders = {"pipeline, pinned by pin()": Contender(lambda: pipe.run(x, y), rows.y)}
                found = compare(rows, contenders, options.rounds)
            start = time.perf_counter()
        unpin_s = time.perf_counter() - start
        show("ordinary memory, registered", found)
        print(f"  registering took {pin_s:.2f} s, unregistering {unpin_s:.2f} s")
        results = {"registered": {**found, "pin_seconds": pin_s, "unpin_seconds": unpin_s}}
        yield Outcome(results, all_right(results))
