"""Nsight Systems: find it, record a command with it, and read the SQLite export of its report as a timeline.

What ran on the GPU comes from CUPTI's tables; which stage and chunk it belongs to from the NVTX range around the call
that queued it, found over the call's correlation number. Fills and drains are NVTX ranges themselves.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import nsys_packages, nsys_program
from pipeline.errors import DeviceError, FileFormatError, OptionError
from pipeline.instrument import RUN, STAGES, Interval
from pipeline.report.timeline import Timeline

_GPU_TABLES = {"CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_MEMCPY", "CUPTI_ACTIVITY_KIND_RUNTIME"}
_COPY_STAGES = {1: "H2D", 2: "D2H"}  # CUPTI's copyKind
_PUSH_POP, _START_END, _DOMAIN = 59, 60, 75  # eventType of NVTX_EVENTS
_NESTED = "/opt/nvidia/nsight-compute/*/host/target-linux-x64/nsys"


# -- record ------------------------------------------------------------------------------------------------------------


def find_nsys() -> Path:
    """The nsys program: PIPELINE_NSYS, on PATH, or inside Nsight Compute's folder.

    Raises:
        OptionError: it isn't there.
    """
    given = nsys_program() or shutil.which("nsys")
    nested = sorted(str(path) for path in Path("/").glob(_NESTED.removeprefix("/")))
    for candidate in [given] if given else nested[-1:]:
        if os.access(candidate, os.X_OK):
            return Path(candidate)
    raise OptionError(
        f"nsys (Nsight Systems) isn't {'at ' + given if given else 'on PATH nor in ' + _NESTED}: install it, or set "
        f"PIPELINE_NSYS to it. Without it, --trace run.json records the same lanes by the pipeline's own events"
    )


def record(
    command: Sequence[str],
    prefix: Path,
    *,
    delay_s: float | None = None,
    duration_s: float | None = None,
    quiet: bool = False,
) -> Path:
    """Run `command` under nsys. Leaves <prefix>.nsys-rep and <prefix>.sqlite, and returns the latter.

    What the command and nsys print goes to this process's output, with `quiet` all of it to standard error.
    `delay_s` and `duration_s` record only that part of the command's time; the command runs to its end either way.

    Raises:
        OptionError: no nsys here, or its importer lacks libraries and no packages with them are at hand.
        DeviceError: the command failed, or nsys did.
    """
    nsys = find_nsys()
    report, sqlite, raw = (prefix.with_name(prefix.name + suffix) for suffix in (".nsys-rep", ".sqlite", ".qdstrm"))
    for path in (report, sqlite, raw):
        path.unlink(missing_ok=True)
    options = ["-t", "cuda,nvtx", "-s", "none", "--cpuctxsw=none", "-f", "true", "-o", str(prefix)]
    if delay_s is not None:
        options += ["--delay", str(delay_s)]
    if duration_s is not None:
        options += ["--duration", str(duration_s), "--kill", "none"]
    done = subprocess.run([str(nsys), "profile", *options, *command], stdout=2 if quiet else None)
    if done.returncode and not (report.exists() or raw.exists()):
        raise DeviceError(f"{' '.join(command[:3])} ... under nsys ended with status {done.returncode}; see its output")
    with tempfile.TemporaryDirectory(prefix="pipeline-nsys-") as folder:
        environment = _with_libraries(nsys, Path(folder))
        if not report.exists():  # Nsight Compute's copy can't start its importer by itself
            importer = _importer(nsys)
            if importer is None or not raw.exists():
                raise DeviceError(f"nsys wrote neither {report.name} nor {raw.name}; see its output above")
            _checked([str(importer), "-i", str(raw), "-o", str(report)], environment)
            raw.unlink()
        _checked([str(nsys), "export", "-t", "sqlite", "-f", "true", "-o", str(sqlite), str(report)], environment)
    if done.returncode:
        raise DeviceError(
            f"{' '.join(command[:3])} ... ended with status {done.returncode}; what was recorded of it is in {sqlite}"
        )
    return sqlite


def _importer(nsys: Path) -> Path | None:
    found = sorted(nsys.resolve().parent.parent.glob("*/QdstrmImporter"))
    return found[0] if found else None


def _with_libraries(nsys: Path, folder: Path) -> dict[str, str]:
    """The environment in which the importer finds libdw.so.1: the system's, or the Debian packages' unpacked.

    Raises:
        OptionError: neither is there.
    """
    importer = _importer(nsys)
    if importer is None:
        return dict(os.environ)
    needs = subprocess.run(["ldd", str(importer)], capture_output=True, text=True).stdout
    if "libdw.so.1 => not found" not in needs:
        return dict(os.environ)
    packages = nsys_packages()
    for package in sorted(packages.glob("*.deb")):
        _checked(["dpkg", "-x", str(package), str(folder)], dict(os.environ))
    found = sorted(folder.rglob("libdw.so.1"))
    if not found:
        raise OptionError(
            f"nsys's importer needs libdw.so.1, which isn't on this system nor in the packages of {packages}/: install "
            f"libdw1, or put the Debian packages libdw1, libelf1, libbz2-1.0 and liblzma5 into that folder "
            f"(PIPELINE_NSYS_DEBS names another)"
        )
    paths = [str(found[0].parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(paths)}


def _checked(command: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        tail = " ".join((done.stdout + done.stderr).split())[-400:]
        raise DeviceError(f"{' '.join(command[:2])} ended with status {done.returncode}: {tail or 'no output'}")


# -- read --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Range:
    """An NVTX range of the pipeline's: nanoseconds, and the chunk's or the run's number."""

    name: str
    start: int
    end: int
    thread: int
    number: int


def read_report(path: str | os.PathLike[str]) -> Timeline:
    """The timeline of the largest run in the SQLite export of an nsys report: the one with the most operations.

    Raises:
        FileNotFoundError: no such file.
        FileFormatError: not such an export, or nothing of the pipeline is in it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} isn't there; expected the SQLite export of an nsys report")
    try:
        with closing(sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro", uri=True)) as database:
            return _read(database, str(path))
    except sqlite3.DatabaseError as error:
        raise FileFormatError(
            f"{path} can't be read as the SQLite export of an nsys report: {error}; make one with "
            f"nsys export -t sqlite REPORT.nsys-rep"
        ) from error


def _read(database: sqlite3.Connection, path: str) -> Timeline:
    there = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "NVTX_EVENTS" not in there:
        raise FileFormatError(
            f"{path} holds no NVTX_EVENTS table; record with nsys profile -t cuda,nvtx, then export with -t sqlite"
        )
    ranges = list(_ranges(database))
    if not any(each.name in STAGES for each in ranges):
        raise FileFormatError(f"{path} holds no NVTX ranges of the domain pipeline: was a pipeline run recorded?")
    start, end = _largest_run(ranges)
    stages = [each for each in ranges if each.name in STAGES and start <= each.start <= end]
    devices: dict[int, list[Interval]] = {}
    chunk_device: dict[int, int] = {}
    unassigned = 0
    if there >= _GPU_TABLES:  # nsys makes a table only where it has rows: a CPU run leaves none
        calls = _Calls(stages)
        for device, stage, began, ended, n_bytes, thread, called in _activities(database):
            if not start <= called <= end:
                continue
            chunk = calls.chunk_of(stage, thread, called)
            if chunk is None:
                unassigned += 1
                continue
            chunk_device[chunk] = device
            devices.setdefault(device, []).append(
                Interval(stage, chunk, (began - start) / 1e9, (ended - start) / 1e9, n_bytes)
            )
    devices = {device: _launches_joined(operations) for device, operations in devices.items()}
    for each in stages:
        if each.name in ("fill", "drain"):
            device = chunk_device.get(each.number, min(chunk_device.values(), default=0))
            devices.setdefault(device, []).append(
                Interval(each.name, each.number, (each.start - start) / 1e9, (each.end - start) / 1e9, 0)
            )
    names = _gpu_names(database, there)
    ordered = {
        f"cuda:{device}": sorted(operations, key=lambda i: (STAGES.index(i.stage), i.start_s))
        for device, operations in sorted(devices.items())
    }
    hardware = {f"cuda:{device}": names[device] for device in devices if device in names}
    return Timeline(ordered, "Nsight Systems report", hardware, unassigned=unassigned)


def _launches_joined(operations: Iterable[Interval]) -> list[Interval]:
    """Kernels of one chunk as one operation, from the start of the first to the end of the last: fp32 takes three."""
    others, kernels = [], dict[int, Interval]()
    for each in operations:
        if each.stage != "kernel":
            others.append(each)
            continue
        joined = kernels.get(each.chunk, each)
        start_s, end_s = min(joined.start_s, each.start_s), max(joined.end_s, each.end_s)
        kernels[each.chunk] = each._replace(start_s=start_s, end_s=end_s)
    return [*others, *kernels.values()]


def _columns(database: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in database.execute(f"PRAGMA table_info({table})")}


def _ranges(database: sqlite3.Connection) -> Iterable[_Range]:
    """The ranges of the domain "pipeline"; their names are literal text or numbers of StringIds.

    A recording that began late may lack the domain's own event: then ranges of the same names in any domain count.
    """
    columns = _columns(database, "NVTX_EVENTS")
    payloads = [name for name in ("int64Value", "uint64Value", "int32Value", "uint32Value") if name in columns]
    if not payloads:
        raise FileFormatError("NVTX_EVENTS has no integer payloads; expected int64Value or another: a newer nsys?")
    number = f"COALESCE({', '.join(f'n.{name}' for name in payloads)}, -1)"
    named = "FROM NVTX_EVENTS n LEFT JOIN StringIds s ON s.id = n.textId"
    domains = {
        domain
        for domain, name in database.execute(
            f"SELECT n.domainId, COALESCE(n.text, s.value) {named} WHERE n.eventType = {_DOMAIN}"
        )
        if name == "pipeline"
    }
    query = f"""
        SELECT n.domainId, COALESCE(n.text, s.value), n.start, n.end, n.globalTid, {number} {named}
        WHERE n.eventType IN ({_PUSH_POP}, {_START_END}) AND n.end IS NOT NULL ORDER BY n.start"""
    for domain, name, start, end, thread, payload in database.execute(query):
        if (name in STAGES or name == RUN) and (domain in domains or not domains):
            yield _Range(name, start, end, thread, payload)


def _largest_run(ranges: Sequence[_Range]) -> tuple[int, int]:
    """Start and end in nanoseconds, over all its devices, of the run with the most ranges of stages, the longest of
    equals; of everything where no run is whole. A short first run can take longer than a large one after it."""
    runs: dict[int, tuple[int, int]] = {}
    for each in ranges:
        if each.name == RUN:
            start, end = runs.get(each.number, (each.start, each.end))
            runs[each.number] = (min(start, each.start), max(end, each.end))
    if not runs:
        return min(each.start for each in ranges), max(each.end for each in ranges)
    starts = sorted(each.start for each in ranges if each.name != RUN)

    def size(run: tuple[int, int]) -> tuple[int, int]:
        start, end = run
        return bisect_right(starts, end) - bisect_left(starts, start), end - start

    return max(runs.values(), key=size)


class _Calls:
    """Finds the range around a call: on the call's thread, the last that began before it. Stages don't nest."""

    def __init__(self, ranges: Iterable[_Range]) -> None:
        self._ranges: dict[tuple[str, int], list[_Range]] = {}
        for each in ranges:
            self._ranges.setdefault((each.name, each.thread), []).append(each)
        self._starts = {key: [each.start for each in ranges_] for key, ranges_ in self._ranges.items()}

    def chunk_of(self, stage: str, thread: int, called: int) -> int | None:
        starts = self._starts.get((stage, thread))
        index = bisect_right(starts, called) - 1 if starts else -1
        if index < 0:
            return None
        found = self._ranges[stage, thread][index]
        return found.number if called <= found.end else None


def _activities(database: sqlite3.Connection) -> Iterable[tuple[int, str, int, int, int, int, int]]:
    """Kernels and copies between host and device, each with its call: device, stage, start, end, bytes, the call's
    thread and start. Correlation numbers are a process's own: the upper bits of globalTid and globalPid are it."""
    its_call = """JOIN CUPTI_ACTIVITY_KIND_RUNTIME r ON r.correlationId = a.correlationId
        AND (r.globalTid & -16777216) = (a.globalPid & -16777216)"""
    kernels = f"""
        SELECT a.deviceId, 'kernel', a.start, a.end, 0, r.globalTid, r.start
        FROM CUPTI_ACTIVITY_KIND_KERNEL a {its_call}"""
    copies = f"""
        SELECT a.deviceId, a.copyKind, a.start, a.end, a.bytes, r.globalTid, r.start
        FROM CUPTI_ACTIVITY_KIND_MEMCPY a {its_call} WHERE a.copyKind IN (1, 2)"""
    yield from database.execute(kernels)
    for device, kind, *rest in database.execute(copies):
        yield (device, _COPY_STAGES[kind], *rest)


def _gpu_names(database: sqlite3.Connection, there: set[str]) -> dict[int, str]:
    if "TARGET_INFO_GPU" not in there:
        return {}
    return dict(database.execute("SELECT id, name FROM TARGET_INFO_GPU"))
