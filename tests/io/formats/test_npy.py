"""Files in NumPy's format: what NumPy writes is read, what is written NumPy reads, and bad ones are refused."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits, random_rows
from helpers.ends import IN, LAYER, OUT, X
from helpers.leaks import nothing_left_behind
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import run_pipelined
from pipeline.dtypes import FLOAT32
from pipeline.errors import DTypeError, FileFormatError, InputError, OutputError, ShapeError
from pipeline.io.formats.npy import open_source as open_npy
from pipeline.io.registry import SourceRequest


def npy(header: bytes, data: bytes = b"", version: tuple[int, int] = (1, 0), length: int | None = None) -> bytes:
    """A .npy file with this header text."""
    size = len(header) if length is None else length
    return b"\x93NUMPY" + bytes(version) + size.to_bytes(2 if version == (1, 0) else 4, "little") + header + data


def header(descr: str = "'<f4'", order: str = "False", shape: str = f"(50, {IN})", more: str = "") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, {more}}}".encode()


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_npy_source_reads_what_numpy_writes(version: Any, order: Any, byte_order: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, np.asarray(X, byte_order + "f4", order=order), version)
    for source in (path, str(path)):
        result = run_pipelined(LAYER, source, devices="cpu", chunk_rows=7)
        assert_same_bits(result.out, LAYER(X))
    assert ".npy" in result.stats.source


@pytest.mark.parametrize("rows", [0, 1])
def test_npy_source_of_few_rows(rows: int, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X[:rows])
    result = run_pipelined(LAYER, tmp_path / "x.npy", tmp_path / "y.npy", devices="cpu")
    assert np.load(result.out).shape == (rows, OUT)


NPY_BYTES = npy(header(), X.tobytes())


BAD_NPY: dict[str, tuple[bytes, type[Exception], list[str]]] = {
    "empty": (b"", FileFormatError, ["isn't a readable .npy file"]),
    "text": (b"1,2,3\n" * 100, FileFormatError, ["isn't a readable .npy file", "np.save"]),
    "a zip": (b"PK\x03\x04" + bytes(200), FileFormatError, ["isn't a readable .npy file"]),
    "cut in the magic": (NPY_BYTES[:4], FileFormatError, ["isn't a readable .npy file"]),
    "cut in the header": (NPY_BYTES[:30], FileFormatError, ["isn't a readable .npy file"]),
    "truncated": (NPY_BYTES[:-1], FileFormatError, ["truncated", str(len(NPY_BYTES) - 1), str(len(NPY_BYTES))]),
    "no data": (npy(header()), FileFormatError, ["truncated", f"(50, {IN})"]),
    "trailing bytes": (NPY_BYTES + b"x", FileFormatError, ["followed by other data"]),
    "version 3": (npy(header(), X.tobytes(), (3, 0)), FileFormatError, ["version (3, 0)"]),
    "version 9": (npy(header(), X.tobytes(), (9, 0)), FileFormatError, ["isn't a readable .npy file"]),
    "huge header": (npy(header(), X.tobytes(), (2, 0), 2**32 - 1), FileFormatError, ["isn't a readable .npy file"]),
    "long header": (npy(header().ljust(20_000), X.tobytes(), (2, 0)), FileFormatError, ["isn't a readable .npy file"]),
    "not a dict": (npy(b"[1, 2]"), FileFormatError, ["isn't a readable .npy file"]),
    "code": (npy(b"__import__('os').abort()"), FileFormatError, ["isn't a readable .npy file"]),
    "open string": (npy(b"{'descr': '''"), FileFormatError, ["isn't a readable .npy file"]),
    "deeply nested": (npy(b"(" * 5000), FileFormatError, ["isn't a readable .npy file"]),
    "minus signs": (npy(b"-" * 9000 + b"1"), FileFormatError, ["isn't a readable .npy file"]),
    "keys of two types": (npy(b"{1: 2, 'a': 3}"), FileFormatError, ["isn't a readable .npy file"]),
    "not UTF-8": (npy(b"{'descr': '\xff\xfe'}"), FileFormatError, ["isn't a readable .npy file"]),
    "one more key": (npy(header(more="'x': 1")), FileFormatError, ["isn't a readable .npy file"]),
    "no such type": (npy(header("'<q99'")), FileFormatError, ["isn't a readable .npy file"]),
    "objects": (npy(header("'|O'"), b"\x80\x04N."), FileFormatError, ["Python objects", "floating-point"]),
    "objects in fields": (npy(header("[('a', '|O')]")), FileFormatError, ["Python objects"]),
    "integers": (npy(header("'<i4'"), X.tobytes()), DTypeError, ["int32", "float32", "x.npy"]),
    "complex": (npy(header("'<c8'")), DTypeError, ["complex64"]),
    "fields": (npy(header("[('a', '<f4')]")), DTypeError, ["element type of", "x.npy"]),
    "another float": (npy(header("'<f8'"), bytes(50 * IN * 8)), DTypeError, ["float64", "float32"]),
    "1-D": (npy(header(shape="(300,)"), X.tobytes()), ShapeError, ["(300,)", f"(rows, {IN})"]),
    "0-D": (npy(header(shape="()"), X.tobytes()[:4]), ShapeError, ["()", f"(rows, {IN})"]),
    "3-D": (npy(header(shape=f"(5, 10, {IN})"), X.tobytes()), ShapeError, [f"(5, 10, {IN})", f"(rows, {IN})"]),
    "other width": (npy(header(shape="(60, 5)"), X.tobytes()), ShapeError, ["5 features", f"takes {IN}"]),
    "no features": (npy(header(shape="(50, 0)")), ShapeError, ["0 features"]),
    "minus rows": (npy(header(shape=f"(-50, {IN})"), X.tobytes()), FileFormatError, ["followed by other data"]),
    "too many rows": (npy(header(shape=f"({10**30}, {IN})"), X.tobytes()), FileFormatError, ["truncated"]),
    "Fortran, truncated": (npy(header(order="True"), X.tobytes()[:-4]), FileFormatError, ["truncated"]),
}


@pytest.mark.parametrize("name", BAD_NPY)
def test_npy_source_refuses_a_bad_file_by_name(name: str, tmp_path: Path) -> None:
    content, error, fragments = BAD_NPY[name]
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with nothing_left_behind(tmp_path):
        tracemalloc.start()
        try:
            with pytest.raises(error) as caught:
                run_pipelined(LAYER, path, tmp_path / "y.npy", devices="cpu", chunk_rows=1000)
            assert tracemalloc.get_traced_memory()[1] < 50e6
        finally:
            tracemalloc.stop()
        assert type(caught.value) is error
        for fragment in fragments:
            assert fragment in str(caught.value)
        del caught
    assert sorted(tmp_path.iterdir()) == [path]


@settings(max_examples=500, deadline=None, database=None)
@given(data=st.data())
def test_npy_source_survives_any_bytes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A file with some bytes changed is refused by one of our errors or read with the shape it states."""
    content = bytearray(NPY_BYTES)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 100))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / "fuzz.npy"
    path.write_bytes(content)
    try:
        source = open_npy(path, SourceRequest(IN, FLOAT32))
    except InputError as error:
        assert str(error)
    else:
        assert source.features == IN
        source.close()


def test_npy_source_that_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.npy")
    (tmp_path / "folder.npy").mkdir()
    for name in ("fifo.npy", "folder.npy"):
        with pytest.raises(InputError, match=f"{name}' isn't a regular file"):
            run_pipelined(LAYER, tmp_path / name, devices="cpu")
    with pytest.raises(FileNotFoundError, match=r"nothing\.npy"):
        run_pipelined(LAYER, tmp_path / "nothing.npy", devices="cpu")


def test_npy_sink_is_what_numpy_reads(tmp_path: Path) -> None:
    for rows in (0, 1, 50, 12345):
        path = tmp_path / f"{rows}.npy"
        x = random_rows(rows, IN)
        run_pipelined(LAYER, x, path, devices="cpu")
        run_pipelined(LAYER, iter([x]), tmp_path / "batches.npy", devices="cpu", overwrite=True)
        assert path.read_bytes() == (tmp_path / "batches.npy").read_bytes()
        with path.open("rb") as file:
            assert np.lib.format.read_magic(file) == (1, 0)
            assert np.lib.format.read_array_header_1_0(file) == ((rows, OUT), False, np.dtype("<f4"))
            assert file.tell() % 64 == 0
        assert path.stat().st_size == 128 + rows * OUT * 4


@pytest.mark.parametrize("layout", ["C", "Fortran", "big-endian", "empty"])
def test_sink_never_replaces_the_source_file(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "x.npy"
    array = {"Fortran": np.asfortranarray(X), "big-endian": X.astype(">f4"), "empty": X[:0]}.get(layout, X)
    np.save(path, array)
    content = path.read_bytes()
    with pytest.raises(OutputError, match="is the source itself"):
        run_pipelined(LAYER, path, path, overwrite=True, devices="cpu")
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
