"""Writes the record of a `scripts/test-gpu` run: what ran, at which commit, on which machine, with which results.

Reads from the folder `--results`: `pytest.xml` (pytest's JUnit report) and, for each compute-sanitizer tool that ran,
`<tool>.log` (the tool's findings) and `<tool>.status` (the exit status). Exits 1 if anything failed or nothing ran.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benches.common import ROOT, output_of

SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PACKAGES = ("torch", "numpy", "cuda-core", "cuda-bindings", "cuda-toolkit", "nvidia-cuda-nvrtc", "nvtx", "pytest")


def commit() -> dict[str, Any]:
    """The commit under test: PIPELINE_COMMIT (a `-dirty` at its end sets the flag), else what git says."""
    name = os.environ.get("PIPELINE_COMMIT") or output_of("git", "describe", "--always", "--abbrev=40", "--dirty")
    return {"commit": name.removesuffix("-dirty") or "unknown", "dirty": name.endswith("-dirty")}


def package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return versions


def machine() -> dict[str, Any]:
    """GPUs, driver, CPU, RAM and the versions of everything that takes part."""
    import torch

    query = output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    gpus = [[field.strip() for field in line.split(",")] for line in query.splitlines()]
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    ram = re.search(r"^MemTotal:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "gpus": [{"name": name, "memory": memory} for name, _, memory in gpus],
        "driver": gpus[0][1] if gpus else "unknown",
        "cpu": cpu[1] if cpu else platform.processor(),
        "cpu_cores": os.cpu_count(),
        "ram_gib": round(int(ram[1]) / 2**20, 1) if ram else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch_cuda": torch.version.cuda,
        "packages": package_versions(),
    }


def suite_of(case: ElementTree.Element) -> str:
    """`tests/gpu/test_kernels.py` for a JUnit case of class `tests.gpu.test_kernels.TestTails`."""
    parts = case.get("classname", "").split(".")
    modules = [index for index, part in enumerate(parts) if part.startswith("test_")]
    return "/".join(parts[: modules[0] + 1]) + ".py" if modules else case.get("name", "unknown")


def test_results(report: Path) -> dict[str, Any]:
    """Counts and durations of pytest's JUnit report, in all and for each test file, and the names of what failed."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    suites: dict[str, dict[str, Any]] = {}
    failures = []
    duration_s = 0.0
    if report.exists():
        tree = ElementTree.parse(report).getroot()
        duration_s = sum(float(suite.get("time", 0)) for suite in tree.iter("testsuite"))
        for case in tree.iter("testcase"):
            outcome = "passed"
            if case.find("failure") is not None or case.find("error") is not None:
                outcome = "failed"
                failures.append(f"{suite_of(case)}::{case.get('name')}")
            elif case.find("skipped") is not None:
                outcome = "skipped"
            suite = suites.setdefault(suite_of(case), {"passed": 0, "failed": 0, "skipped": 0, "duration_s": 0.0})
            suite[outcome] += 1
            suite["duration_s"] = round(suite["duration_s"] + float(case.get("time", 0)), 3)
            counts[outcome] += 1
    return {**counts, "duration_s": round(duration_s, 3), "failures": failures, "suites": suites}


def sanitizer_results(folder: Path) -> dict[str, Any]:
    """For each compute-sanitizer tool that ran: exit status and its summary line ("ERROR SUMMARY: 0 errors")."""
    results = {}
    for tool in SANITIZER_TOOLS:
        status, log = folder / f"{tool}.status", folder / f"{tool}.log"
        if status.exists():
            text = log.read_text(errors="replace") if log.exists() else ""
            summaries = re.findall(r"^=+ (.*SUMMARY:.*)$", text, re.MULTILINE)
            results[tool] = {
                "exit_status": int(status.read_text()),
                "summary": summaries[-1].strip() if summaries else "no summary",
            }
    return results


def make_record(results: Path, started: str, command: str) -> dict[str, Any]:
    started_at = datetime.fromisoformat(started)
    return {
        "command": command,
        **commit(),
        "started": started,
        "duration_s": round((datetime.now(UTC) - started_at).total_seconds(), 1),
        "machine": machine(),
        "tests": test_results(results / "pytest.xml"),
        "compute_sanitizer": sanitizer_results(results),
    }


def succeeded(record: dict[str, Any]) -> bool:
    """At least one test passed, none failed, and each sanitizer tool that ran exited 0 with a summary."""
    tools = record["compute_sanitizer"].values()
    clean = all(tool["exit_status"] == 0 and tool["summary"] != "no summary" for tool in tools)
    return clean and record["tests"]["passed"] > 0 and record["tests"]["failed"] == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="folder with the outputs of the run")
    parser.add_argument("--started", required=True, help="UTC time the run started, ISO 8601")
    parser.add_argument("--command", required=True, help="the command line that ran")
    parser.add_argument("--out", type=Path, help="default: profiles/gpu-tests/<UTC date>-<commit>.json")
    options = parser.parse_args()

    record = make_record(options.results, options.started, options.command)
    name = f"{options.started[:10]}-{record['commit'][:10]}{'-dirty' if record['dirty'] else ''}.json"
    out = options.out or ROOT / "profiles" / "gpu-tests" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")

    tests = record["tests"]
    for tool, result in record["compute_sanitizer"].items():
        print(f"compute-sanitizer {tool}: {result['summary']}")
    print(f"record: {out.relative_to(ROOT) if out.is_relative_to(ROOT) else out}")
    print(f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped")
    return 0 if succeeded(record) else 1


if __name__ == "__main__":
    sys.exit(main())
