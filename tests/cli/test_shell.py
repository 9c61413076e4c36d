"""How a command ends: one line for each error, warning and signal."""

from __future__ import annotations

import os
import warnings

import pytest
from helpers.command_line import Files, error_line, usage_error

from pipeline.cli import main
from pipeline.cli.shell import Terminated, start_for_gpus
from pipeline.errors import CompileError, DeviceNotFoundError


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

    monkeypatch.setattr("pipeline.cli.info.collect", fail)
    assert main(["info"]) == 1
    assert error_line(capsys).startswith(f"pipeline: error: {line}")


@pytest.mark.parametrize("position", [0, 1])
def test_debug_shows_the_traceback(position: int, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    args = files.args(scale="nan")
    args.insert(position, "--debug")
    assert main(args) == 1
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error and "check_scaling_factor" in error
    assert error.splitlines()[-1].startswith("pipeline: error: scaling_factor is nan")


@pytest.mark.parametrize(("raised", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_interrupt_is_one_line(
    raised: type[BaseException], status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise raised

    monkeypatch.setattr("pipeline.cli.info.collect", interrupt)
    assert main(["info"]) == status
    assert error_line(capsys) in ("pipeline: interrupted", "pipeline: terminated")


def test_warning_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr("pipeline.cli.info.collect", lambda: warnings.warn("the cache\ncan't be used", stacklevel=1))
    main(["info", "--json"])
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


@pytest.mark.parametrize(
    ("devices", "before", "after"), [(None, None, "1"), (["cuda:0"], "7", "7"), (["cpu"], None, None)]
)
def test_start_for_gpus_leaves_blas_one_thread_unless_told(
    devices: list[str] | None, before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if before is not None:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", before)
    monkeypatch.setattr("pipeline.cli.shell.start_gpus", lambda names: None if names == ["cpu"] else "a thread")
    start_for_gpus(devices)
    assert os.environ.pop("OPENBLAS_NUM_THREADS", None) == after
