"""`scripts/bench stream`: host to host through Pipeline, against the bus's bare ceiling and what people write.

The contenders of a case move the same bytes and take turns; figures are medians with their range. What `compare` times
is compared with the float64 layer, all rows, and an output that is given to it was NaN before; the cases short and
sweep are timed only, and in fresh processes (cold) some rows are checked. Arrays are taken as they come, and the first
run of each turn counts. Memory is touched before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

from benches.case import GPU, Case, Outcome, lacks
from benches.pages import touch_first
from benches.stream.cold import Cold
from benches.stream.files import Files
from benches.stream.gpus import Gpus
from benches.stream.memory import Memory
from benches.stream.pin import Pin
from benches.stream.rows import LATER, release
from benches.stream.shapes import Shapes
from benches.stream.short import Short
from benches.stream.sweep import Sweep

CASES: dict[str, Case] = {
    case.name: case for case in (Memory(), Gpus(), Short(), Files(), Cold(), Pin(), Shapes(), Sweep())
}
ONLY_WHEN_NAMED = ("sweep",)


class Stream:
    """All cases of the folder, one after the other in the same memory."""

    name = "stream"
    about = "host to host through Pipeline, against the bus and what people write"
    needs = (GPU,)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        which = "repeatable; default all but sweep, and gpus only where there are several"
        parser.add_argument("--case", action="append", choices=CASES, help=which)
        parser.add_argument("--rounds", type=int, default=5)
        parser.add_argument("--gib", type=float, default=8, help="GiB each way")
        parser.add_argument("--features", type=int, default=8192, help="width of the layer, in and out")
        parser.add_argument("--precision", default="tf32", choices=("tf32", "ieee", "fp32"))
        parser.add_argument("--quick", action="store_true", help="leave out the slowest recipe")
        parser.add_argument("--no-peers", action="store_true", help="leave out all recipes")
        parser.add_argument("--directory", help="where files go; default: the system's folder for temporary files")

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        results: dict[str, Any] = {}
        right, touched = True, touch_first((4 + LATER) * options.gib)
        print(touched, flush=True)
        facts = {"features": options.features, "precision": options.precision, "touched": touched}
        try:
            for name in options.case or [name for name in CASES if name not in ONLY_WHEN_NAMED]:
                if need := lacks(CASES[name]):
                    if options.case:
                        raise SystemExit(f"the case {name} needs {need.missing}")
                    continue
                start = time.perf_counter()
                outcome = Outcome({})
                for outcome in CASES[name].measure(options):
                    results[name] = outcome.results
                    yield Outcome(results, right and outcome.right, facts)
                right = right and outcome.right
                print(f"-- {name} took {time.perf_counter() - start:.0f} s", flush=True)
        finally:
            release()
