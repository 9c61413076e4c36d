"""Raw binary files: their element type and shape come from the caller."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.data import assert_same_bits, random_layer, random_rows
from helpers.ends import IN, LAYER, OUT, X, as_tensor
from helpers.leaks import nothing_left_behind

from pipeline import RawFile, run_pipelined
from pipeline.arrays import HostArray
from pipeline.errors import (
    DTypeError,
    FileFormatError,
    InputError,
    OptionError,
    OutputError,
    OutputExistsError,
    ShapeError,
)
from pipeline.testing import check_sink, check_source


def rows_of(file: RawFile) -> HostArray:
    dtype = ml_dtypes.bfloat16 if file.dtype == "bfloat16" else file.dtype
    return np.fromfile(file.path, dtype).reshape(file.shape)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "float16", "bfloat16", ">f8"])
def test_raw_source_is_what_its_author_was_promised(dtype: str, tmp_path: Path) -> None:
    x = random_rows(30, 3, "bfloat16" if dtype == "bfloat16" else np.dtype(dtype).name)
    (x if dtype == "bfloat16" else x.astype(dtype)).tofile(tmp_path / "x.bin")
    check_source(lambda: RawFile(tmp_path / "x.bin", dtype, (30, 3)), x)


@pytest.mark.parametrize("dtype", [None, "<f4", ">f4"])
def test_raw_sink_is_what_its_author_was_promised(dtype: Any, tmp_path: Path) -> None:
    number = itertools.count()
    check_sink(lambda rows: RawFile(tmp_path / f"{next(number)}.bin", dtype), rows_of, folder=tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_raw_sink_of_other_types(dtype: str, tmp_path: Path) -> None:
    number = itertools.count()
    check_sink(lambda rows: RawFile(tmp_path / f"{next(number)}.bin"), rows_of, dtype=dtype, folder=tmp_path)


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("dtype", ["float32", ">f4", np.float32, torch.float32])
def test_raw_file_to_raw_file_gives_the_bits_of_arrays(dtype: Any, device: str, tmp_path: Path) -> None:
    X.astype(">f4" if dtype == ">f4" else "<f4").tofile(tmp_path / "x.bin")
    with nothing_left_behind(tmp_path):
        source = RawFile(tmp_path / "x.bin", dtype, X.shape)
        result = run_pipelined(LAYER, source, RawFile(str(tmp_path / "y.f32")), devices=device, chunk_rows=7)
    assert result.stats.source == "raw file"
    assert result.out == RawFile(str(tmp_path / "y.f32"), "float32", (50, OUT))
    assert_same_bits(rows_of(result.out), LAYER(X))
    again = run_pipelined(random_layer(OUT, 3), result.out, devices=device)  # a result is a source
    assert again.stats.rows == 50


def test_raw_file_takes_bfloat16_which_npy_cannot(tmp_path: Path) -> None:
    layer, x = random_layer(IN, OUT, "bfloat16"), random_rows(50, IN, "bfloat16")
    out = run_pipelined(layer, as_tensor(x), RawFile(tmp_path / "y.bin"), devices="cpu").out
    assert_same_bits(rows_of(out), layer(x))


def test_raw_sink_told_its_type_and_shape(tmp_path: Path) -> None:
    out = RawFile(tmp_path / "y.bin", np.dtype(">f4"), (50, OUT))
    assert run_pipelined(LAYER, X, out, devices="cpu").out == out
    assert_same_bits(rows_of(out).astype("<f4"), LAYER(X))


def test_raw_sink_of_a_source_of_unknown_length(tmp_path: Path) -> None:
    out = run_pipelined(LAYER, iter([X[:20], X[20:]]), RawFile(tmp_path / "y.bin"), devices="cpu").out
    assert out.shape == (50, OUT)
    assert_same_bits(rows_of(out), LAYER(X))


def raw(path: str = "{}/x.bin", dtype: Any = "float32", shape: Any = X.shape) -> RawFile:
    return RawFile(path, dtype, shape)


BAD: dict[str, tuple[Any, Any, type[Exception], list[str]]] = {
    "a bare path": ("{}/x.bin", None, InputError, ["raw binary", "pipeline.RawFile(", "dtype, (rows, features)"]),
    "no type": (raw(dtype=None), None, InputError, ["no dtype or no shape"]),
    "no shape": (raw(shape=None), None, InputError, ["no dtype or no shape"]),
    "one row more": (raw(shape=(51, IN)), None, FileFormatError, ["truncated: 1200 bytes", "(51, 6)", "1224"]),
    "one row fewer": (raw(shape=(49, IN)), None, FileFormatError, ["followed by other data", "1176"]),
    "another type": (raw(dtype="float64", shape=(25, IN)), None, DTypeError, ["x.bin is float64", "float32"]),
    "no such type": (raw(dtype="int32"), None, DTypeError, ["int32", "float32", "elements in the file"]),
    "other width": (raw(shape=(60, 5)), None, ShapeError, ["x.bin has 5 features", f"takes {IN}"]),
    "3-D": (raw(shape=(5, 10, IN)), None, ShapeError, ["(5, 10, 6)", "RawFile(path, dtype, (rows, 6))"]),
    "minus rows": (raw(shape=(-50, IN)), None, InputError, ["(-50, 6)", "whole numbers"]),
    "no numbers": (raw(shape="ab"), None, InputError, ["'ab'", "whole numbers"]),
    "a number": (raw(shape=50), None, InputError, ["50", "whole numbers"]),
    "a folder": (raw("{}"), None, InputError, ["isn't a regular file"]),
    "a missing file": (raw("{}/no.bin"), None, FileNotFoundError, ["no.bin"]),
    "out: a bare path": (X, "{}/y.bin", OptionError, ["doesn't end in .npy", "pipeline.RawFile("]),
    "out: another type": (X, raw("{}/y.bin", "float16", None), DTypeError, ["out is float16", "float32"]),
    "out: another shape": (X, raw("{}/y.bin", None, (50, 4)), ShapeError, ["(50, 4)", "(50, 5)"]),
    "out: another width, rows unknown": ([X], raw("{}/y.bin", None, (50, 4)), ShapeError, ["(50, 4)", "(50, 5)"]),
    "out: 1-D, rows unknown": ([X], raw("{}/y.bin", None, (50,)), ShapeError, ["(50,)", "(50, 5)"]),
    "out: existing": (X, raw("{}/there.bin", None, None), OutputExistsError, ["there.bin exists", "overwrite"]),
    "out: the source": (raw("{}/x.bin"), raw("{}/x.bin", None, None), OutputError, ["x.bin exists"]),
}


@pytest.mark.parametrize("name", BAD)
def test_raw_file_refuses_by_name_and_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    X.tofile(tmp_path / "x.bin")
    (tmp_path / "there.bin").write_bytes(b"precious")

    def placed(value: Any) -> Any:
        if isinstance(value, RawFile):
            return RawFile(os.fspath(value.path).format(tmp_path), value.dtype, value.shape)
        return value.format(tmp_path) if isinstance(value, str) else value

    source, out, error, fragments = BAD[name]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with nothing_left_behind(tmp_path):
        with pytest.raises(error) as caught:
            run_pipelined(LAYER, placed(source), placed(out), devices="cpu")
        for fragment in fragments:
            assert fragment in str(caught.value)
        del caught
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_raw_file_never_replaces_its_source(tmp_path: Path) -> None:
    X.tofile(tmp_path / "x.bin")
    source = RawFile(tmp_path / "x.bin", "float32", X.shape)
    with pytest.raises(OutputError, match="is the source itself"):
        run_pipelined(LAYER, source, RawFile(tmp_path / "x.bin"), devices="cpu", overwrite=True)
    assert (tmp_path / "x.bin").read_bytes() == X.tobytes()


@pytest.mark.parametrize("path", [5, None, b"x.bin"])
def test_raw_file_refuses_what_is_no_path(path: Any) -> None:
    with pytest.raises(InputError, match="expected the path of a file"):
        RawFile(path, "float32", (3, 4))
