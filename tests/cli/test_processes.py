"""The command line in processes of its own: streams, terminals, signals."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import IN, OUT, Files, run_command

import pipeline


def test_process_help_is_quick_and_imports_no_torch() -> None:
    code = "import sys; from pipeline.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print({name.split('.')[0] for name in sys.modules} & {'torch', 'cuda', 'rich', 'safetensors'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "run | profile | view | plan | info | demo" in done.stdout


def test_process_version() -> None:
    done = run_command("--version")
    assert (done.returncode, done.stdout) == (0, f"pipeline {pipeline.__version__}\n")


def test_process_run_prints_pure_json_and_no_bar_in_a_log(files: Files) -> None:
    done = run_command(*files.args("--json", "--chunk-rows", "16"))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["stats"]["chunks"] == 19
    files.check()


def test_process_error_status(files: Files) -> None:
    files.out.write_bytes(b"precious")
    done = run_command(*files.args())
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


def test_process_draws_a_bar_on_a_terminal(files: Files) -> None:
    out, shown = on_terminal(files.args("--chunk-rows", "16"))
    for expected in ("100%", "rows/s, ", "GB/s in, ", " out", "left"):
        assert expected in shown
    assert "300 rows in" in out and "\x1b" not in out


def test_process_draws_no_bar_when_told(files: Files) -> None:
    out, shown = on_terminal(files.args("--no-progress"))
    assert shown == "" and "300 rows in" in out


def has_rows(partial: Path) -> bool:
    """Whether the first of its rows has been written: space that is only reserved reads as zeros."""
    return partial.exists() and any(partial.read_bytes()[128 : 128 + OUT * 4])


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_process_stopped_half_way_keeps_no_file(sent: signal.Signals, status: int, files: Files) -> None:
    np.save(files.source, np.zeros((400_000, IN), np.float32))
    command = [sys.executable, "-m", "pipeline", *files.args("--chunk-rows", "1")]  # minutes of work
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        partial = Path(f"{files.out}.partial")
        deadline = time.monotonic() + 60
        try:
            while not has_rows(partial) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(sent)
            out, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out) == (status, "")
    assert error == ("pipeline: interrupted\n" if sent == signal.SIGINT else "pipeline: terminated\n")
    assert not files.out.exists() and not partial.exists()


@pytest.mark.parametrize("command", ["run", "demo"])
def test_process_starts_gpus_before_it_imports_numpy(command: str) -> None:
    """Their contexts are made meanwhile."""
    words = ["run", "x.npy", "--weights", "l.st", "--out", "y.npy"] if command == "run" else ["demo"]
    code = "import sys; from pipeline.cli import main, demo, shell\n"
    code += "def stop(names):\n    print(names, 'numpy' in sys.modules)\n    sys.exit()\n"
    code += f"shell.start_gpus = demo.start_gpus = stop\nmain({[*words, '--devices', 'cuda:3']!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "['cuda:3'] False\n", done.stderr


def test_run_with_standard_output_closed_succeeds(tmp_path: Path) -> None:
    files = Files(tmp_path)
    command = [sys.executable, "-m", "pipeline", *files.args()]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=90, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "") and files.out.exists()
