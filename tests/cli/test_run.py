"""`pipeline run`: what it does, prints, and passes on."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from helpers.command_line import OUT, Files

from pipeline import FusedLinear, run_pipelined
from pipeline.cli import main, parse
from pipeline.dtypes import FLOAT16
from pipeline.options import OPTIONS


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
