"""The command line: what it prints and where, its exit status, and one line with a remedy for each bad input."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import pipeline
from pipeline import FusedLinear
from pipeline.cli import commands as cli
from pipeline.errors import CompileError, DeviceNotFoundError
from pipeline.instrument import STAGES

IN, OUT = 24, 16


def run_command(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m pipeline` in a process of its own."""
    command = [sys.executable, "-m", "pipeline", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, **options)


class Job:
    """A folder with a dataset, weights, and the arguments of `pipeline run` that belong to them."""

    def __init__(self, folder: Path) -> None:
        random = np.random.default_rng()
        self.folder, self.source, self.weights = folder, folder / "x.npy", folder / "layer.safetensors"
        self.out = folder / "y.npy"
        self.x = random.standard_normal((300, IN), np.float32)
        np.save(self.source, self.x)
        weight, bias = random.standard_normal((OUT, IN), np.float32), random.standard_normal(OUT, np.float32)
        save_file({"gemm.weight": weight, "gemm.bias": bias}, self.weights)
        self.layer = FusedLinear(weight, bias, 2.0)

    def args(self, *more: str, **replaced: Any) -> list[str]:
        values = {"source": self.source, "weights": self.weights, "scale": 2.0, "out": self.out, "devices": "cpu"}
        values |= replaced
        options = [text for name, value in values.items() if name != "source" for text in (f"--{name}", str(value))]
        return ["run", str(values["source"]), *options, *more]

    def check(self, out: Path | None = None, x: np.ndarray[Any, Any] | None = None) -> None:
        expected = self.layer.reference(self.x if x is None else x)
        np.testing.assert_allclose(np.load(out or self.out), expected, rtol=1e-5, atol=1e-5)

    def files(self) -> dict[Path, bytes | None]:
        """Everything in the folder: what each file holds, None for a folder."""
        return {path: path.read_bytes() if path.is_file() else None for path in self.folder.rglob("*")}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error; nothing may be on standard output."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("pipeline: "), captured.err
    return lines[0]


def usage_error(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(args))
    assert caught.value.code == 2
    return error_line(capsys)


# -- run -------------------------------------------------------------------------------------------------------------


def test_run_writes_the_result_and_prints_the_report(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(job.args("--chunk-rows", "128")) == 0
    job.check()
    captured = capsys.readouterr()
    assert captured.err == ""
    for expected in ("300 rows in", "rows/s", "3 of up to 128 rows", "bound by", f"wrote {job.out}"):
        assert expected in captured.out


def test_run_json_prints_one_object(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(job.args("--json", "--num-streams", "2")) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert (captured.err, printed["out"]) == ("", str(job.out))
    assert (printed["stats"]["rows"], printed["stats"]["num_streams"]) == (300, 2)
    assert set(printed["stats"]["stages"]) == {"fill", "H2D", "kernel", "D2H", "drain"}


def test_run_passes_every_option_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run_pipelined(layer: FusedLinear, source: str, out: str, **options: Any) -> Any:
        seen.update(options, layer=layer, source=source, out=out)
        return original(layer, source, out, devices="cpu", overwrite=True)

    original = pipeline.api.run_pipelined
    monkeypatch.setattr("pipeline.api.run_pipelined", run_pipelined)
    options = ["--precision", "tf32", "--chunk-rows", "64", "--num-streams", "3", "--out-dtype", "float16"]
    options += ["--wire-dtype", "fp16"]
    assert cli.main(job.args(*options, "--overwrite", "--no-progress", devices="cuda:0, cuda:1")) == 0
    layer = seen.pop("layer")
    assert (layer.precision, layer.scaling_factor) == ("tf32", 2.0)
    assert str(seen.pop("out_dtype")) == "float16" and seen.pop("wire_dtype") == "fp16"
    assert seen == {
        "source": str(job.source),
        "out": str(job.out),
        "chunk_rows": 64,
        "num_streams": 3,
        "devices": ["cuda:0", "cuda:1"],
        "overwrite": True,
        "progress": None,
        "trace": None,
    }


def test_run_defaults_are_those_of_the_keywords(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    args = cli._parser().parse_args(["run", "x.npy", "--weights", "l.safetensors", "--out", "y.npy"])
    assert (args.chunk_rows, args.num_streams, args.devices, args.out_dtype) == ("auto", "auto", None, None)
    assert (args.scaling_factor, args.precision, args.overwrite) == (1.0, None, False)


def test_run_scale_has_its_keyword_name_too() -> None:
    parse = cli._parser().parse_args
    given = parse(["run", "x", "--weights", "w", "--out", "y", "--scaling-factor", "-0.5"])
    assert given.scaling_factor == -0.5


def test_run_rounds_on_the_wire_and_keeps_the_datasets_type(job: Job) -> None:
    assert cli.main(job.args("--wire-dtype", "fp16")) == 0
    rounded = np.load(job.out)
    assert rounded.dtype == np.float32 and np.array_equal(rounded, rounded.astype(np.float16).astype(np.float32))


def test_run_rounds_to_out_dtype(job: Job) -> None:
    assert cli.main(job.args("--out-dtype", "fp16")) == 0
    got = np.load(job.out)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, job.layer.reference(job.x), rtol=2e-3, atol=2e-3)


def test_run_overwrites_when_told(job: Job) -> None:
    job.out.write_bytes(b"old")
    assert cli.main(job.args("--overwrite")) == 0
    job.check()


@pytest.mark.parametrize("rows", [300, 0])
def test_run_takes_fortran_order_and_foreign_byte_order(job: Job, rows: int) -> None:
    x = np.asfortranarray(job.x[:rows].astype(">f4"))
    np.save(job.source, x)
    assert cli.main(job.args()) == 0
    job.check(x=x)


def test_run_of_an_empty_dataset_gives_an_empty_file(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(job.source, job.x[:0])
    assert cli.main(job.args("--json")) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["rows"] == 0
    assert np.load(job.out).shape == (0, OUT)


# -- bad input: one line with a remedy, status 1, no file made or changed --------------------------------------------


def truncated(job: Job) -> list[str]:
    job.source.write_bytes(job.source.read_bytes()[:-100])
    return job.args()


def no_array_inside(job: Job) -> list[str]:
    job.source.write_bytes(job.weights.read_bytes())
    return job.args()


def saved(array: Callable[[Job], Any]) -> Callable[[Job], list[str]]:
    def prepare(job: Job) -> list[str]:
        np.save(job.source, array(job))
        return job.args()

    return prepare


def existing_output(job: Job) -> list[str]:
    job.out.write_bytes(b"precious")
    return job.args()


def leftover_partial(job: Job) -> list[str]:
    Path(f"{job.out}.partial").write_bytes(b"another run's")
    return job.args()


def source_as_output(job: Job) -> list[str]:
    return job.args("--overwrite", out=job.source)


def linked_source_as_output(job: Job) -> list[str]:
    job.out.symlink_to(job.source)
    return job.args("--overwrite")


def folder_as_output(job: Job) -> list[str]:
    job.out.mkdir()
    return job.args("--overwrite")


def unwritable_folder(job: Job) -> list[str]:
    if os.geteuid() == 0:  # who may write anywhere but here
        return job.args(out="/proc/y.npy")
    job.folder.joinpath("locked").mkdir(mode=0o500)
    return job.args(out=job.folder / "locked" / "y.npy")


def weights_of(tensors: dict[str, Any]) -> Callable[[Job], list[str]]:
    def prepare(job: Job) -> list[str]:
        save_file(tensors, job.weights)
        return job.args()

    return prepare


BAD: dict[str, tuple[Callable[[Job], list[str]], str]] = {
    "truncated file": (truncated, r"x\.npy is truncated: \d+ bytes, its header promises \d+"),
    "no array inside": (no_array_inside, r"x\.npy isn't a readable .npy file: .*; write it with np.save"),
    "not called .npy": (
        lambda job: job.args(source="x.csv"),
        "doesn't end in .npy, the only .*; save the array with np.save",
    ),
    "source inside a file": (lambda job: job.args(source=job.source / "x.npy"), "Not a directory; check the path"),
    "no name": (lambda job: job.args(source=""), "source '' doesn't end in .npy"),
    "missing source": (lambda job: job.args(source="nowhere.npy"), "nowhere.npy: No such file or directory; check the"),
    "object array": (saved(lambda job: np.array([[None] * IN])), "holds Python objects, expected .*; convert"),
    "wrong features": (saved(lambda job: job.x[:, :-1]), f"has {IN - 1} features a row .* weight takes {IN}"),
    "wrong rank": (saved(lambda job: job.x[0]), r"np.save\('new.npy', np.load\('.*x.npy'\).reshape\(-1, 24\)\)$"),
    "wrong dtype": (
        saved(lambda job: job.x.astype(np.float64)),
        "x.npy is float64, .* are float32: convert the file, .*as",
    ),
    "integers": (saved(lambda job: job.x.astype(np.int32)), "is int32, .*; convert the file, .*'new.npy'.*astype"),
    "NaN scale": (lambda job: job.args(scale="nan"), "scaling_factor is nan, expected a finite number"),
    "infinite scale": (lambda job: job.args(scale="inf"), "scaling_factor is inf, expected a finite number"),
    "missing weights": (
        lambda job: job.args(weights="nowhere.safetensors"),
        "nowhere.safetensors: No such file or directory; check",
    ),
    "damaged weights": (lambda job: job.args(weights=job.source), "isn't a readable .safetensors file"),
    "no weight inside": (weights_of({"a": np.zeros(3, np.float32)}), "expected exactly one called 'weight' or"),
    "2-D bias": (
        weights_of({"weight": np.zeros((OUT, IN), np.float32), "bias": np.zeros((3, OUT), np.float32)}),
        "no residual tensor is passed",
    ),
    "weights of another type": (
        weights_of({"weight": np.zeros((OUT, IN), np.int32)}),
        r"convert it .*\(in .*layer.saf",
    ),
    "transposed weights": (
        weights_of({"weight": np.zeros((IN, OUT), np.float32), "bias": np.zeros(OUT, np.float32)}),
        r"weight has shape \(24, 16\); transpose weight",
    ),
    "zero features": (weights_of({"weight": np.zeros((OUT, 0), np.float32)}), "at least 1 feature"),
    "long name": (lambda job: job.args(out=job.folder / f"{'a' * 300}.npy"), "File name too long; use a shorter name"),
    "existing output": (existing_output, r"y\.npy exists; pass --overwrite to replace it, or choose another path"),
    "leftover partial file": (leftover_partial, "y.npy.partial exists: .*; remove it if none is"),
    "output not .npy": (lambda job: job.args(out=job.folder / "y.bin"), "doesn't end in .npy"),
    "output is a folder": (folder_as_output, "y.npy is a directory, expected the path of a file"),
    "no output folder": (
        lambda job: job.args(out=job.folder / "no" / "y.npy"),
        "no' of out .* isn't a directory; create it",
    ),
    "unwritable folder": (unwritable_folder, r"can't write .*y\.npy: no file .*\(.*\); choose a path that"),
    "source as output": (source_as_output, "is the source itself; choose another output path"),
    "link to source as output": (linked_source_as_output, "is the source itself; choose another output path"),
    "absent GPU": (lambda job: job.args(devices="cuda:64"), "device 'cuda:64' isn't there; .* --devices cpu"),
    "unknown device": (lambda job: job.args(devices="tpu"), "device 'tpu' isn't known, expected 'cpu', 'cuda'"),
    "no device": (lambda job: job.args(devices=""), "device '' isn't known, expected"),
    "device twice": (lambda job: job.args(devices="cpu,cpu"), "expected one or several different device names"),
    "unknown precision": (lambda job: job.args("--precision", "fp8"), "precision is 'fp8', expected one of"),
    "unknown out_dtype": (lambda job: job.args("--out-dtype", "int8"), "out_dtype is int8, expected one of"),
    "unknown wire_dtype": (
        lambda job: job.args("--wire-dtype", "int8"),
        "wire_dtype is 'int8', expected 'bf16' or 'fp16'",
    ),
    "precision with wire_dtype": (
        lambda job: job.args("--wire-dtype", "bf16", "--precision", "tf32"),
        "precision is 'tf32' and wire_dtype bfloat16, .* leave precision out",
    ),
    "wire_dtype for these rows": (lambda job: job.args("--wire-dtype", "fp64"), "expected 'bf16' or 'fp16'"),
    "bfloat16 file": (lambda job: job.args("--out-dtype", "bf16"), "pass --out-dtype float32 or --out-dtype float16"),
}


@pytest.mark.parametrize("name", BAD)
def test_run_refuses(name: str, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, message = BAD[name]
    args = prepare(job)
    before, threads = job.files(), threading.active_count()
    assert cli.main(args) == 1
    line = error_line(capsys)
    assert re.search(message, line), line
    assert "=True" not in line and "--debug" not in line and "='" not in line  # options in a shell's words
    assert job.files() == before
    assert threading.active_count() == threads


def test_run_after_an_error_works(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    good = job.source.read_bytes()
    assert cli.main(truncated(job)) == 1
    job.source.write_bytes(good)
    assert cli.main(job.args()) == 0
    job.check()


def test_run_folds_notes_into_the_line(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "y.npy")

    monkeypatch.setattr("pipeline.io.files.FileRows.plain", None)  # C would write them
    monkeypatch.setattr("pipeline.io.files.FileRows.write", fail)
    before = job.files()
    assert cli.main(job.args("--chunk-rows", "100")) == 1
    line = error_line(capsys)
    assert re.search(r"y.npy: No space left on device; free space.* \(in drain of chunk 0 \(rows 0 to 99\)\)$", line)
    assert job.files() == before


# -- errors of other kinds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError("Unable to allocate 9 TiB"), "out of memory: Unable to allocate 9 TiB; use smaller --chunk-rows"),
        (PermissionError(13, "Permission denied", "x.npy"), "x.npy: Permission denied; check the permissions"),
        (OSError("odd"), "odd; --debug shows where it happened"),
        (KeyError("rows"), "unexpected KeyError: 'rows'; --debug shows where, please report it"),
        (CompileError("NVRTC can't compile", "a\nlog", ("-v",)), "NVRTC can't compile; --debug shows the compiler's"),
        (DeviceNotFoundError("none. Use devices='cpu' or\nwait"), "none. Use --devices cpu or wait"),
    ],
)
def test_error_becomes_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "_collect_info", fail)
    assert cli.main(["info"]) == 1
    assert error_line(capsys).startswith(f"pipeline: error: {line}")


@pytest.mark.parametrize("position", [0, 1])
def test_debug_shows_the_traceback(position: int, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    args = job.args(scale="nan")
    args.insert(position, "--debug")
    assert cli.main(args) == 1
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error and "check_scaling_factor" in error
    assert error.splitlines()[-1].startswith("pipeline: error: scaling_factor is nan")


@pytest.mark.parametrize(("raised", "status"), [(KeyboardInterrupt, 130), (cli._Terminated, 143)])
def test_interrupt_is_one_line(
    raised: type[BaseException], status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise raised

    monkeypatch.setattr(cli, "_collect_info", interrupt)
    assert cli.main(["info"]) == status
    assert error_line(capsys) in ("pipeline: interrupted", "pipeline: terminated")


def test_warning_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    monkeypatch.setattr(cli, "_collect_info", lambda: warnings.warn("the cache\ncan't be used", stacklevel=1))
    cli.main(["info", "--json"])
    assert capsys.readouterr().err == "pipeline: warning: the cache can't be used\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required"),
        (["fly"], "invalid choice: 'fly'"),
        (["run", "x.npy", "--out", "y.npy"], "required: --weights"),
        (["run", "x.npy", "--weights", "w", "--out", "y", "--over"], "unrecognized arguments: --over"),
        (["run", "x.npy", "--weights", "w", "--out", "y", "--chunk-rows", "0"], "expected 'auto' or a whole number"),
        (["run", "x.npy", "--weights", "w", "--out", "y", "--num-streams", "few"], "got 'few', expected 'auto' or"),
        (["run", "x.npy", "--weights", "w", "--out", "y", "--scale", "two"], "invalid float value: 'two'"),
        (["run", "x.npy", "--weights", "w", "--out", "y", "--bogus"], "--bogus; 'pipeline run --help' lists"),
        (["profile", "--delay", "-3"], "got '-3', expected a number of seconds of at least 0"),
        (["demo", "--rows", "-3"], "got '-3', expected a whole number of at least 1"),
    ],
)
def test_usage_error_is_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = usage_error(capsys, *args)
    assert message in line and line.endswith("--help' lists the options")


# -- info and demo ---------------------------------------------------------------------------------------------------


def test_info_describes_the_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIPELINE_CACHE_DIR", str(tmp_path))
    entry = tmp_path / "kernels" / "entries" / "ab" / "cdef"
    entry.parent.mkdir(parents=True)
    entry.write_bytes(bytes(1000))
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["pipeline"] == pipeline.__version__
    assert info["cache"] == {"path": str(tmp_path), "kernels": 1, "bytes": 1000}
    assert set(info["host"]) == {"copy_workers", "piece_bytes", "ring_pieces", "origin", "measured"}
    assert "cpu" in info["devices"]
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"cache: {tmp_path}, 1 kernels" in text and "copy workers, 4 pinned pieces of 8 MiB" in text


class FakeLauncher:
    """What `pipeline info` reads of a GPU."""

    name, arch, multiprocessors = "NVIDIA Test", "sm_90a", 132

    @classmethod
    def for_device(cls, ordinal: int) -> FakeLauncher:
        if ordinal == 1:
            raise DeviceNotFoundError("an old GPU; use devices='cpu'")
        return cls()


def test_info_names_the_kernel_of_each_precision(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.devices.cuda.count_gpus", lambda: 2)
    monkeypatch.setattr("pipeline.kernels.launch.Launcher", FakeLauncher)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda ordinal: (2**30, 2**32))
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "cuda:0: NVIDIA Test; sm_90a, 132 multiprocessors; 1.0 of 4.0 GiB free" in text
    for data in ("float32 fp32", "float32 ieee", "float32 tf32", "bfloat16", "float16"):
        assert re.search(rf"^  {data} +fused_linear_(sm90|split_sm90|simt)<", text, re.MULTILINE), text
    assert "cuda:1: an old GPU; use --devices cpu" in text
    assert "no NVIDIA GPU" not in text


def test_info_survives_a_broken_driver(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise DeviceNotFoundError("cuInit failed: CUDA_ERROR_UNKNOWN")

    monkeypatch.setattr("pipeline.devices.cuda.count_gpus", broken)
    assert cli.main(["info"]) == 0
    assert "cuda: cuInit failed: CUDA_ERROR_UNKNOWN" in capsys.readouterr().out


def test_demo_checks_and_compares(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    small = ["--rows", "200", "--in-features", "48", "--out-features", "32", "--devices", "cpu"]
    assert cli.main(["demo", *small]) == 0
    text = capsys.readouterr().out
    for expected in ("200 random rows", "check: right; 6", "plain torch loop on cpu", "times as long", "bound by"):
        assert expected in text
    assert cli.main(["demo", *small, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["check"]["passed"] and printed["check"]["rows"] >= 62
    assert printed["stats"]["rows"] == 200 and printed["stats"]["chunks"] == 2
    assert printed["torch_loop"]["ratio"] > 0
    assert list(tmp_path.iterdir()) == []


def test_demo_that_does_not_fit_on_the_disk_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--rows", "99999999999", "--devices", "cpu"]) == 1
    assert re.search(
        r"need [\d,.]+ GiB in /.*, [\d,.]+ GiB are free; use fewer --rows, or set TMPDIR", error_line(capsys)
    )


@pytest.mark.parametrize("rows", ["1", "63"])
def test_demo_takes_few_rows(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--rows", rows, "--in-features", "5", "--out-features", "3", "--devices", "cpu"]) == 0


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
    assert cli.main(["demo", "--rows", "200", "--in-features", "48", "--devices", "cpu", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["check"]["passed"] is False and "NaN" not in captured.out
    assert captured.err.startswith("pipeline: error: the demo's result differs") and captured.err.count("\n") == 1


# -- profile, view, plan ---------------------------------------------------------------------------------------------


def test_run_trace_is_viewed_again(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    trace = job.folder / "run.json"
    assert cli.main(job.args("--trace", str(trace), "--chunk-rows", "32", devices="sim")) == 0
    capsys.readouterr()
    assert cli.main(["view", str(trace)]) == 0
    text = capsys.readouterr().out
    assert "10 chunks; steady window" in text and "waiting for" in text and "hidden behind" in text
    assert cli.main(["view", str(trace), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    lanes = printed["devices"]["sim"]["lanes"]
    assert set(lanes) == set(STAGES) and all(lane["count"] >= 1 for lane in lanes.values())
    assert printed["origin"] == "event record"


def test_run_whose_trace_fails_prints_its_report_and_then_says_so(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    trace = job.folder / "run.json"
    args = job.args("--trace", str(trace), "--chunk-rows", "1")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, hard))  # enough for the result
    try:
        assert cli.main(args) == 1
        text = capsys.readouterr()
        assert cli.main([*args, "--json", "--overwrite"]) == 1
        printed = capsys.readouterr()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    job.check()
    assert "300 rows in" in text.out and f"wrote {job.out}" in text.out and str(trace) not in text.out
    assert json.loads(printed.out)["stats"]["rows"] == 300
    for err in (text.err, printed.err):
        assert re.fullmatch(rf"pipeline: error: the run is complete, .* '{trace}': File too large; free .*path\n", err)
    assert set(job.files()) == {job.source, job.weights, job.out}


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_view_whose_trace_fails_prints_its_table_and_then_says_so(
    options: list[str], job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(job.args("--trace", str(job.folder / "run.json"))) == 0
    assert f"wrote {job.folder / 'run.json'}" in capsys.readouterr().out

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    assert cli.main(["view", str(job.folder / "run.json"), "--trace", str(job.folder / "again.json"), *options]) == 1
    captured = capsys.readouterr()
    assert "cpu" in captured.out and "wrote" not in captured.out
    assert "again.json': No space left on device; free space, or choose another path" in captured.err
    assert set(job.files()) == {job.source, job.weights, job.out, job.folder / "run.json"}


def test_view_refuses_what_is_no_timeline(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["view", str(job.source)]) == 1
    assert "isn't a timeline" in error_line(capsys)
    assert cli.main(["view", "none.json"]) == 1
    assert "check the path" in error_line(capsys)


def test_profile_reads_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nsys_export import Export

    from pipeline.instrument import Interval

    export = Export(tmp_path / "run.sqlite")
    for chunk in range(4):
        export.range("H2D", 1000 * chunk, 1000 * chunk + 100, chunk)
        export.operation(Interval("H2D", chunk, chunk * 1e-3, chunk * 1e-3 + 9e-4, 1 << 20), 1000 * chunk + 50)
    export.close()
    trace = tmp_path / "run.json"
    assert cli.main(["profile", "--report", str(tmp_path / "run.sqlite"), "--trace", str(trace)]) == 0
    text = capsys.readouterr().out
    assert "cuda:0 (NVIDIA H200): 4 chunks" in text and "read from the Nsight Systems report" in text
    assert json.loads(trace.read_text())["otherData"]["hardware"] == {"cuda:0": "NVIDIA H200"}


def test_profile_wants_the_folder_before_it_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "--out", "no/such", "--", "run", "x.npy"]) == 1
    assert "folder of --out 'no/such' isn't a directory; create it first" in error_line(capsys)


@pytest.mark.parametrize("args", [[], ["--report", "x.sqlite", "--", "run"]])
def test_profile_takes_a_command_or_a_report(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", *args]) == 1
    assert "give it one of them" in error_line(capsys)


def test_profile_without_nsys_says_what_else_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_NSYS", "/no/nsys")
    assert cli.main(["profile", "--", "run", "x.npy"]) == 1
    assert "--trace run.json" in error_line(capsys)


def test_plan_prints_a_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "--rows", "1000000", "--in", "8192", "--out", "8192", "--precision", "tf32"]
    assert cli.main([*args, "--wire-dtype", "bf16"]) == 1
    assert "leave precision out" in error_line(capsys), "as a run says"
    assert cli.main([*args, "--source", "pinned", "--to", "pinned"]) == 0
    text = capsys.readouterr().out
    for expected in ("rows/s", "bound by", "H2D", "GiB on each GPU", "hardware: 1 x NVIDIA H200"):
        assert expected in text
    assert cli.main([*args, "--json", "--gpus", "1000", "--hosts", "125"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows_per_s"] > 0 and printed["limits"]["kernel"] > 0
    assert cli.main([*args, "--gpu", "abacus"]) == 1
    assert "expected one of h200" in error_line(capsys)


def test_plan_takes_the_options_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "--rows", "1000000", "--in", "8192", "--out", "8192", "--json"]
    for options in ([], ["--wire-dtype", "bf16"], ["--out-dtype", "bf16"], ["--to", "fresh"], ["--chunk-rows", "256"]):
        assert cli.main([*args, *options]) == 0
    plain, narrow, half, fresh, small = map(json.loads, capsys.readouterr().out.splitlines())
    assert narrow["limits"]["H2D"] == pytest.approx(2 * plain["limits"]["H2D"])
    assert narrow["limits"]["kernel"] > 2 * plain["limits"]["kernel"]  # it runs as bfloat16
    assert half["gb_per_s_out"] == pytest.approx(half["gb_per_s_in"] / 2)
    assert fresh["bound"] == "drain" and fresh["rows_per_s"] < 0.6 * plain["rows_per_s"]
    assert (plain["chunk_rows"], small["chunk_rows"]) == (1024, 256)


@pytest.mark.parametrize("option", ["--storage-gb-per-s", "--network-gb-per-s"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "fast"])
def test_plan_rates_that_can_not_be_are_usage_errors(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--rows", "10", "--in", "8", "--out", "8", f"{option}={value}"])
    assert ended.value.code == 2
    assert f"argument {option}: got '{value}', expected GB/s, a number above 0" in error_line(capsys)


@pytest.mark.parametrize("option", ["--chunk-rows", "--in"])
def test_plan_of_something_huge_says_that_it_does_not_fit(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--rows", "1000", "--in", "8192", "--out", "8192", option, "999999999999"]) == 0
    text = capsys.readouterr().out
    assert "it would not run: weights and 6 chunks" in text and "a GPU has 139.7" in text


# -- real processes --------------------------------------------------------------------------------------------------


def test_process_help_is_quick_and_imports_no_torch() -> None:
    code = "import sys; from pipeline.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print({name.split('.')[0] for name in sys.modules} & {'torch', 'cuda', 'rich', 'safetensors'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "run | profile | view | plan | info | demo" in done.stdout


def test_process_version() -> None:
    done = run_command("--version")
    assert (done.returncode, done.stdout) == (0, f"pipeline {pipeline.__version__}\n")


def test_process_run_prints_pure_json_and_no_bar_in_a_log(job: Job) -> None:
    done = run_command(*job.args("--json", "--chunk-rows", "16"))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["stats"]["chunks"] == 19
    job.check()


def test_process_error_status(job: Job) -> None:
    done = run_command(*existing_output(job))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("pipeline: error: ") and done.stderr.count("\n") == 1
    assert run_command("run").returncode == 2


def test_process_ends_quietly_when_its_reader_has_gone() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "pipeline", "info"], stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def on_terminal(args: list[str]) -> tuple[str, str]:
    """Standard output, and what standard error shows on a terminal of 80 columns."""
    terminal, stderr = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-m", "pipeline", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment) as process:
        os.close(stderr)
        shown = b""
        while True:
            try:
                block = os.read(terminal, 65536)
            except OSError:  # Linux: every writer has closed its end
                break
            if not block:
                break
            shown += block
        os.close(terminal)
        assert process.stdout is not None
        return process.stdout.read(), shown.decode()


def test_process_draws_a_bar_on_a_terminal(job: Job) -> None:
    out, shown = on_terminal(job.args("--chunk-rows", "16"))
    for expected in ("100%", "rows/s, ", "GB/s in, ", " out", "left"):
        assert expected in shown
    assert "300 rows in" in out and "\x1b" not in out


def test_process_draws_no_bar_when_told(job: Job) -> None:
    out, shown = on_terminal(job.args("--no-progress"))
    assert shown == "" and "300 rows in" in out


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_process_stopped_half_way_keeps_no_file(sent: signal.Signals, status: int, job: Job) -> None:
    np.save(job.source, np.zeros((400_000, IN), np.float32))
    command = [sys.executable, "-m", "pipeline", *job.args("--chunk-rows", "1")]  # minutes of work
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        partial = Path(f"{job.out}.partial")
        deadline = time.monotonic() + 60
        while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(sent)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, "")
    assert error == ("pipeline: interrupted\n" if sent == signal.SIGINT else "pipeline: terminated\n")
    assert not job.out.exists() and not partial.exists()
