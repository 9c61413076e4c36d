#!/usr/bin/env python3
"""Compares what `pipeline plan` predicts with what was measured: runs recorded in profiles/, and the error.

They are the runs of `scripts/capture`, `scripts/bench stream` and `scripts/bench file`. Each is predicted from the
shipped machine's rates and, where its record has the bus's rate of that same run, once more with that one, since
machines drift from day to day. A prediction has the chunks of the record: the rules for them have changed since.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.dtypes import BFLOAT16, FLOAT32, parse_dtype  # noqa: E402
from pipeline.options import PLAN_OPTIONS, RunOptions  # noqa: E402
from pipeline.plan.machine import Machine  # noqa: E402
from pipeline.plan.predict import predict  # noqa: E402
from pipeline.plan.workload import Workload  # noqa: E402

SHIPPED = Machine.load("h200")


@dataclass(frozen=True)
class Case:
    """A run that was measured, as a job to predict. `own` has the rates of the same record, None where it has none."""

    name: str
    job: Workload
    rows_per_s: float
    own: Machine | None = None
    own_disk: bool = False  # the disk is that of the record: disks differ more than machines of a kind

    @property
    def machines(self) -> list[tuple[str, Machine]]:
        """What to predict it on."""
        shipped = [] if self.own_disk else [("shipped", SHIPPED)]
        return [*shipped, *([("own", self.own)] if self.own is not None else [])]


def measured_cases(document: dict[str, Any]) -> Iterator[Case]:
    """The runs in a record of one of the benches above."""
    if document["bench"] == "plan":
        own = replace(SHIPPED, **document["machine"])
        for case in document["cases"]:
            options = {name: case["job"].pop(name) for name in PLAN_OPTIONS if name in case["job"]}
            known = {**case["job"], "dtype": parse_dtype(case["job"]["dtype"])}
            job = Workload(**known, options=RunOptions(**options))
            yield Case(case["name"], job, case["rows_per_s"], own)
    elif document["bench"] == "file":
        stats, features = document["results"]["stats"], document["features"]
        job = _job(stats, features, features, "file", "file")
        yield Case("file to file", job, job.rows / document["results"]["seconds"])
    else:
        for found_by_name in document["results"].values():
            for name, found in found_by_name.items():
                if name in ENDS or " -> " in name:
                    yield from _compared_cases(name, found, document)
        short = document["results"].get("short")
        for contender, end in (("pipeline, pinned", "pinned"), ("pipeline, ordinary memory", "array")) if short else ():
            job = _job(short["stats"], document["features"], document["features"], end, end)
            yield Case(f"{end} to {end}, 1,024 rows", job, job.rows / short["seconds"][contender]["median"])


# A case of `scripts/bench stream`: where rows are and where they go.
ENDS = {
    "pinned to pinned": ("pinned", "pinned"),
    "registered": ("pinned", "pinned"),
    "ordinary to ordinary memory": ("array", "array"),
    "ordinary memory to a fresh result": ("array", "fresh"),
    "warm .npy to pinned": ("file", "pinned"),
    "warm .npy to .npy": ("file", "file"),
}


def _compared_cases(name: str, found: Any, document: dict[str, Any]) -> Iterator[Case]:
    """Our own contenders in one case of `scripts/bench stream`."""
    in_features = out_features = document["features"]
    if " -> " in name:  # a layer of another shape
        in_features, out_features = map(int, name.split(" -> "))
    n_bytes = found.get("bytes_in", found.get("bytes"))
    rows = n_bytes // (4 * in_features)
    own = None
    if "ceiling_s" in found and in_features == out_features:
        measured = n_bytes / found["ceiling_s"]["median"] / 1e9
        own = replace(SHIPPED, duplex_gb_per_s={**SHIPPED.duplex_gb_per_s, "1": measured})
    if "write_seconds" in found:
        own = replace(SHIPPED, disk_write_gb_per_s=n_bytes / found["write_seconds"]["median"] / 1e9)
    for contender, seen in found["contenders"].items():
        if not contender.startswith("pipeline"):
            continue
        narrow, detail = "wire_dtype bf16" in contender, contender.removeprefix("pipeline").removeprefix(", ")
        gpus = int(contender.split()[-2]) if contender.endswith(("GPU", "GPUs")) else 1
        if " -> " in name:
            source, out = ("pinned", "pinned") if detail == "pinned" else ("array", "array")
            stats = found[f"stats_{'pinned' if detail == 'pinned' else 'ordinary'}"]
        else:
            source, out = ENDS[name]
            stats = found.get("stats_bf16" if narrow else "stats")
        known = {"rows": rows, "runs_as": document["precision"], **({} if stats is None else stats)}
        job = replace(_job(known, in_features, out_features, source, out), gpus=gpus)
        if narrow:
            job = replace(job, options=job.options.with_values({"wire_dtype": BFLOAT16}))
        seconds = seen.get("seconds", found.get("seconds"))["median"]
        title = f"{source} to {out}" + (f", {detail}" if detail else "")
        named = f"{name}, {title}" if " -> " in name else title
        yield Case(named, job, rows / seconds, own if gpus == 1 else None, own_disk="write_seconds" in found)


def _job(stats: dict[str, Any], in_features: int, out_features: int, source: str, out: str) -> Workload:
    """The job of a run with these figures, with as many chunks as it had; float32 rows."""
    rows = stats["rows"]
    chunk_rows = -(-rows // stats["chunks"]) if "chunks" in stats else "auto"
    options = RunOptions(chunk_rows=chunk_rows)
    return Workload(rows, in_features, out_features, FLOAT32, stats["runs_as"], source, out, options=options)


def all_cases(folder: Path = ROOT / "profiles") -> list[Case]:
    """The runs of every record under the folder that is of the shipped machine's GPU."""
    cases = []
    for path in sorted(folder.rglob("*.json")):
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or document.get("bench") not in ("stream", "plan", "file"):
            continue
        if all(gpu.startswith("NVIDIA H200") for gpu in document["context"]["gpus"]):
            cases += [replace(case, name=f"{path.stem}: {case.name}") for case in measured_cases(document)]
    return cases


def main() -> int:
    print(f"{'measured run':<88}{'measured':>11}{'predicted':>11}{'error':>7}{'with its own rates':>20}  bound")
    errors = []
    for case in all_cases():
        found = {kind: predict(case.job, machine) for kind, machine in case.machines}
        each = {kind: (one.rows_per_s or 0.0) / case.rows_per_s - 1 for kind, one in found.items()}
        errors += each.values()
        shown = {kind: f"{one.rows_per_s:>11,.0f}{each[kind]:>7.1%}" for kind, one in found.items()}
        bound = next(iter(found.values())).bound
        rates = f"{shown.get('shipped', '-'):>18}{shown.get('own', '-'):>20}"
        print(f"{case.name:<88}{case.rows_per_s:>11,.0f}{rates}  {bound}")
    print(f"rows a second; largest error {max(map(abs, errors), default=0):.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
