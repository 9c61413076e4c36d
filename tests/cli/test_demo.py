"""`pipeline demo`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command_line import error_line

from pipeline.cli import main


def test_demo_checks_and_compares(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    small = ["--rows", "200", "--in-features", "48", "--out-features", "32", "--devices", "cpu"]
    assert main(["demo", *small]) == 0
    text = capsys.readouterr().out
    for expected in ("200 random rows", "check: right; 6", "plain torch loop on cpu", "times as long", "bound by"):
        assert expected in text
    assert main(["demo", *small, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["check"]["passed"] and printed["check"]["rows"] >= 62
    assert printed["stats"]["rows"] == 200 and printed["stats"]["chunks"] == 2
    assert printed["torch_loop"]["ratio"] > 0
    assert list(tmp_path.iterdir()) == []


def test_demo_that_does_not_fit_on_the_disk_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--rows", "99999999999", "--devices", "cpu"]) == 1
    assert re.search(
        r"need [\d,.]+ GiB in /.*, [\d,.]+ GiB are free; use fewer --rows, or set TMPDIR", error_line(capsys)
    )


@pytest.mark.parametrize("rows", ["1", "63"])
def test_demo_takes_few_rows(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--rows", rows, "--in-features", "5", "--out-features", "3", "--devices", "cpu"]) == 0


@pytest.mark.parametrize("wrong", [0.01, np.nan])
def test_demo_fails_when_one_chunk_is_wrong(
    wrong: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.io.files import FileRows

    def write(self: FileRows, first: int, piece: Any) -> Any:
        return original(self, first, piece + np.float32(wrong) if self._row == 100 else piece)

    original = FileRows.write
    monkeypatch.setattr(FileRows, "plain", None)  # C would write them
    monkeypatch.setattr(FileRows, "write", write)
    assert main(["demo", "--rows", "200", "--in-features", "48", "--devices", "cpu", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["check"]["passed"] is False and "NaN" not in captured.out
    assert captured.err.startswith("pipeline: error: the demo's result differs") and captured.err.count("\n") == 1
