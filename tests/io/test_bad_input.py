"""Bad input: refused by name, before any work, with nothing left behind."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import assert_same_bits
from helpers.ends import IN, LAYER, OUT, X, frozen, open_pipeline
from helpers.leaks import nothing_left_behind

from pipeline import run_pipelined
from pipeline.arrays import HostArray
from pipeline.errors import (
    DTypeError,
    InputError,
    OptionError,
    OutputError,
    OutputExistsError,
    PipelineError,
    ShapeError,
)
from pipeline.kernels.driver import count_gpus


def changing_width() -> Iterator[HostArray]:
    yield X[:20]
    yield X[20:40]
    yield X[:, :4]


def changing_dtype() -> Iterator[HostArray]:
    yield X[:20]
    yield X[20:].astype(np.float64)


SHARED = np.zeros((60, IN), np.float32)


Bad = tuple[Any, Any, dict[str, Any], type[Exception], list[str]]


BAD_SOURCES: dict[str, Bad] = {
    "1-D array": (X[0], None, {}, ShapeError, ["(6,)", f"(rows, {IN})", "reshape"]),
    "3-D array": (X.reshape(5, 10, IN), None, {}, ShapeError, [f"(5, 10, {IN})", f"(rows, {IN})"]),
    "other width": (X[:, :4], None, {}, ShapeError, ["4 features", f"takes {IN}"]),
    "no features": (X[:, :0], None, {}, ShapeError, ["0 features", f"takes {IN}"]),
    "1-D tensor": (torch.zeros(IN), None, {}, ShapeError, ["(6,)", f"(rows, {IN})"]),
    "float64": (X.astype("f8"), None, {}, DTypeError, ["float64", "float32", "astype"]),
    "float64 tensor": (torch.zeros(3, IN, dtype=torch.float64), None, {}, DTypeError, ["float64", "float32"]),
    "bfloat16 tensor": (torch.zeros(3, IN, dtype=torch.bfloat16), None, {}, DTypeError, ["bfloat16", "float32"]),
    "integers": (X.astype(int), None, {}, DTypeError, ["int64", "float32"]),
    "uint16": (X.astype(np.uint16), None, {}, DTypeError, ["uint16", "float32"]),
    "booleans": (X > 0, None, {}, DTypeError, ["bool", "float32"]),
    "complex": (X + 0j, None, {}, DTypeError, ["complex64", "float32"]),
    "objects": (X.astype(object), None, {}, DTypeError, ["object", "float32"]),
    "strings": (X.astype(str), None, {}, DTypeError, ["<U", "float32"]),
    "dates": (np.zeros((3, IN), "M8[s]"), None, {}, DTypeError, ["datetime64", "float32"]),
    "structured": (np.zeros((3, IN), [("a", "f4")]), None, {}, DTypeError, ["float32"]),
    "sparse tensor": (torch.zeros(3, IN).to_sparse(), None, {}, DTypeError, ["sparse", "dense"]),
    "meta tensor": (torch.zeros(3, IN, device="meta"), None, {}, DTypeError, ["meta", "host tensor"]),
    "none": (None, None, {}, InputError, ["NoneType", "NumPy array"]),
    "a number": (5, None, {}, InputError, ["int", "iterable of batches"]),
    "a dict": ({"x": X}, None, {}, InputError, ["dict", "NumPy array"]),
    "a set": ({1}, None, {}, InputError, ["set", "NumPy array"]),
    "bytes": (X.tobytes(), None, {}, InputError, ["bytes", "NumPy array"]),
    "another file type": ("x.csv", None, {}, InputError, ["x.csv", ".npy", "np.save"]),
    "list of numbers": ([1.0, 2.0], None, {}, InputError, ["batch 0", "float", "torch tensor"]),
    "list of rows": (list(X), None, {}, ShapeError, ["batch 0", "(6,)", f"(rows, {IN})"]),
    "list of strings": (["a.npy"], None, {}, InputError, ["batch 0", "str", "torch tensor"]),
    "first batch narrow": (lambda: iter([X[:, :3]]), None, {}, ShapeError, ["batch 0", "3 features", f"takes {IN}"]),
    "first batch float64": (lambda: iter([X.astype("f8")]), None, {}, DTypeError, ["batch 0", "float64", "float32"]),
    "width changes half way": (changing_width, None, {}, ShapeError, ["batch 2", "4 features", f"takes {IN}"]),
    "dtype changes half way": (changing_dtype, None, {}, DTypeError, ["batch 1", "float64", "float32"]),
}


BAD_SINKS: dict[str, Bad] = {
    "fewer rows": (X, np.zeros((49, OUT), "f4"), {}, ShapeError, ["(49, 5)", "(50, 5)"]),
    "more rows": (X, np.zeros((51, OUT), "f4"), {}, ShapeError, ["(51, 5)", "(50, 5)"]),
    "other width": (X, np.zeros((50, IN), "f4"), {}, ShapeError, ["(50, 6)", "(50, 5)"]),
    "1-D": (X, np.zeros(250, "f4"), {}, ShapeError, ["(250,)", "(50, 5)"]),
    "tensor of another shape": (X, torch.zeros(50, 4), {}, ShapeError, ["(50, 4)", "(50, 5)"]),
    "float64": (X, np.zeros((50, OUT)), {}, DTypeError, ["float64", "float32", "out_dtype='float64'"]),
    "integers": (X, np.zeros((50, OUT), int), {}, DTypeError, ["int64", "float32"]),
    "objects": (X, np.zeros((50, OUT), object), {}, DTypeError, ["object", "float32"]),
    "not the out_dtype": (X, np.zeros((50, OUT), "f4"), {"out_dtype": "float16"}, DTypeError, ["float32", "float16"]),
    "read-only": (X, frozen(np.zeros((50, OUT), "f4")), {}, OptionError, ["read-only"]),
    "broadcast": (X, np.lib.stride_tricks.as_strided(np.zeros(9, "f4"), (50, OUT), (0, 4)), {}, OptionError, ["share"]),
    "expanded": (X, torch.zeros(1, OUT).expand(50, OUT), {}, OptionError, ["share"]),
    "the source": (SHARED[:50], SHARED[5:55, :OUT], {}, OptionError, ["overlaps the source"]),
    "the source's tensor": (torch.from_numpy(SHARED)[:50], SHARED[5:55, :OUT], {}, OptionError, ["overlaps"]),
    "an array for batches": ([X], np.zeros((50, OUT), "f4"), {}, OptionError, ["doesn't know its number of rows"]),
    "a list": (X, [], {}, OptionError, ["list", "NumPy array"]),
    "a number": (X, 5, {}, OptionError, ["int", "NumPy array"]),
    "another file type": (X, "y.bin", {}, OptionError, ["y.bin", ".npy"]),
    "no file type": (X, "y", {}, OptionError, ["'y'", ".npy"]),
    "bfloat16 to a file": (X, "{}/y.npy", {"out_dtype": "bfloat16"}, DTypeError, ["bfloat16", "float32"]),
    "existing file": (X, "{}/there.npy", {}, OutputExistsError, ["there.npy exists", "overwrite=True"]),
    "dangling link": (X, "{}/link.npy", {}, OutputExistsError, ["link.npy exists"]),
    "directory": (X, "{}/folder.npy", {"overwrite": True}, OutputError, ["folder.npy is a directory"]),
    "missing parent": (X, "{}/no/y.npy", {}, OutputError, ["no' of out", "isn't a directory", "create it"]),
    "parent is a file": (X, "{}/there.npy/y.npy", {}, OutputError, ["there.npy' of out", "isn't a directory"]),
    "the source file": ("{}/x.npy", "{}/x.npy", {"overwrite": True}, OutputError, ["is the source itself"]),
    "the source file by a link": (
        "{}/x.npy",
        "{}/same.npy",
        {"overwrite": True},
        OutputError,
        ["is the source itself"],
    ),
    "partial file": (X, "{}/killed.npy", {}, OutputExistsError, ["killed.npy.partial exists", "remove it"]),
    "unwritable": (X, "/proc/self/y.npy", {}, OutputError, ["can't write /proc/self/y.npy: no file", "choose"]),
}


BAD_OPTIONS: dict[str, Bad] = {
    f"{name}={value!r}": (X, None, {name: value}, error, [name.removesuffix("s"), *fragments])
    for name, value, error, fragments in [
        *[
            (name, value, OptionError, [repr(value), "'auto'", "at least 1"])
            for name in ("chunk_rows", "num_streams")
            for value in (0, -1, 1.5, "many", True, None, [4])
        ],
        ("out_dtype", "int8", DTypeError, ["int8", "float32"]),
        ("out_dtype", 5, DTypeError, ["5", "float32"]),
        ("devices", "tpu", OptionError, ["tpu", "'cpu'"]),
        ("devices", [], OptionError, ["[]"]),
        ("devices", ["cpu", "cpu"], OptionError, ["different"]),
        ("devices", 3, OptionError, ["3"]),
        ("devices", "cuda:77", PipelineError, ["cuda:77", "isn't there", "devices='cpu'"]),
    ]
}


BAD = {
    **{f"source: {name}": bad for name, bad in BAD_SOURCES.items()},
    **{f"out: {name}": bad for name, bad in BAD_SINKS.items()},
    **{f"option: {name}": bad for name, bad in BAD_OPTIONS.items()},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Some files that are in the way."""
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "same.npy").hardlink_to(tmp_path / "x.npy")
    (tmp_path / "there.npy").write_bytes(b"precious")
    (tmp_path / "link.npy").symlink_to(tmp_path / "nowhere.npy")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "killed.npy.partial").write_bytes(b"left")
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name_and_nothing_is_left_behind(name: str, folder: Path) -> None:
    source, out, options, error, fragments = BAD[name]
    source = source() if callable(source) else source
    source, out = (value.format(folder) if isinstance(value, str) else value for value in (source, out))
    before = {path: path.stat(follow_symlinks=False) for path in folder.iterdir()}
    count_gpus()  # once started, CUDA's driver keeps its file descriptors
    with nothing_left_behind():
        with pytest.raises(error) as caught:
            run_pipelined(LAYER, source, out, **{"devices": "cpu", "chunk_rows": 16, **options})
        assert isinstance(caught.value, PipelineError)
        for fragment in fragments:
            assert fragment in str(caught.value)
        del caught
    assert {path: path.stat(follow_symlinks=False).st_mtime_ns for path in folder.iterdir()} == {
        path: status.st_mtime_ns for path, status in before.items()
    }
    if not isinstance(out, str) and out is not None and hasattr(out, "shape") and out is not SHARED:
        assert not np.asarray(out).any(), "the output was touched"


def test_bad_input_leaves_a_pipeline_ready_for_the_next_run(folder: Path) -> None:
    with nothing_left_behind(), open_pipeline() as pipeline:
        expected = pipeline.run(X).out
        for name, (source, out, options, error, _) in {**BAD_SOURCES, **BAD_SINKS}.items():
            if "out_dtype" in options:
                continue
            source = source() if callable(source) else source
            source, out = (value.format(folder) if isinstance(value, str) else value for value in (source, out))
            with pytest.raises(error):
                pipeline.run(source, out, **options)
                pytest.fail(f"{name} was accepted")
            assert_same_bits(pipeline.run(X).out, expected)


def test_source_of_file_object_or_memory_is_refused() -> None:
    with pytest.raises(InputError):
        run_pipelined(LAYER, io.BytesIO(b"\x93NUMPY\x01\x00"), devices="cpu")
