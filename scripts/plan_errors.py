#!/usr/bin/env python3
"""Compares what `pipeline plan` predicts with what was measured: runs recorded in profiles/, and the error.

They are the runs of `scripts/capture` and of `scripts/bench stream`. Where a record has ceilings, its runs are
predicted from those, since machines drift from day to day.
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
    cases = []
    for found_by_name in document["results"].values():
        for name, found in found_by_name.items():
            cases += _stream_cases(name, found, document, machine)
    return cases


# Of a case of `scripts/bench stream`, by its name: the contender that is ours, and where its rows are and go. What is
# missing (a fresh result) isn't what a plan is about.
RUNS = {
    "pinned to pinned": [("pipeline", "pinned", "pinned")],
    "registered": [("pipeline, pinned by pin()", "pinned", "pinned")],
    "ordinary to ordinary memory": [("pipeline", "array", "array")],
    "warm .npy to pinned": [("pipeline, .npy to pinned", "file", "pinned")],
    "warm .npy to .npy": [("pipeline", "file", "file")],
}
SHAPE_RUNS = [("pipeline, pinned", "pinned", "pinned"), ("pipeline, ordinary memory", "array", "array")]


def _stream_cases(name: str, found: Any, document: dict[str, Any], machine: Machine) -> list[Case]:
    """The runs of one case of `scripts/bench stream`."""
    in_features = out_features = document["features"]
    if " -> " in name:  # a layer of another shape
        in_features, out_features = map(int, name.split(" -> "))
        runs = SHAPE_RUNS
    elif name in RUNS:
        runs = RUNS[name]
    else:
        return []
    n_bytes = found.get("bytes_in", found.get("bytes"))
    rows = n_bytes // (4 * in_features)
    if "ceiling_s" in found and in_features == out_features:
        measured = n_bytes / found["ceiling_s"]["median"] / 1e9
        machine = replace(machine, duplex_gb_per_s={**machine.duplex_gb_per_s, "1": measured})
    if "write_seconds" in found:
        machine = replace(machine, file_write_gb_per_s=n_bytes / found["write_seconds"]["median"] / 1e9)
    cases = []
    for contender, source, out in runs:
        job = Job(rows, in_features, out_features, FLOAT32, document["precision"], source, out)
        seconds = found["contenders"][contender].get("seconds", found.get("seconds"))["median"]
        cases.append(Case(f"{name}, {source}" if runs is SHAPE_RUNS else name, job, machine, rows / seconds))
    return cases


def all_cases(folder: Path = ROOT / "profiles") -> list[Case]:
    """The runs of every record under the folder."""
    machine, cases = Machine.load("h200"), []
    for path in sorted(folder.rglob("*.json")):
        document = json.loads(path.read_text())
        if isinstance(document, dict) and document.get("bench") in ("stream", "plan"):
            name = path.relative_to(folder).with_suffix("")
            cases += [replace(case, name=f"{name}: {case.name}") for case in measured_cases(document, machine)]
    return cases


def main() -> int:
    print(f"{'measured run':<52}{'measured':>14}{'predicted':>14}{'error':>8}  bound")
    errors = []
    for case in all_cases():
        found = predict(case.job, case.machine)
        errors.append(found.rows_per_s / case.rows_per_s - 1)
        print(f"{case.name:<52}{case.rows_per_s:>14,.0f}{found.rows_per_s:>14,.0f}{errors[-1]:>8.1%}  {found.bound}")
    print(f"{len(errors)} runs, largest error {max(map(abs, errors), default=0):.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
