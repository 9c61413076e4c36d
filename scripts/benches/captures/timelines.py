"""Timelines: one streamed run with its event record, and the same under Nsight Systems."""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
import tempfile
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

from benches.captures.machine import kernel_rate
from benches.captures.made import check_rows, make_layer, make_rows
from benches.ceilings import duplex
from benches.common import GIB, ROOT

# name: features, precision, memory, GiB each way, chunk_rows (0: as a Pipeline chooses). What bounds each on an H200 is
# in the name. The bus has chunks of 64 MiB: D2H copies follow each other after 15 us, 1% of such a chunk.
TIMELINES = {
    "bus": (4096, "fp32", "pinned", 4.0, 4096),
    "reference": (8192, "fp32", "pinned", 4.0, 0),
    "kernel": (8192, "ieee", "pinned", 1.0, 0),
    "staging": (8192, "fp32", "pageable", 4.0, 0),
}


def run_one(arguments: argparse.Namespace) -> int:
    """Short runs that warm up, a measured ceiling, and the run whose timeline is kept."""
    import torch

    from pipeline import Pipeline, TraceWarning
    from pipeline.instrument import Ceilings

    features, precision = arguments.features, arguments.precision
    rows = int(arguments.gib * GIB) // (features * 4)
    layer = make_layer(features, features, torch.float32, precision)
    x, y = make_rows(rows, features, features, torch.float32, arguments.memory)
    warnings.simplefilter("error", TraceWarning)  # the timeline is what this is for
    os.environ["PIPELINE_TUNE"] = "0"  # a measurement in the run would replace the ceilings below
    with Pipeline(layer, devices="cuda:0", chunk_rows=arguments.chunk_rows or "auto") as pipe:
        for _ in range(3):  # smaller than the run below: nsys's reader takes the largest
            pipe.run(x[: rows // 4], y[: rows // 4])
        both = duplex()
        fastest = "layer" if precision == "fp32" else "cuBLAS mm"  # whose fp32 product takes four times as long
        kernel = kernel_rate(precision, (pipe.chunk_rows, features, features), fastest)
        pipe.ceilings["cuda:0"] = Ceilings(both, both, kernel_tflops=kernel, origin="measured before this run")
        stats = pipe.run(x, y, trace=arguments.out).stats
    check_rows(layer, x, y)
    print("\n".join(stats.lines()))
    return 0


def extract(report: Path, target: Path) -> None:
    """The rows of nsys's export that a timeline is read from, small enough to keep."""
    target.unlink(missing_ok=True)
    with closing(sqlite3.connect(target)) as database, database:
        database.execute("ATTACH ? AS full", (str(report),))
        there = {name for (name,) in database.execute("SELECT name FROM full.sqlite_master WHERE type = 'table'")}
        activities = [t for t in ("CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_MEMCPY") if t in there]
        for table in ("NVTX_EVENTS", "TARGET_INFO_GPU", *activities):
            database.execute(f"CREATE TABLE {table} AS SELECT * FROM full.{table}")
        calls = " UNION ".join(f"SELECT correlationId FROM {table}" for table in activities)
        database.execute(
            "CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME AS SELECT * FROM full.CUPTI_ACTIVITY_KIND_RUNTIME "
            f"WHERE correlationId IN ({calls})"
        )
        names = "SELECT textId FROM NVTX_EVENTS UNION SELECT nameId FROM CUPTI_ACTIVITY_KIND_RUNTIME"
        if "CUPTI_ACTIVITY_KIND_KERNEL" in activities:
            names += " UNION SELECT shortName FROM CUPTI_ACTIVITY_KIND_KERNEL"
        database.execute(f"CREATE TABLE StringIds AS SELECT * FROM full.StringIds WHERE id IN ({names})")


def agreement(record: Any, report: Any) -> dict[str, dict[str, float]]:
    """Busy seconds of each stage in our record and in nsys's report of the same run, and their ratio."""
    from pipeline.report.timeline import busy_s

    found = {}
    for stage in ("H2D", "kernel", "D2H"):
        ours, theirs = (busy_s(each.devices["cuda:0"], stage) for each in (record, report))
        found[stage] = {"record_s": ours, "nsys_s": theirs, "ratio": ours / theirs}
    return found


def capture_timeline(name: str, folder: Path) -> dict[str, Any]:
    """Make one run under nsys; keep its event record, nsys's timeline, an extract of the export and the figures."""
    from pipeline.report.nsys import read_report, record
    from pipeline.report.timeline import device_use, use_lines
    from pipeline.report.trace import read_trace, write_trace

    features, precision, memory, gib, chunk_rows = TIMELINES[name]
    ours = folder / f"{name}.record.json"
    options = ["--features", features, "--precision", precision, "--memory", memory, "--gib", gib]
    options += ["--chunk-rows", chunk_rows, "--out", ours]
    command = [sys.executable, str(ROOT / "scripts" / "capture"), "run", *map(str, options)]
    with tempfile.TemporaryDirectory() as scratch:
        export = record(command, Path(scratch) / name)
        extract(export, folder / f"{name}.extract.sqlite")
        size = export.stat().st_size
    report = read_report(folder / f"{name}.extract.sqlite")
    event_record, stats = read_trace(ours)
    write_trace(folder / f"{name}.nsys.json", report, stats)
    (folder / f"{name}.txt").write_text("\n".join(use_lines(report)) + "\n")
    print("\n".join(use_lines(report)))
    operations = report.devices["cuda:0"]
    use = device_use(operations)
    stages = {stage for stage, lane in use.lanes.items() if lane.count}
    complete = [n for n in {i.chunk for i in operations} if {i.stage for i in operations if i.chunk == n} >= stages]
    return {
        "command": " ".join(["scripts/capture run", *map(str, options[:-2])]),
        "stats": stats,
        "nsys": use.as_dict(),
        "record": device_use(event_record.devices["cuda:0"]).as_dict(),
        "agreement": agreement(event_record, report),
        "chunks_with_every_stage": len(complete),
        "chunks": len({i.chunk for i in operations}),
        "export_bytes": size,
    }
