"""Sources and sinks: any layout in, any layout out, and every bad one refused by name with nothing left behind."""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
import resource
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from device_tests import (
    PlannedError,
    assert_close,
    assert_same_bits,
    batches_of,
    nothing_left_behind,
    pipeline_threads,
    poisoned,
    random_layer,
    random_rows,
    small_rings,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline import FusedLinear, Pipeline, run_pipelined
from pipeline.arrays import HostArray, is_torch
from pipeline.dtypes import FLOAT32, parse_dtype
from pipeline.errors import (
    DTypeError,
    FileFormatError,
    InputError,
    OptionError,
    OutputError,
    OutputExistsError,
    PipelineError,
    ShapeError,
)
from pipeline.flow import Gather
from pipeline.io.sinks import _memory_bytes
from pipeline.io.sources import ArraySource, open_npy
from pipeline.kernels.driver import count_gpus
from pipeline.staging.native import NativeWorkers

IN, OUT = 6, 5
LAYER = random_layer(IN, OUT)
X = random_rows(50, IN)
DTYPES = ["float64", "float32", "float16", "bfloat16"]
BIG = np.dtype(">f4")
every = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


def open_pipeline(layer: FusedLinear = LAYER, **options: Any) -> Pipeline:
    return Pipeline(layer, **{"devices": "cpu", "chunk_rows": 16, "num_streams": 2, **options})


# -- every layout ------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[HostArray], HostArray]] = {
    "C": lambda x: x.copy(),
    "Fortran": np.asfortranarray,
    "reversed rows": lambda x: x[::-1].copy()[::-1],
    "reversed features": lambda x: x[:, ::-1].copy()[:, ::-1],
    "every third row": lambda x: np.repeat(x, 3, axis=0)[1::3],
    "every second feature": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "inside a wider array": lambda x: np.pad(x, 2, constant_values=np.nan)[2:-2, 2:-2],
    "of 3 dimensions": lambda x: np.stack([x, x + 1], axis=1)[:, 0],
    "unaligned": lambda x: unaligned(x),
    "read-only": lambda x: frozen(x),
}


def unaligned(x: HostArray) -> HostArray:
    memory = np.empty(x.nbytes + 1, np.uint8)
    view = memory[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def frozen(x: HostArray) -> HostArray:
    x = x.copy()
    x.setflags(write=False)
    return x


def as_tensor(x: HostArray) -> torch.Tensor:
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


@every
@given(
    rows=st.integers(0, 70),
    in_features=st.integers(1, 20),
    out_features=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    kind=st.sampled_from(["numpy", "big-endian", "torch", "memmap", "path"]),
    device=st.sampled_from(["cpu", "sim"]),
    chunk_rows=st.integers(1, 80),
    num_streams=st.integers(1, 4),
    piece_bytes=st.integers(1, 5000),
)
@example(70, 20, 20, "float32", "C", "path", "cpu", 1, 4, 1)
def test_source_of_any_layout_gives_the_bits_of_the_plain_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    in_features: int,
    out_features: int,
    dtype: str,
    layout: str,
    kind: str,
    device: str,
    chunk_rows: int,
    num_streams: int,
    piece_bytes: int,
) -> None:
    small_rings(monkeypatch, piece_bytes)
    layer = random_layer(in_features, out_features, dtype)
    plain = random_rows(rows, in_features, dtype)
    source: Any = LAYOUTS[layout](plain)
    if kind == "big-endian" and dtype != "bfloat16":
        source = LAYOUTS[layout](plain.astype(plain.dtype.newbyteorder(">")))
    elif kind == "torch" and layout not in ("reversed rows", "reversed features", "unaligned", "read-only"):
        source = as_tensor(source)
    elif kind in ("memmap", "path") and dtype != "bfloat16":
        np.save(tmp_path / "x.npy", source)
        source = tmp_path / "x.npy" if kind == "path" else np.load(tmp_path / "x.npy", mmap_mode="r" if rows else None)
    with open_pipeline(layer, devices=device, chunk_rows=chunk_rows, num_streams=num_streams) as pipeline:
        result = pipeline.run(source)
    assert is_torch(result.out) == is_torch(source)
    assert parse_dtype(result.out.dtype).name == dtype and result.stats.rows == rows
    assert_same_bits(result.out, layer(plain))
    assert_close(result.out, layer, plain)


@every
@given(
    sizes=st.lists(st.integers(0, 40), max_size=12),
    dtype=st.sampled_from(DTYPES),
    kinds=st.lists(st.sampled_from(["numpy", "torch", "Fortran", "big-endian"]), min_size=1, max_size=3),
    device=st.sampled_from(["cpu", "sim"]),
    chunk_rows=st.integers(1, 50),
    num_streams=st.integers(1, 4),
    streamed=st.booleans(),
    to_file=st.booleans(),
)
def test_source_of_batches_gives_the_bits_of_the_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[int],
    dtype: str,
    kinds: list[str],
    device: str,
    chunk_rows: int,
    num_streams: int,
    streamed: bool,
    to_file: bool,
) -> None:
    small_rings(monkeypatch, 200)
    layer = random_layer(IN, OUT, dtype)
    x = random_rows(sum(sizes), IN, dtype)

    def batches() -> Iterator[Any]:
        at = 0
        for number, size in enumerate(sizes):
            batch: Any = x[at : at + size].copy()
            at += size
            kind = kinds[number % len(kinds)]
            if kind == "torch":
                batch = as_tensor(batch)
            elif kind == "Fortran":
                batch = np.asfortranarray(batch)
            elif kind == "big-endian" and dtype != "bfloat16":
                batch = batch.astype(batch.dtype.newbyteorder(">"))
            yield batch
            batch[...] = 3  # a batch's memory is the iterable's again

    with open_pipeline(layer, devices=device, chunk_rows=chunk_rows, num_streams=num_streams) as pipeline:
        if streamed:
            results = list(pipeline.stream(batches()))
            assert [len(result) for result in results] == sizes
            assert all(is_torch(result) == (kinds[0] == "torch") for result in results)
            edges = np.cumsum([0, *sizes])
            for result, first in zip(results, edges, strict=False):
                assert_same_bits(result, layer(x)[first : first + len(result)])
        elif to_file and dtype != "bfloat16":
            path = tmp_path / "y.npy"
            assert pipeline.run(batches(), path, overwrite=True).out == path
            assert_same_bits(np.load(path), layer(x))
        else:
            out = pipeline.run(batches()).out
            assert is_torch(out) == (bool(sizes) and kinds[0] == "torch")
            if sizes:
                assert_same_bits(out, layer(x))


def test_results_near_zero_are_within_the_tolerance_of_these_tests() -> None:
    layer, x = random_layer(IN, OUT, "float64"), random_rows(23, IN, "float64")  # has a result of 1.6e-5
    assert_close(layer(x, out=poisoned((23, OUT), "float16")), layer, x)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_sink_of_one_row_may_have_any_strides(dtype: str) -> None:
    """NumPy calls a single row contiguous whatever its strides; torch doesn't."""
    element = parse_dtype(dtype)
    x, weight, bias = (array.astype(element.carrier) for array in (X[:1], LAYER.weight, LAYER.bias))
    layer = FusedLinear(weight, bias, 2.0)
    expected = run_pipelined(layer, x, devices="cpu").out
    for out in (np.full((1, OUT), np.nan, x.dtype)[::-1], np.full((1, 2, OUT), np.nan, x.dtype)[:, 1]):
        run_pipelined(layer, x[::-1], out, devices="cpu")
        assert_same_bits(out, expected)


@every
@given(
    rows=st.integers(0, 70),
    out_dtype=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(set(LAYOUTS) - {"read-only"})),
    kind=st.sampled_from(["numpy", "big-endian", "torch", "memmap", "path", "none"]),
    source_kind=st.sampled_from(["numpy", "Fortran", "torch"]),
    device=st.sampled_from(["cpu", "sim"]),
    chunk_rows=st.integers(1, 80),
    piece_bytes=st.integers(1, 5000),
)
def test_sink_of_any_layout_holds_the_bits_of_the_plain_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    out_dtype: str,
    dtype: str,
    layout: str,
    kind: str,
    source_kind: str,
    device: str,
    chunk_rows: int,
    piece_bytes: int,
) -> None:
    small_rings(monkeypatch, piece_bytes)
    layer, x = random_layer(IN, OUT, dtype), random_rows(rows, IN, dtype)
    expected = layer(x, out=poisoned((rows, OUT), out_dtype))
    source = {"numpy": x, "Fortran": np.asfortranarray(x), "torch": as_tensor(x)}[source_kind]
    out: Any = LAYOUTS[layout](poisoned((rows, OUT), out_dtype))
    path = tmp_path / "y.npy"
    if kind == "big-endian" and out_dtype != "bfloat16":
        out = LAYOUTS[layout](poisoned((rows, OUT), out_dtype).astype(np.dtype(out_dtype).newbyteorder(">")))
    elif kind == "torch" and layout not in ("reversed rows", "reversed features", "unaligned"):
        out = as_tensor(out)
    elif kind == "memmap" and out_dtype != "bfloat16" and rows:
        out = np.lib.format.open_memmap(path, "w+", out_dtype, (rows, OUT))
    elif kind == "path" and out_dtype != "bfloat16":
        out = path
    elif kind == "none":
        out = None
    with open_pipeline(layer, devices=device, chunk_rows=chunk_rows, out_dtype=out_dtype) as pipeline:
        result = pipeline.run(source, out, overwrite=True)
    if out is path:
        assert result.out == path
        assert_same_bits(np.load(path), expected)
    else:
        assert out is None or result.out is out
        assert parse_dtype(result.out.dtype).name == out_dtype
        assert out is not None or is_torch(result.out) == (source_kind == "torch")
        assert_same_bits(result.out, expected)
    assert_close(expected, layer, x)
    assert list(tmp_path.glob("*.partial")) == []


def test_source_may_be_broadcast() -> None:
    with open_pipeline() as pipeline:
        assert_same_bits(pipeline.run(np.broadcast_to(X[0], (40, IN))).out, LAYER(np.repeat(X[:1], 40, axis=0)))
        assert_same_bits(
            pipeline.run(torch.from_numpy(X[:, :1].copy()).expand(50, IN)).out, LAYER(np.repeat(X[:, :1], IN, axis=1))
        )


def test_source_tensor_that_requires_grad_is_a_plain_source() -> None:
    assert_same_bits(run_pipelined(LAYER, torch.tensor(X, requires_grad=True), devices="cpu").out, LAYER(X))


def test_source_may_be_a_torch_data_loader() -> None:
    loader = torch.utils.data.DataLoader(torch.from_numpy(X), batch_size=7)
    assert_same_bits(run_pipelined(LAYER, loader, devices="cpu").out, LAYER(X))


def test_source_batches_that_are_tuples_are_refused_by_name() -> None:
    labelled = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.zeros(len(X)))
    with pytest.raises(InputError, match=r"batch 0 is a (list|tuple), expected .*x for x, _ in loader"):
        run_pipelined(LAYER, torch.utils.data.DataLoader(labelled, batch_size=7), devices="cpu")


def test_sink_guards_the_memory_around_a_view() -> None:
    for layout in ("every second feature", "inside a wider array", "every third row"):
        memory = np.full((300, 40), 7.0, np.float32)
        out = {"every second feature": memory[:50, 1:10:2], "every third row": memory[4:154:3, :5]}.get(
            layout, memory[9:59, 3:8]
        )
        with open_pipeline() as pipeline:
            pipeline.run(X, out)
        assert_same_bits(out, LAYER(X))
        out[...] = 7.0
        assert (memory == 7.0).all()


# -- .npy files --------------------------------------------------------------------------------------------------------


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
        source = open_npy(path, IN)
    except InputError as error:
        assert str(error)
    else:
        assert source.features == IN
        source.close()


def test_npy_source_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch, 100, 2)
    path, x = tmp_path / "x.npy", random_rows(400, IN)
    np.save(path, x)

    def cut(progress: Any) -> None:
        os.truncate(path, 128 + 200 * IN * 4)

    with nothing_left_behind(tmp_path), open_pipeline() as pipeline:
        with pytest.raises(FileFormatError, match=r"ended at byte .* it was cut while it was read") as caught:
            pipeline.run(path, tmp_path / "y.npy", progress=cut)
        assert caught.value.__notes__[0].startswith("pipeline: in fill of chunk ")
        assert_same_bits(pipeline.run(X).out, LAYER(X))
    assert sorted(tmp_path.iterdir()) == [path]


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


# -- bad input: refused by name, before any work -----------------------------------------------------------------------


class Fails:
    """An array-like object whose conversion raises."""

    def __array__(self, *arguments: Any, **options: Any) -> HostArray:
        raise PlannedError


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


def test_bad_input_without_device_data_raises_what_the_iterable_raised() -> None:
    """The same object, with its own cause, and a note of where."""
    cause = KeyError("k")

    def batches(good: int) -> Iterator[HostArray]:
        for _ in range(good):
            yield X
        raise PlannedError("mine") from cause

    for good in (0, 1, 7):
        with open_pipeline() as pipeline:
            with pytest.raises(PlannedError, match="mine") as caught:
                pipeline.run(batches(good))
            assert caught.value.__cause__ is cause
            if good:
                assert len(caught.value.__notes__) == 1 and "in the source after" in caught.value.__notes__[0]
            results = []
            with pytest.raises(PlannedError) as caught:
                for result in pipeline.stream(batches(good)):
                    results.append(result)  # noqa: PERF402
            assert len(results) == good, "results of the batches before the error come first"
            assert caught.value.__cause__ is cause


def test_bad_input_object_that_fails_to_convert() -> None:
    with nothing_left_behind(), open_pipeline() as pipeline, pytest.raises(PlannedError):
        pipeline.run([X, Fails()])


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


def test_sink_memmap_of_the_source_file_is_refused(tmp_path: Path) -> None:
    layer, square = random_layer(IN, IN), random_rows(40, IN)
    path = tmp_path / "x.npy"
    np.save(path, square)
    content = path.read_bytes()
    out = np.load(path, mmap_mode="r+")
    for source in (path, np.load(path, mmap_mode="r"), np.load(path, mmap_mode="r")[::2][::-1]):
        with pytest.raises(OptionError, match=r"out maps the bytes of .*x\.npy"):
            run_pipelined(layer, source, out if isinstance(source, Path) else out[: len(source)], devices="cpu")
    assert path.read_bytes() == content


def test_sink_tensor_of_the_map_that_is_the_source_is_refused(tmp_path: Path) -> None:
    layer, square = random_layer(IN, IN), random_rows(40, IN)
    np.save(tmp_path / "x.npy", square)
    source = np.load(tmp_path / "x.npy", mmap_mode="r+")
    with pytest.raises(OptionError, match="out overlaps the source"):
        run_pipelined(layer, source[:20], torch.from_numpy(source)[10:30], devices="cpu")
    assert (source == square).all()


def test_sink_memmap_of_another_part_of_the_source_file_is_fine(tmp_path: Path) -> None:
    layer, x = random_layer(IN, IN), random_rows(40, IN)
    np.concatenate([x, x]).tofile(tmp_path / "both.bin")
    half = {"dtype": np.float32, "shape": (40, IN)}
    source = np.memmap(tmp_path / "both.bin", mode="r", **half)
    out = np.memmap(tmp_path / "both.bin", mode="r+", offset=x.nbytes, **half)
    run_pipelined(layer, source, out, devices="cpu", chunk_rows=7)
    assert_same_bits(np.fromfile(tmp_path / "both.bin", np.float32).reshape(80, IN)[40:], layer(x))


# -- maps of files: read and written past the map ----------------------------------------------------------------------


def resident_kib(array: HostArray) -> int:
    """How much of the map that an array lies in the process has touched."""
    address, inside = array.__array_interface__["data"][0], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, dash, rest = line.partition("-")
        if dash and " " in rest and not first.endswith(":") and ":" not in first:
            inside = int(first, 16) <= address < int(rest.split()[0], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError("not mapped")


MAPPED: dict[str, Callable[[Any], Any]] = {
    "rows": lambda whole: whole[3:53, :OUT],
    "columns": lambda whole: whole[:50, 2 : 2 + OUT],
    "every second row": lambda whole: whole[1:101:2, :OUT],
    "reversed rows": lambda whole: whole[50:0:-1, :OUT],
    "plain array": lambda whole: np.asarray(whole)[3:53, :OUT],
    "columns of Fortran order": lambda whole: whole.reshape(whole.shape[::-1])[1 : 1 + OUT, 7:57].T,
}


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("byte_order", "<>")
@pytest.mark.parametrize("out_dtype", ["float32", "float16"])
@pytest.mark.parametrize("view", MAPPED)
def test_sink_memmap_is_written_past_the_map(
    view: str, out_dtype: str, byte_order: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_rings(monkeypatch, 100, 2)
    dtype = np.dtype(out_dtype).newbyteorder(byte_order)
    whole = np.memmap(tmp_path / "y.bin", dtype, "w+", 24, (120, 11))
    out = MAPPED[view](whole)
    with nothing_left_behind(tmp_path), open_pipeline(devices=device, out_dtype=out_dtype) as pipeline:
        result = pipeline.run(X, out)
    assert result.out is out
    assert resident_kib(whole) == 0  # nothing was stored through the map
    assert_same_bits(out.astype(out_dtype), LAYER(X, out=poisoned((50, OUT), out_dtype)))
    written = whole.copy()
    assert (np.fromfile(tmp_path / "y.bin", dtype, offset=24).reshape(120, 11) == written).all()
    MAPPED[view](written)[...] = 0
    assert not written.any()  # nor was anything written beside the view


@pytest.mark.parametrize("name", ["", "removed", "replaced"])
def test_maps_are_of_their_file_whatever_its_name_is(name: str, tmp_path: Path) -> None:
    X.tofile(tmp_path / "x.bin")
    source = np.memmap(tmp_path / "x.bin", np.float32, "r", 0, X.shape)
    out = np.memmap(tmp_path / "y.bin", np.float32, "w+", 0, (50, OUT))
    if name:
        for path in list(tmp_path.iterdir()):
            path.unlink()
            if name == "replaced":
                path.write_bytes(b"theirs")
    with open_pipeline() as pipeline:
        result = pipeline.run(source, out)
    assert result.stats.source == "memory-mapped file" and resident_kib(source) == resident_kib(out) == 0
    assert_same_bits(out, LAYER(X))
    if name == "replaced":
        assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"theirs"}


def test_sink_memmap_of_mode_c_is_memory_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "y.bin").write_bytes(bytes(50 * OUT * 4))
    out = np.memmap(tmp_path / "y.bin", np.float32, "c", 0, (50, OUT))
    run_pipelined(LAYER, X, out, devices="cpu")
    assert_same_bits(out, LAYER(X))
    assert not np.fromfile(tmp_path / "y.bin", np.uint8).any()


def test_sink_memmap_that_cannot_be_written_past_the_map_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.memmap(tmp_path / "y.bin", np.float32, "w+", 0, (50, 2 * OUT))
    with nothing_left_behind(tmp_path), open_pipeline() as pipeline:
        with pytest.raises(OptionError, match=r"out maps a file and has strides \(40, 8\), expected contiguous rows"):
            pipeline.run(X, whole[:, ::2])
        monkeypatch.setattr(os, "listdir", lambda path: [])
        with pytest.raises(OutputError, match="out maps can't be opened for writing; pass its path"):
            pipeline.run(X, whole[:, :OUT])
    assert not whole.any()


def test_sink_memmap_of_no_rows(tmp_path: Path) -> None:
    out = np.memmap(tmp_path / "y.bin", np.float32, "w+", 0, (50, OUT))[:0]
    assert run_pipelined(LAYER, X[:0], out, devices="cpu").out is out


@pytest.mark.parametrize("layout", ["C", "Fortran", "big-endian", "rows", "every second row"])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_source_memmap_is_read_past_the_map(mode: Any, layout: str, tmp_path: Path) -> None:
    array = {"Fortran": np.asfortranarray(X), "big-endian": X.astype(">f4")}.get(layout, X)
    np.save(tmp_path / "x.npy", array)
    source = np.load(tmp_path / "x.npy", mmap_mode=mode)
    view = {"rows": source[10:40], "every second row": source[::2]}.get(layout, source)
    with nothing_left_behind(tmp_path), open_pipeline() as pipeline:
        result = pipeline.run(view)
    expected = {"rows": LAYER(X)[10:40], "every second row": LAYER(X)[::2]}.get(layout, LAYER(X))
    assert_same_bits(result.out, expected)
    with_gaps = layout == "every second row"
    assert (resident_kib(source) > 0) == with_gaps
    assert result.stats.source == ("NumPy array" if with_gaps else "memory-mapped file")


@pytest.mark.parametrize("mode", ["r+", "c"])
def test_source_memmap_that_was_changed_through_the_map(mode: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros_like(X))
    source = np.load(tmp_path / "x.npy", mmap_mode=mode)
    source[...] = X
    assert_same_bits(run_pipelined(LAYER, source, devices="cpu").out, LAYER(X))


def test_source_memmap_cut_while_it_is_read(tmp_path: Path) -> None:
    x = random_rows(40_000, IN)
    x.tofile(tmp_path / "x.bin")
    source = np.memmap(tmp_path / "x.bin", np.float32, "r", 0, x.shape)
    with nothing_left_behind(tmp_path), open_pipeline(chunk_rows=1000) as pipeline:
        os.truncate(tmp_path / "x.bin", 5000)
        with pytest.raises(FileFormatError, match=r"x\.bin ended at byte 5000, .* it was cut while it was read"):
            pipeline.run(source)


def test_source_memmap_whose_file_is_not_found_is_read_as_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    X.tofile(tmp_path / "x.bin")
    source = np.memmap(tmp_path / "x.bin", np.float32, "r", 0, X.shape)
    monkeypatch.setattr(os, "listdir", lambda path: [])
    result = run_pipelined(LAYER, source, devices="cpu")
    assert result.stats.source == "NumPy array"
    assert_same_bits(result.out, LAYER(X))


@pytest.mark.parametrize("layout", ["raw", "Fortran", "big-endian"])
def test_source_file_leaves_resident_memory_flat(layout: str, tmp_path: Path) -> None:
    """96 MiB, of which a map's pages would stay."""
    array = np.zeros((12_288, 2048), ">f4" if layout == "big-endian" else "<f4", "F" if layout == "Fortran" else "C")
    np.save(tmp_path / "x.npy", array)
    source = np.load(tmp_path / "x.npy", mmap_mode="r") if layout == "raw" else tmp_path / "x.npy"
    layer = random_layer(2048, 4)
    peak = 0

    def file_mib() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1]) // 1024

    def watch(progress: Any) -> None:
        nonlocal peak
        peak = max(peak, file_mib())

    with open_pipeline(layer, chunk_rows=1024) as pipeline:
        pipeline.run(array[:1024])  # what torch maps when it first computes
        before = file_mib()
        pipeline.run(source, progress=watch)
    assert peak - before < 10


# -- files: replaced only when complete --------------------------------------------------------------------------------


def test_npy_sink_overwrite_replaces_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "y.npy"
    path.write_bytes(b"old")

    def refuse(progress: Any) -> None:
        assert path.read_bytes() == b"old"
        raise PlannedError

    with open_pipeline() as pipeline:
        with pytest.raises(PlannedError):
            pipeline.run(X, path, overwrite=True, progress=refuse)
        assert path.read_bytes() == b"old"
        pipeline.run(X, path, overwrite=True)
    assert_same_bits(np.load(path), LAYER(X))
    assert list(tmp_path.iterdir()) == [path]


def test_npy_sink_overwrite_while_the_old_file_is_mapped_as_the_source(tmp_path: Path) -> None:
    layer, path = random_layer(IN, IN), tmp_path / "x.npy"
    np.save(path, X)
    run_pipelined(layer, np.load(path, mmap_mode="r"), path, devices="cpu", overwrite=True)
    assert_same_bits(np.load(path), layer(X))


@pytest.mark.parametrize("links", [True, False])
def test_npy_sink_leaves_a_file_that_appears_during_the_run(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "y.npy"
    if not links:
        monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    with open_pipeline() as pipeline, nothing_left_behind(copy_workers=False):
        with pytest.raises(OutputExistsError, match=r"the result is complete in .*y\.npy\.partial"):
            pipeline.run(X, path, progress=lambda progress: path.write_bytes(b"theirs"))
        assert path.read_bytes() == b"theirs"
    assert_same_bits(np.load(tmp_path / "y.npy.partial"), LAYER(X))


@pytest.mark.parametrize("overwrite", [False, True])
def test_npy_sink_syncs_its_folder_once_the_file_has_its_name(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fsync, synced = tmp_path / "y.npy", os.fsync, []

    def recorded(fd: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{fd}")).name, path.exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", recorded)
    run_pipelined(LAYER, X, path, devices="cpu", overwrite=overwrite)
    assert synced == [("y.npy.partial", False), (tmp_path.name, True)]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_npy_sink_on_file_systems_that_sync_no_folders(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refused(fd: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{fd}")).is_dir():
            raise OSError(code, os.strerror(code))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refused)
    if code == errno.EINVAL:
        run_pipelined(LAYER, X, tmp_path / "y.npy", devices="cpu")
    else:
        with pytest.raises(OutputError, match="Input/output error"):
            run_pipelined(LAYER, X, tmp_path / "y.npy", devices="cpu")
    assert_same_bits(np.load(tmp_path / "y.npy"), LAYER(X))


def test_reader_that_copies_when_a_run_stops_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes: its chunk buffers are the next run's."""
    monkeypatch.setattr("pipeline.io.batches._PATIENCE_S", 0.05)
    run, copying = NativeWorkers.run, threading.Event()

    def slow(workers: NativeWorkers, work: Any) -> None:
        if work.piece.shape[0] == 16 and not copying.is_set():
            copying.set()
            time.sleep(0.5)
        run(workers, work)

    def fail(progress: Any) -> None:
        assert copying.wait(5)
        raise PlannedError

    def batches() -> Iterator[Any]:
        yield X[:5]
        yield from (X for _ in range(50))

    with open_pipeline() as pipeline, nothing_left_behind(copy_workers=False):
        monkeypatch.setattr(NativeWorkers, "run", slow)
        with pytest.raises(PlannedError):
            pipeline.run(batches(), progress=fail)
        assert not any(thread.name == "pipeline-reader" for thread in threading.enumerate())
        assert_same_bits(pipeline.run([X]).out, LAYER(X))


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_npy_sink_works_where_there_are_no_hard_links(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refusing(code))
    path = run_pipelined(LAYER, X, tmp_path / "y.npy", devices="cpu").out
    assert_same_bits(np.load(path), LAYER(X))
    assert list(tmp_path.iterdir()) == [path]


def test_npy_sink_two_runs_to_one_path_the_second_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "y.npy"

    def second(progress: Any) -> None:
        with pytest.raises(OutputExistsError, match="another run is writing"):
            run_pipelined(LAYER, X, path, devices="cpu")

    run_pipelined(LAYER, X, path, devices="cpu", progress=second)
    assert_same_bits(np.load(path), LAYER(X))


def refusing(code: int, after: int = 0) -> Callable[..., Any]:
    """A system call that fails with `code` from its call number `after` on; the calls before do nothing."""
    calls = iter(range(10**9))

    def call(*arguments: Any) -> Any:
        if next(calls) >= after:
            raise OSError(code, os.strerror(code))

    return call


def failing_from(name: str, after: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = getattr(os, name), iter(range(10**9))

    def call(*arguments: Any) -> Any:
        if next(calls) >= after:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, name, call)


@pytest.fixture
def numpy_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy workers that call `os`, where a test's own calls can stand in."""
    monkeypatch.setenv("PIPELINE_NATIVE_COPY", "0")


@pytest.mark.usefixtures("numpy_copies")
@pytest.mark.parametrize("source", ["array", "batches"])
@pytest.mark.parametrize("after", [0, 1, 5, 13])
def test_npy_sink_every_write_may_fail(
    after: int, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Header, rows and the last header: a full disk is an OutputError, whichever write meets it."""
    small_rings(monkeypatch, 100, 2)
    x = random_rows(100, IN)
    with open_pipeline() as pipeline, nothing_left_behind(tmp_path, copy_workers=False):
        with monkeypatch.context() as patch:
            failing_from("pwrite", after, errno.ENOSPC, patch)
            with pytest.raises(OutputError, match="No space left on device") as caught:
                pipeline.run(x if source == "array" else batches_of(x, [9]), tmp_path / "y.npy")
            assert "y.npy" in str(caught.value)
            assert isinstance(caught.value.__cause__, OSError)
        assert list(tmp_path.iterdir()) == []
        pipeline.run(x, tmp_path / "y.npy")
        assert_same_bits(np.load(tmp_path / "y.npy"), LAYER(x))


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync", "replace"])
def test_npy_sink_other_calls_may_fail(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_pipeline() as pipeline, nothing_left_behind(tmp_path, copy_workers=False):
        with monkeypatch.context() as patch:
            failing_from(call, 0, errno.EIO, patch)
            with pytest.raises(OutputError, match="Input/output error"):
                pipeline.run(X, tmp_path / "y.npy", overwrite=True)
        assert list(tmp_path.iterdir()) == []
        pipeline.run(X, tmp_path / "y.npy")


@pytest.mark.usefixtures("numpy_copies")
@pytest.mark.parametrize("call", ["preadv"])
def test_npy_source_read_error_is_passed_on(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "x.npy", X)
    with open_pipeline() as pipeline, nothing_left_behind(tmp_path, copy_workers=False):
        with monkeypatch.context() as patch:
            failing_from(call, 2, errno.EIO, patch)
            with pytest.raises(OSError, match="Input/output error") as caught:
                pipeline.run(tmp_path / "x.npy", tmp_path / "y.npy")
            assert caught.value.__notes__[0].startswith("pipeline: in fill of chunk ")
        assert_same_bits(pipeline.run(tmp_path / "x.npy").out, LAYER(X))
    assert list(tmp_path.iterdir()) == [tmp_path / "x.npy"]


@pytest.mark.usefixtures("numpy_copies")
@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_npy_files_move_on_after_short_reads_and_writes(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", X)
    real = getattr(os, call)

    def short(fd: int, data: Any, position: int) -> int:
        part = [data[0][:13]] if call == "preadv" else data[:13] if len(data) != 128 else data
        return int(real(fd, part, position))

    monkeypatch.setattr(os, call, short)
    path = run_pipelined(LAYER, tmp_path / "x.npy", tmp_path / "y.npy", devices="cpu", chunk_rows=9).out
    assert_same_bits(np.load(path), LAYER(X))


def test_npy_sink_file_size_limit_is_a_clear_error(tmp_path: Path) -> None:
    """A real refusal by the kernel, before and during the run."""
    x = random_rows(3000, IN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_pipeline() as pipeline, nothing_left_behind(tmp_path, copy_workers=False):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
            with pytest.raises(OutputError, match=r"can't reserve .*File too large"):
                pipeline.run(x, tmp_path / "y.npy")
            with pytest.raises(OutputError, match="File too large") as caught:
                pipeline.run(batches_of(x, [100]), tmp_path / "y.npy")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "drain of chunk" in caught.value.__notes__[0]
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_npy_sink_full_disk_is_a_clear_error(tiny_disk: Path) -> None:
    x = random_rows(5000, IN)
    with open_pipeline() as pipeline, nothing_left_behind(tiny_disk, copy_workers=False):
        for _ in range(2):
            with pytest.raises(OutputError, match=r"can't reserve .*No space left on device"):
                pipeline.run(x, tiny_disk / "y.npy")
            with pytest.raises(OutputError, match="No space left on device") as caught:
                pipeline.run(batches_of(x, [100]), tiny_disk / "y.npy")
            assert "drain of chunk" in caught.value.__notes__[0]
            assert list(tiny_disk.iterdir()) == []
        (tiny_disk / "fill").write_bytes(bytes(60_000))
        with pytest.raises(OutputError, match="No space left on device"):
            pipeline.run(batches_of(x, [100]), tiny_disk / "y.npy")
        (tiny_disk / "fill").unlink()
        pipeline.run(X, tiny_disk / "y.npy")
        assert_same_bits(np.load(tiny_disk / "y.npy"), LAYER(X))


def test_sink_memmap_full_disk_is_a_clear_error(tiny_disk: Path) -> None:
    """In a process of its own: stores through the map would end it by SIGBUS."""
    program = f"""
import numpy as np
from pipeline import FusedLinear, OutputError, run_pipelined

layer = FusedLinear(np.ones(({OUT}, {IN}), np.float32))
path = {str(tiny_disk / "y.bin")!r}
out = np.memmap(path, np.float32, "w+", 0, (5000, {OUT}))
out[:100] = 7
try:
    run_pipelined(layer, np.ones((5000, {IN}), np.float32), out, devices="cpu")
except OutputError as error:
    print(error)
assert (np.fromfile(path, np.float32, 100 * {OUT}) == 7).all()
run_pipelined(layer, np.ones((2000, {IN}), np.float32), out[:2000], devices="cpu")
rows = np.fromfile(path, np.float32).reshape(out.shape)
assert (rows[:2000] == out[0, 0]).all() and out[0, 0] not in (0, 7) and not rows[2000:].any()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert re.search(r"can't reserve .* for .*y\.bin: No space left on device; free space", done.stdout)


@pytest.mark.usefixtures("numpy_copies")
@pytest.mark.parametrize("after", [0, 3])
def test_sink_memmap_every_write_may_fail(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch, 100, 2)
    out = np.memmap(tmp_path / "y.bin", np.float32, "w+", 0, (50, OUT))
    with open_pipeline() as pipeline, nothing_left_behind(tmp_path, copy_workers=False):
        with monkeypatch.context() as patch:
            failing_from("pwrite", after, errno.EIO, patch)
            with pytest.raises(OutputError, match=r"writing .*y\.bin failed: Input/output error"):
                pipeline.run(X, out)
        pipeline.run(X, out)
    assert_same_bits(out, LAYER(X))


# -- iterables ---------------------------------------------------------------------------------------------------------


def test_batches_that_block_for_ever_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stopped the run is raised, not the reader; when the iterable comes back, it can't touch the next run."""
    blocked, release = threading.Event(), threading.Event()
    join = threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join", lambda self, timeout=None: join(self, timeout and 0.2))

    def batches() -> Iterator[HostArray]:
        yield X[:16]
        yield X[16:20]  # a chunk is begun
        blocked.set()
        release.wait(30)
        yield np.full((16, IN), np.nan, np.float32)

    def refuse(progress: Any) -> None:
        blocked.wait(30)
        raise PlannedError

    with open_pipeline(num_streams=1) as pipeline:
        with pytest.raises(PlannedError):
            pipeline.run(batches(), progress=refuse)
        assert "pipeline-reader" in pipeline_threads()

        def next_run() -> Iterator[HostArray]:
            yield X[:20]
            release.set()
            time.sleep(0.1)
            yield X[20:]

        assert_same_bits(pipeline.run(next_run()).out, LAYER(X))
    with nothing_left_behind():
        pass
    assert pipeline_threads() == []


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("memory_rows", [10**6, 50, 49, 20, 0])
def test_batches_beyond_the_memory_that_was_granted_at_first(
    memory_rows: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.io.sinks._memory_bytes", lambda: memory_rows * OUT * 4)
    with open_pipeline(devices=device) as pipeline:
        out = pipeline.run(batches_of(X, [7, 3])).out
    assert out.shape == (50, OUT) and out.flags.c_contiguous
    assert_same_bits(out, LAYER(X))


def test_batches_where_address_space_is_limited() -> None:
    """The system refuses an array as large as its memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + _memory_bytes() // 2, hard))
        with pytest.raises(MemoryError):
            np.empty(_memory_bytes(), np.uint8)
        assert_same_bits(run_pipelined(LAYER, batches_of(X, [7, 3]), devices="cpu").out, LAYER(X))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_batches_result_uses_memory_for_its_rows_only() -> None:
    layer, x = random_layer(4, 2048), random_rows(8192, 4)  # 64 MiB out

    def resident_mib() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20

    with open_pipeline(layer, chunk_rows=1024) as pipeline:
        pipeline.run(x[:1024])
        before = resident_mib()
        out = pipeline.run(batches_of(x, [1000])).out
        assert out.nbytes == 64 * 2**20 and 50 < resident_mib() - before < 64 + 40


def test_batches_are_gathered_in_few_pinned_bytes() -> None:
    """Three chunks of 32 MiB, where there are 6 streams; as many as streams and one more where they are small."""
    layer, x = random_layer(8192, 4), np.zeros((500, 8192), np.float32)
    with Pipeline(layer, devices="cpu") as pipeline:
        assert pipeline.chunk_rows == 1024
        result = pipeline.run(itertools.repeat(x, 20))
        assert sum(buffer.nbytes for buffer in pipeline.fleet.gather_buffers) == 96 * 2**20
    assert result.stats.chunks == 10
    with Pipeline(layer, devices="cpu", chunk_rows=4096) as pipeline:
        pipeline.run(itertools.repeat(x, 30))
        assert len(pipeline.fleet.gather_buffers) == 2


def test_batches_list_and_iterator_objects() -> None:
    class Twice:
        """Iterable again and again, as a data loader is."""

        def __iter__(self) -> Iterator[HostArray]:
            return iter([X[:30], X[30:]])

    source = Twice()
    with open_pipeline() as pipeline:
        for _ in range(2):
            assert_same_bits(pipeline.run(source).out, LAYER(X))
        assert_same_bits(pipeline.run((X[:9], X[9:])).out, LAYER(X))
        assert_same_bits(pipeline.run(X[n : n + 1] for n in range(50)).out, LAYER(X))


def test_batches_of_bfloat16_come_back_as_they_went_in() -> None:
    layer, x = random_layer(IN, OUT, "bfloat16"), random_rows(50, IN, "bfloat16")
    with open_pipeline(layer) as pipeline:
        out = pipeline.run([x[:20], as_tensor(x[20:].copy())]).out
        assert out.dtype == ml_dtypes.bfloat16
        assert_same_bits(out, layer(x))
        tensor = pipeline.run([as_tensor(x.copy())]).out
        assert tensor.dtype == torch.bfloat16
        assert_same_bits(tensor, layer(x))


def test_source_of_file_object_or_memory_is_refused() -> None:
    with pytest.raises(InputError):
        run_pipelined(LAYER, io.BytesIO(NPY_BYTES), devices="cpu")


def test_source_of_a_raw_file_is_a_memmap_of_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.f32"
    path.write_bytes(b"a header of 24 bytes ..." + X.tobytes())
    with open_pipeline() as pipeline:
        result = pipeline.run(np.memmap(path, np.float32, "r", 24, X.shape))
    assert_same_bits(result.out, LAYER(X))


# -- chunks ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 40_000), st.integers(100, 5000))
def test_chunks_cover_every_row_once(rows: int, chunk_rows: int) -> None:
    no_gather = Gather(lambda n: np.empty(n, np.uint8), 0, lambda job: job())
    feed = ArraySource(np.empty((rows, 1), np.float32), "NumPy array").feed(chunk_rows, no_gather, FLOAT32)
    chunks = []
    while (chunk := feed.take()) is not None:
        chunks.append(chunk)
    assert feed.exhausted
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.row for chunk in chunks] == list(np.cumsum([0] + [chunk.rows for chunk in chunks])[:-1])
    assert sum(chunk.rows for chunk in chunks) == rows and all(chunk.rows == chunk_rows for chunk in chunks[:-1])
