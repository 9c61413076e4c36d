"""`pipeline` in tests: a folder of files to run on, in this process or in one of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline import FusedLinear
from pipeline.cli import main

IN, OUT = 24, 16


def run_command(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m pipeline` in a process of its own."""
    command = [sys.executable, "-m", "pipeline", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, **options)


class Files:
    """A folder with a dataset, weights, and the arguments of `pipeline run` for them."""

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

    def contents(self) -> dict[Path, bytes | None]:
        """Everything in the folder: what each file holds, None for a folder."""
        return {path: path.read_bytes() if path.is_file() else None for path in self.folder.rglob("*")}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error; nothing may be on standard output."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("pipeline: "), captured.err
    return lines[0]


def usage_error(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert caught.value.code == 2
    return error_line(capsys)
