"""One GPU, and all of them together: pinned memory, ordinary memory, and bf16 on the wire."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

from benches.case import SEVERAL_GPUS, Case, Outcome
from benches.stream.compare import ALLOWED_BF16, COPY_WORKERS, Contender, all_right, compare, show
from benches.stream.rows import rows_for


def contenders(pipelines: dict[str, Any], ends: tuple[Any, Any], y: Any, allowed: float | None) -> dict[str, Contender]:
    """One for each pipeline, which is warmed up."""
    for pipe in pipelines.values():
        pipe.run(*ends)
    return {name: Contender(partial(pipe.run, *ends), y, allowed) for name, pipe in pipelines.items()}


class Gpus(Case):
    name = "gpus"
    about = __doc__
    needs = (SEVERAL_GPUS,)

    def measure(self, options: argparse.Namespace) -> Iterator[Outcome]:
        import torch

        from pipeline import Pipeline

        rows, together = rows_for(options), f"{torch.cuda.device_count()} GPUs"
        plain = rows.without_precision()
        results: dict[str, Any] = {}
        with (
            Pipeline(rows.layer, devices="cuda:0") as one,
            Pipeline(rows.layer) as every,
            Pipeline(plain, devices="cuda:0", wire_dtype="bf16") as one_narrow,
            Pipeline(plain, wire_dtype="bf16") as every_narrow,
        ):
            wide = {"pipeline, 1 GPU": one, f"pipeline, {together}": every}
            narrow = {
                "pipeline, wire_dtype bf16, 1 GPU": one_narrow,
                f"pipeline, wire_dtype bf16, {together}": every_narrow,
            }
            # On the wire of another type, pinned rows would be staged like ordinary ones: nothing new.
            pinned, ordinary = (rows.x_pinned, rows.y_pinned), (rows.x.numpy(), rows.y.numpy())
            found = compare(rows, contenders(wide, pinned, rows.y_pinned, None), options.rounds)
            stats = every.run(*pinned).stats
            results["pinned to pinned"] = {**found, "stats": stats.as_dict()}
            show("pinned to pinned", found)
            print(stats, flush=True)
            yield Outcome(results, all_right(results))

            both = contenders(wide, ordinary, rows.y, None) | contenders(narrow, ordinary, rows.y, ALLOWED_BF16)
            found = compare(rows, both, options.rounds, alone={COPY_WORKERS: rows.copied_gb_per_s})
            stats, stats_bf16 = every.run(*ordinary).stats, every_narrow.run(*ordinary).stats
            more = {"stats": stats.as_dict(), "stats_bf16": stats_bf16.as_dict()}
            results["ordinary to ordinary memory"] = {**found, **more}
            show("ordinary to ordinary memory", found)
            print(stats, flush=True)
            yield Outcome(results, all_right(results))
