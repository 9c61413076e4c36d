"""Bad input for `pipeline run`: one line with a remedy, status 1, no file made or changed."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command_line import IN, OUT, Files, error_line
from safetensors.numpy import save_file

from pipeline.cli import main


def truncated(files: Files) -> list[str]:
    files.source.write_bytes(files.source.read_bytes()[:-100])
    return files.args()


def no_array_inside(files: Files) -> list[str]:
    files.source.write_bytes(files.weights.read_bytes())
    return files.args()


def saved(array: Callable[[Files], Any]) -> Callable[[Files], list[str]]:
    def prepare(files: Files) -> list[str]:
        np.save(files.source, array(files))
        return files.args()

    return prepare


def existing_output(files: Files) -> list[str]:
    files.out.write_bytes(b"precious")
    return files.args()


def leftover_partial(files: Files) -> list[str]:
    Path(f"{files.out}.partial").write_bytes(b"another run's")
    return files.args()


def source_as_output(files: Files) -> list[str]:
    return files.args("--overwrite", out=files.source)


def linked_source_as_output(files: Files) -> list[str]:
    files.out.symlink_to(files.source)
    return files.args("--overwrite")


def folder_as_output(files: Files) -> list[str]:
    files.out.mkdir()
    return files.args("--overwrite")


def unwritable_folder(files: Files) -> list[str]:
    if os.geteuid() == 0:  # who may write anywhere but here
        return files.args(out="/proc/y.npy")
    files.folder.joinpath("locked").mkdir(mode=0o500)
    return files.args(out=files.folder / "locked" / "y.npy")


def weights_of(tensors: dict[str, Any]) -> Callable[[Files], list[str]]:
    def prepare(files: Files) -> list[str]:
        save_file(tensors, files.weights)
        return files.args()

    return prepare


BAD: dict[str, tuple[Callable[[Files], list[str]], str]] = {
    "truncated file": (truncated, r"x\.npy is truncated: \d+ bytes, its header promises \d+"),
    "no array inside": (no_array_inside, r"x\.npy isn't a readable .npy file: .*; write it with np.save"),
    "not called .npy": (
        lambda files: files.args(source="x.csv"),
        "doesn't end in .npy, the only .*; save the array with np.save",
    ),
    "source inside a file": (
        lambda files: files.args(source=files.source / "x.npy"),
        "Not a directory; check the path",
    ),
    "no name": (lambda files: files.args(source=""), "source '' doesn't end in .npy"),
    "missing source": (
        lambda files: files.args(source="nowhere.npy"),
        "nowhere.npy: No such file or directory; check the",
    ),
    "object array": (saved(lambda files: np.array([[None] * IN])), "holds Python objects, expected .*; convert"),
    "wrong features": (saved(lambda files: files.x[:, :-1]), f"has {IN - 1} features a row .* weight takes {IN}"),
    "wrong rank": (saved(lambda files: files.x[0]), r"np.save\('new.npy', np.load\('.*x.npy'\).reshape\(-1, 24\)\)$"),
    "wrong dtype": (
        saved(lambda files: files.x.astype(np.float64)),
        "x.npy is float64, .* are float32: convert the file, .*as",
    ),
    "integers": (saved(lambda files: files.x.astype(np.int32)), "is int32, .*; convert the file, .*'new.npy'.*astype"),
    "NaN scale": (lambda files: files.args(scale="nan"), "scaling_factor is nan, expected a finite number"),
    "infinite scale": (lambda files: files.args(scale="inf"), "scaling_factor is inf, expected a finite number"),
    "missing weights": (
        lambda files: files.args(weights="nowhere.safetensors"),
        "nowhere.safetensors: No such file or directory; check",
    ),
    "damaged weights": (lambda files: files.args(weights=files.source), "isn't a readable .safetensors file"),
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
    "long name": (
        lambda files: files.args(out=files.folder / f"{'a' * 300}.npy"),
        "File name too long; use a shorter name",
    ),
    "existing output": (existing_output, r"y\.npy exists; pass --overwrite to replace it, or choose another path"),
    "leftover partial file": (leftover_partial, "y.npy.partial exists: .*; remove it if none is"),
    "output not .npy": (lambda files: files.args(out=files.folder / "y.bin"), "doesn't end in .npy"),
    "output is a folder": (folder_as_output, "y.npy is a directory, expected the path of a file"),
    "no output folder": (
        lambda files: files.args(out=files.folder / "no" / "y.npy"),
        "no' of out .* isn't a directory; create it",
    ),
    "unwritable folder": (unwritable_folder, r"can't write .*y\.npy: no file .*\(.*\); choose a path that"),
    "source as output": (source_as_output, "is the source itself; choose another output path"),
    "link to source as output": (linked_source_as_output, "is the source itself; choose another output path"),
    "absent GPU": (lambda files: files.args(devices="cuda:64"), "device 'cuda:64' isn't there; .* --devices cpu"),
    "unknown device": (lambda files: files.args(devices="tpu"), "device 'tpu' isn't known, expected 'cpu', 'cuda'"),
    "no device": (lambda files: files.args(devices=""), "device '' isn't known, expected"),
    "device twice": (lambda files: files.args(devices="cpu,cpu"), "expected one or several different device names"),
    "unknown precision": (lambda files: files.args("--precision", "fp8"), "precision is 'fp8', expected one of"),
    "unknown out_dtype": (lambda files: files.args("--out-dtype", "int8"), "out_dtype is int8, expected one of"),
    "unknown wire_dtype": (
        lambda files: files.args("--wire-dtype", "int8"),
        "wire_dtype is 'int8', expected 'bf16' or 'fp16'",
    ),
    "precision with wire_dtype": (
        lambda files: files.args("--wire-dtype", "bf16", "--precision", "tf32"),
        "precision is 'tf32' and wire_dtype bfloat16, .* leave precision out",
    ),
    "wire_dtype for these rows": (lambda files: files.args("--wire-dtype", "fp64"), "expected 'bf16' or 'fp16'"),
    "bfloat16 file": (
        lambda files: files.args("--out-dtype", "bf16"),
        "pass --out-dtype float32 or --out-dtype float16",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_run_refuses(name: str, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, message = BAD[name]
    args = prepare(files)
    before, threads = files.contents(), threading.active_count()
    assert main(args) == 1
    line = error_line(capsys)
    assert re.search(message, line), line
    assert "=True" not in line and "--debug" not in line and "='" not in line  # options in a shell's words
    assert files.contents() == before
    assert threading.active_count() == threads


def test_run_after_an_error_works(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    good = files.source.read_bytes()
    assert main(truncated(files)) == 1
    files.source.write_bytes(good)
    assert main(files.args()) == 0
    files.check()


def test_run_folds_notes_into_the_line(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "y.npy")

    monkeypatch.setattr("pipeline.io.files.FileRows.plain", None)  # C would write them
    monkeypatch.setattr("pipeline.io.files.FileRows.write", fail)
    before = files.contents()
    assert main(files.args("--chunk-rows", "100")) == 1
    line = error_line(capsys)
    assert re.search(r"y.npy: No space left on device; free space.* \(in drain of chunk 0 \(rows 0 to 99\)\)$", line)
    assert files.contents() == before
