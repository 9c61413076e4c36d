"""Nsight Systems: reading an export of its report, and what is said where nsys or its libraries are missing."""

from __future__ import annotations

import os
import sqlite3
import sys
from pathlib import Path

import pytest
from helpers.nsys_export import PROCESS, Export

from pipeline.errors import DeviceError, FileFormatError, OptionError
from pipeline.instrument import RUN, Interval
from pipeline.report import nsys
from pipeline.report.timeline import device_use

US = 1000
START = 25_000_000  # of the large run, in ns


def made_up_report(path: Path, *, kind: int = 59, devices: int = 1, named: bool = True) -> dict[str, list[Interval]]:
    """A small run that takes longer than the large one of 8 chunks a device; what the large one's timeline must be."""
    export = Export(path, named=named)
    export.range(RUN, 1_000_000, 24_000_000, 0)
    export.range("H2D", 1_000_100, 1_000_200, 0)
    export.operation(Interval("H2D", 0, 1.1e-3, 1.2e-3, 64), 1_000_150)
    expected: dict[str, list[Interval]] = {f"cuda:{d}": [] for d in range(devices)}
    for device in range(devices):
        export.range(RUN, START + device, START + 8_000_000, 1, thread=1 + device)
    for chunk in range(8 * devices):
        device, at = chunk % devices, START + (100 + 400 * chunk) * US
        thread = 1 + device
        plan = [("fill", 0, 90), ("H2D", 100, 190), ("kernel", 200, 260), ("D2H", 270, 360), ("drain", 370, 399)]
        for stage, begin, end in plan:
            n_bytes = 1 << 20 if stage in ("H2D", "D2H") else 0
            interval = Interval(stage, chunk, (at + begin * US) / 1e9, (at + end * US) / 1e9, n_bytes)
            if stage in ("fill", "drain"):
                export.range(stage, at + begin * US, at + end * US, chunk, thread=50 + chunk % 3, kind=kind)
            else:  # queued well before it runs, by a call inside its range
                export.range(stage, at - 20 * US + begin, at - 15 * US + begin, chunk, thread=thread)
                export.operation(interval, at - 18 * US + begin, device=device, stream=13 + chunk % 6, thread=thread)
            shifted = interval._replace(start_s=interval.start_s - START / 1e9, end_s=interval.end_s - START / 1e9)
            expected[f"cuda:{device}"].append(shifted)
    export.close()
    return expected


@pytest.mark.parametrize("kind", [59, 60])
@pytest.mark.parametrize("devices", [1, 2])
def test_report_gives_every_operation_its_stage_and_chunk(kind: int, devices: int, tmp_path: Path) -> None:
    path = tmp_path / "report.sqlite"
    expected = made_up_report(path, kind=kind, devices=devices)
    timeline = nsys.read_report(path)
    assert timeline.hardware == dict.fromkeys(expected, "NVIDIA H200")
    assert (timeline.origin, timeline.unassigned) == ("Nsight Systems report", 0)
    for device, operations in expected.items():
        got = sorted(timeline.devices[device], key=lambda i: i.start_s)
        for a, b in zip(got, sorted(operations, key=lambda i: i.start_s), strict=True):
            assert (a.stage, a.chunk, a.bytes) == (b.stage, b.chunk, b.bytes)
            assert a[2:4] == pytest.approx(b[2:4], abs=1e-9)
    use = device_use(timeline.devices["cuda:0"])
    assert use.lanes["kernel"].count >= 6 and use.kernel_hidden_share == pytest.approx(0, abs=1e-9)


def test_report_of_a_late_recording_needs_no_domain_event(tmp_path: Path) -> None:
    made_up_report(tmp_path / "named.sqlite")
    made_up_report(tmp_path / "late.sqlite", named=False)
    assert nsys.read_report(tmp_path / "late.sqlite") == nsys.read_report(tmp_path / "named.sqlite")


def test_report_leaves_out_what_is_not_the_pipelines(tmp_path: Path) -> None:
    path = tmp_path / "report.sqlite"
    export = Export(path)
    export.range(RUN, 0, 10_000_000, 3)
    export.range("H2D", 1000, 2000, 7)
    export.operation(Interval("H2D", 7, 1e-3, 2e-3, 8), 1500)
    export.operation(Interval("H2D", 7, 3e-3, 4e-3, 8), 2500)  # a call after the range
    export.operation(Interval("kernel", 7, 3e-3, 4e-3, 0), 1500)  # a kernel in a range of copies
    export.operation(Interval("H2D", 7, 3e-3, 4e-3, 8), 1500, thread=2)  # another thread
    export.operation(Interval("H2D", 7, 3e-3, 4e-3, 8), 1500, process=PROCESS + (1 << 24))  # another process
    export.operation(Interval("D2D", 7, 3e-3, 4e-3, 8), 1500)
    export.range("H2D", 5000, 6000, 9, domain=2)  # another domain
    export.operation(Interval("H2D", 9, 5e-3, 6e-3, 8), 5500)
    export.close()
    timeline = nsys.read_report(path)
    assert timeline.devices == {"cuda:0": [Interval("H2D", 7, 1e-3, 2e-3, 8)]}
    assert timeline.unassigned == 5


def test_report_joins_the_launches_of_a_chunk(tmp_path: Path) -> None:
    path = tmp_path / "report.sqlite"
    export = Export(path)
    export.range(RUN, 0, 10_000_000, 3)
    for chunk, called in ((0, 1000), (1, 3000)):
        export.range("kernel", called, called + 900, chunk)
        for number, (start_s, end_s) in enumerate(((1e-3, 1.1e-3), (1.2e-3, 2e-3), (2.1e-3, 2.2e-3))):
            later_s = 0.5e-3 * chunk  # chunks overlap
            export.operation(Interval("kernel", chunk, start_s + later_s, end_s + later_s, 0), called + 100 * number)
    export.close()
    kernels = nsys.read_report(path).devices["cuda:0"]
    assert [i.chunk for i in kernels] == [0, 1]
    assert [i[2:4] for i in kernels] == [pytest.approx((1e-3, 2.2e-3)), pytest.approx((1.5e-3, 2.7e-3))]


def test_report_of_a_cpu_run_has_its_host_lanes(tmp_path: Path) -> None:
    path = tmp_path / "report.sqlite"
    export = Export(path)
    export.range("fill", 1000, 2000, 0)
    for table in ("CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_MEMCPY", "CUPTI_ACTIVITY_KIND_RUNTIME"):
        export.drop(table)
    export.close()
    assert [i.stage for i in nsys.read_report(path).devices["cuda:0"]] == ["fill"]


def test_report_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="SQLite export"):
        nsys.read_report(tmp_path / "none.sqlite")
    (tmp_path / "text.sqlite").write_text("no database, some text that is long enough for a header")
    with pytest.raises(FileFormatError, match="nsys export -t sqlite"):
        nsys.read_report(tmp_path / "text.sqlite")
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(FileFormatError, match="NVTX_EVENTS"):
        nsys.read_report(tmp_path / "empty.sqlite")
    export = Export(tmp_path / "other.sqlite")
    export.close()
    with pytest.raises(FileFormatError, match="was a pipeline run recorded"):
        nsys.read_report(tmp_path / "other.sqlite")


# -- recording ---------------------------------------------------------------------------------------------------------

FAKE_NSYS = """#!{python}
import shutil, subprocess, sys
arguments = sys.argv[1:]
out = arguments[arguments.index("-o") + 1]
if arguments[0] == "profile":
    command = arguments[arguments.index(out) + 1:]
    options = []
    while command[0].startswith("--"):
        options, command = options + command[:2], command[2:]
    open(out + ".options", "w").write(" ".join(options))
    open(out + {suffix!r}, "w").close()
    sys.exit(subprocess.run(command).returncode)
shutil.copy({report!r}, out)
"""


def fake_nsys(folder: Path, suffix: str) -> Path:
    """A program that does to files what nsys does, with a made-up report. With .qdstrm it needs the importer, too."""
    made_up_report(folder / "made-up.sqlite")
    program = folder / "bin" / "nsys"
    program.parent.mkdir()
    program.write_text(FAKE_NSYS.format(python=sys.executable, suffix=suffix, report=str(folder / "made-up.sqlite")))
    program.chmod(0o755)
    return program


def test_record_runs_the_command_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_NSYS", str(fake_nsys(tmp_path, ".nsys-rep")))
    mark = tmp_path / "mark"
    command = [sys.executable, "-c", f"open({str(mark)!r}, 'w')"]
    report = nsys.record(command, tmp_path / "run", delay_s=0.5, duration_s=2.0)
    assert mark.exists() and report == tmp_path / "run.sqlite"
    assert (tmp_path / "run.options").read_text() == "--delay 0.5 --duration 2.0 --kill none"
    assert set(nsys.read_report(report).devices) == {"cuda:0"}


def test_record_starts_the_importer_where_nsys_can_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_NSYS", str(fake_nsys(tmp_path, ".qdstrm")))
    importer = tmp_path / "host" / "QdstrmImporter"
    importer.parent.mkdir()
    importer.write_text('#!/bin/sh\ntouch "$4"\n')
    importer.chmod(0o755)
    report = nsys.record([sys.executable, "-c", ""], tmp_path / "run")
    assert report.exists() and (tmp_path / "run.nsys-rep").exists() and not (tmp_path / "run.qdstrm").exists()


def test_record_says_which_libraries_the_importer_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fake_nsys(tmp_path, ".qdstrm")
    monkeypatch.setenv("PIPELINE_NSYS", str(program))
    importer = tmp_path / "host" / "QdstrmImporter"
    importer.parent.mkdir()
    importer.write_text("")
    ldd = program.with_name("ldd")
    ldd.write_text('#!/bin/sh\necho "libdw.so.1 => not found"\n')
    ldd.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ldd.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PIPELINE_NSYS_DEBS", str(tmp_path / "no-debs"))
    with pytest.raises(OptionError, match=r"libdw\.so\.1.*libdw1, libelf1"):
        nsys.record([sys.executable, "-c", ""], tmp_path / "run")


def test_record_of_a_failing_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_NSYS", str(fake_nsys(tmp_path, ".nsys-rep")))
    with pytest.raises(DeviceError, match="ended with status 3; what was recorded"):
        nsys.record([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "run")


def test_find_nsys_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPELINE_NSYS", raising=False)
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr(nsys, "_NESTED", "/no/such/*/nsys")
    with pytest.raises(OptionError, match=r"on PATH nor in /no/such.*--trace run\.json"):
        nsys.find_nsys()
    monkeypatch.setenv("PIPELINE_NSYS", "/no/nsys")
    with pytest.raises(OptionError, match="at /no/nsys"):
        nsys.find_nsys()
