"""`pipeline profile` and `pipeline view`."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Files, error_line

from pipeline.cli import main
from pipeline.instrument import STAGES


def test_run_trace_is_viewed_again(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    trace = files.folder / "run.json"
    assert main(files.args("--trace", str(trace), "--chunk-rows", "32", devices="sim")) == 0
    capsys.readouterr()
    assert main(["view", str(trace)]) == 0
    text = capsys.readouterr().out
    assert "10 chunks; steady window" in text and "waiting for" in text and "hidden behind" in text
    assert main(["view", str(trace), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    lanes = printed["devices"]["sim"]["lanes"]
    assert set(lanes) == set(STAGES) and all(lane["count"] >= 1 for lane in lanes.values())
    assert printed["origin"] == "event record"


def test_run_whose_trace_fails_prints_its_report_and_then_says_so(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = files.folder / "run.json"
    args = files.args("--trace", str(trace), "--chunk-rows", "1")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, hard))  # enough for the result
    try:
        assert main(args) == 1
        text = capsys.readouterr()
        assert main([*args, "--json", "--overwrite"]) == 1
        printed = capsys.readouterr()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    files.check()
    assert "300 rows in" in text.out and f"wrote {files.out}" in text.out and str(trace) not in text.out
    assert json.loads(printed.out)["stats"]["rows"] == 300
    for err in (text.err, printed.err):
        assert re.fullmatch(rf"pipeline: error: the run is complete, .* '{trace}': File too large; free .*path\n", err)
    assert set(files.contents()) == {files.source, files.weights, files.out}


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_view_whose_trace_fails_prints_its_table_and_then_says_so(
    options: list[str], files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(files.args("--trace", str(files.folder / "run.json"))) == 0
    assert f"wrote {files.folder / 'run.json'}" in capsys.readouterr().out

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    assert main(["view", str(files.folder / "run.json"), "--trace", str(files.folder / "again.json"), *options]) == 1
    captured = capsys.readouterr()
    assert "cpu" in captured.out and "wrote" not in captured.out
    assert "again.json': No space left on device; free space, or choose another path" in captured.err
    assert set(files.contents()) == {files.source, files.weights, files.out, files.folder / "run.json"}


def test_view_refuses_what_is_no_timeline(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(files.source)]) == 1
    assert "isn't a timeline" in error_line(capsys)
    assert main(["view", "none.json"]) == 1
    assert "check the path" in error_line(capsys)


def test_profile_reads_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from helpers.nsys_export import Export

    from pipeline.instrument import Interval

    export = Export(tmp_path / "run.sqlite")
    for chunk in range(4):
        export.range("H2D", 1000 * chunk, 1000 * chunk + 100, chunk)
        export.operation(Interval("H2D", chunk, chunk * 1e-3, chunk * 1e-3 + 9e-4, 1 << 20), 1000 * chunk + 50)
    export.close()
    trace = tmp_path / "run.json"
    assert main(["profile", "--report", str(tmp_path / "run.sqlite"), "--trace", str(trace)]) == 0
    text = capsys.readouterr().out
    assert "cuda:0 (NVIDIA H200): 4 chunks" in text and "read from the Nsight Systems report" in text
    assert json.loads(trace.read_text())["otherData"]["hardware"] == {"cuda:0": "NVIDIA H200"}


def test_profile_wants_the_folder_before_it_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--out", "no/such", "--", "run", "x.npy"]) == 1
    assert "folder of --out 'no/such' isn't a directory; create it first" in error_line(capsys)


@pytest.mark.parametrize("args", [[], ["--report", "x.sqlite", "--", "run"]])
def test_profile_takes_a_command_or_a_report(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *args]) == 1
    assert "give it one of them" in error_line(capsys)


def test_profile_without_nsys_says_what_else_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_NSYS", "/no/nsys")
    assert main(["profile", "--", "run", "x.npy"]) == 1
    assert "--trace run.json" in error_line(capsys)
