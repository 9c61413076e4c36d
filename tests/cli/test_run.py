"""`pipeline run`: what it does, prints, and passes on."""

from __future__ import annotations

import json
import re
import time
from io import StringIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.command_line import OUT, Files, run_command

from pipeline import FusedLinear, run_pipelined
from pipeline.cli import main, parse
from pipeline.cli.run import _progress_bar
from pipeline.dtypes import FLOAT16
from pipeline.options import OPTIONS, Progress


def test_run_writes_the_result_and_prints_the_report(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files.args("--chunk-rows", "128")) == 0
    files.check()
    captured = capsys.readouterr()
    assert captured.err == ""
    for expected in ("300 rows in", "rows/s", "3 of up to 128 rows", "bound by", f"wrote {files.out}"):
        assert expected in captured.out


def test_run_json_prints_one_object(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files.args("--json", "--num-streams", "2")) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert (captured.err, printed["out"]) == ("", str(files.out))
    assert (printed["stats"]["rows"], printed["stats"]["num_streams"]) == (300, 2)
    assert set(printed["stats"]["stages"]) == {"fill", "H2D", "kernel", "D2H", "drain"}


def test_run_passes_every_option_on(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(layer: FusedLinear, source: str, out: str, **options: Any) -> Any:
        seen.update(options, layer=layer, source=source, out=out)
        return run_pipelined(layer, source, out, devices="cpu", overwrite=True)

    monkeypatch.setattr("pipeline.api.run_pipelined", run)
    options = ["--chunk-rows", "64", "--num-streams", "3", "--out-dtype", "float16", "--wire-dtype", "fp16"]
    options += ["--overwrite", "--trace", str(files.folder / "run.json"), "--no-progress"]
    assert main(files.args(*options, devices="cuda:0, cuda:1")) == 0
    assert seen.pop("layer").scaling_factor == 2.0
    assert (seen.pop("source"), seen.pop("out")) == (str(files.source), str(files.out))
    expected: dict[str, Any] = {"chunk_rows": 64, "num_streams": 3, "devices": ("cuda:0", "cuda:1"), "progress": None}
    expected |= {
        "wire_dtype": FLOAT16,
        "out_dtype": FLOAT16,
        "overwrite": True,
        "trace": str(files.folder / "run.json"),
    }
    assert seen == expected and set(seen) == set(OPTIONS)


def test_run_passes_the_precision_to_the_layer(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[FusedLinear] = []

    def run(layer: FusedLinear, *rest: Any, **options: Any) -> Any:
        seen.append(layer)
        return run_pipelined(layer, *rest, **options)

    monkeypatch.setattr("pipeline.api.run_pipelined", run)
    assert main(files.args("--precision", "tf32")) == 0
    assert [layer.precision for layer in seen] == ["tf32"]


def test_run_defaults_are_those_of_the_keywords(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(["run", "x.npy", "--weights", "l.safetensors", "--out", "y.npy"])
    assert (args.chunk_rows, args.num_streams, args.devices, args.out_dtype) == ("auto", "auto", None, None)
    assert (args.scaling_factor, args.precision, args.overwrite) == (1.0, None, False)


def test_run_scale_has_its_keyword_name_too() -> None:
    given = parse(["run", "x", "--weights", "w", "--out", "y", "--scaling-factor", "-0.5"])
    assert given.scaling_factor == -0.5


def test_run_rounds_on_the_wire_and_keeps_the_datasets_type(files: Files) -> None:
    assert main(files.args("--wire-dtype", "fp16")) == 0
    rounded = np.load(files.out)
    assert rounded.dtype == np.float32 and np.array_equal(rounded, rounded.astype(np.float16).astype(np.float32))


def test_run_rounds_to_out_dtype(files: Files) -> None:
    assert main(files.args("--out-dtype", "fp16")) == 0
    got = np.load(files.out)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, files.layer.reference(files.x), rtol=2e-3, atol=2e-3)


def test_run_overwrites_when_told(files: Files) -> None:
    files.out.write_bytes(b"old")
    assert main(files.args("--overwrite")) == 0
    files.check()


@pytest.mark.parametrize("rows", [300, 0])
def test_run_takes_fortran_order_and_foreign_byte_order(files: Files, rows: int) -> None:
    x = np.asfortranarray(files.x[:rows].astype(">f4"))
    np.save(files.source, x)
    assert main(files.args()) == 0
    files.check(x=x)


def test_run_of_an_empty_dataset_gives_an_empty_file(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(files.source, files.x[:0])
    assert main(files.args("--json")) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["rows"] == 0
    assert np.load(files.out).shape == (0, OUT)


def test_run_says_what_its_process_took(files: Files) -> None:
    start_s = time.perf_counter()
    text = run_command(*files.args()).stdout
    taken_s = time.perf_counter() - start_s
    found = re.search(r"the process took ([\d.]+) s so far: ([\d.]+) s for this run, ([\d.]+) s before and after", text)
    assert found is not None, text
    process_s, run_s, rest_s = map(float, found.groups())
    assert 0 < run_s < process_s < taken_s + 0.1 and run_s + rest_s == pytest.approx(process_s, abs=0.011)
    printed = json.loads(run_command(*files.args("--json", "--overwrite")).stdout)
    assert printed["stats"]["seconds"] < printed["process_seconds"] < taken_s + 10


@pytest.mark.parametrize("told", ["", "7 (a name) with ) in it) R 1 2", "7 (a) " + " ".join(["0"] * 50)])
def test_run_says_nothing_of_a_process_that_the_system_does_not_time(
    told: str, files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cli.run.Path", lambda path: SimpleNamespace(read_text=lambda: told))
    assert main(files.args()) == 0
    assert "the process took" not in capsys.readouterr().out
    assert main(files.args("--json", "--overwrite")) == 0
    assert json.loads(capsys.readouterr().out)["process_seconds"] is None


@pytest.mark.parametrize(("ceiling", "said"), [(200.0, "50% of ceiling"), (50.0, " out"), (None, " out")])
def test_progress_shows_no_share_of_a_ceiling_that_the_run_beats(
    ceiling: float | None, said: str, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    with _progress_bar(files.layer, 4, True) as show:
        assert show is not None
        show(Progress(100, 200, 1.0, ceiling))
    assert said in terminal.getvalue() and ("ceiling" in terminal.getvalue()) == ("ceiling" in said)
