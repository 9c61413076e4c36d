#!/usr/bin/env python3
"""Compares what `pipeline plan` predicts with what was measured: runs recorded in profiles/, and the error.

They are the runs of `scripts/capture`, of `scripts/bench file`, and of `scripts/bench stream` as it wrote them up to
commit 0351fdf. Where a record has ceilings, its runs are predicted from those, since machines drift from day to day.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.config import FLOAT32, parse_dtype  # noqa: E402
from pipeline.plan import Job, Machine, predict  # noqa: E402


@dataclass(frozen=True)
class Case:
    """A run that was measured, as a job to predict on a machine with the ceilings of the same record."""

    name: str
    job: Job
    machine: Machine
    rows_per_s: float


def measured_cases(document: dict[str, Any], machine: Machine) -> list[Case]:
    """The runs in a record of one of the benches above, on the machine with the ceilings of that record."""
    if document["bench"] == "plan":
        return [
            Case(
                case["name"],
                Job(**{**case["job"], "dtype": parse_dtype(case["job"]["dtype"])}),
                replace(machine, **document["machine"]),
                case["rows_per_s"],
            )
            for case in document["cases"]
        ]
    features, results = document["features"], document["results"]
    if document["bench"] == "file":
        stats = results["stats"]
        job = Job(stats["rows"], features, features, FLOAT32, stats["runs_as"], "file", "file")
        return [Case("file", job, machine, stats["rows_per_s"])]
    cases = []
    for memory in sorted({"pinned", "pageable"} & results.keys()):
        result = results[memory]
        stats = result["median_run"]
        where = "pinned" if memory == "pinned" else "array"
        job = Job(
            stats["rows"], features, features, FLOAT32, stats["runs_as"], where, where,
            chunk_rows=stats["chunk_rows"], num_streams=stats["num_streams"],
        )  # fmt: skip
        ceiling = {**machine.duplex_gb_per_s, "1": result["ceiling_gb_per_s_each_way"]["median"]}
        rate = result["gb_per_s_each_way"]["median"] * 1e9 / job.in_row_bytes
        cases.append(Case(memory, job, replace(machine, duplex_gb_per_s=ceiling), rate))
    return cases


def all_cases(folder: Path = ROOT / "profiles") -> list[Case]:
    """The runs of every record under the folder."""
    machine, cases = Machine.load("h200"), []
    for path in sorted(folder.rglob("*.json")):
        document = json.loads(path.read_text())
        if isinstance(document, dict) and document.get("bench") in ("stream", "file", "plan"):
            name = path.relative_to(folder).with_suffix("")
            cases += [replace(case, name=f"{name}: {case.name}") for case in measured_cases(document, machine)]
    return cases


def main() -> int:
    print(f"{'measured run':<44}{'measured':>14}{'predicted':>14}{'error':>8}  bound")
    errors = []
    for case in all_cases():
        found = predict(case.job, case.machine)
        errors.append(found.rows_per_s / case.rows_per_s - 1)
        print(f"{case.name:<44}{case.rows_per_s:>14,.0f}{found.rows_per_s:>14,.0f}{errors[-1]:>8.1%}  {found.bound}")
    print(f"{len(errors)} runs, largest error {max(map(abs, errors), default=0):.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
