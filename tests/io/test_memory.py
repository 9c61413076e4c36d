"""Arrays and tensors of any layout, as sources and as sinks."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import assert_close, assert_same_bits, batches_of, poisoned, random_layer, random_rows
from helpers.ends import DTYPES, IN, LAYER, LAYOUTS, OUT, X, as_tensor, every, open_pipeline
from helpers.leaks import small_rings
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline import FusedLinear, run_pipelined
from pipeline.arrays import is_torch
from pipeline.dtypes import parse_dtype
from pipeline.io.memory import memory_bytes


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


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("memory_rows", [10**6, 50, 49, 20, 0])
def test_batches_beyond_the_memory_that_was_granted_at_first(
    memory_rows: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.io.memory.memory_bytes", lambda: memory_rows * OUT * 4)
    with open_pipeline(devices=device) as pipeline:
        out = pipeline.run(batches_of(X, [7, 3])).out
    assert out.shape == (50, OUT) and out.flags.c_contiguous
    assert_same_bits(out, LAYER(X))


def test_batches_where_address_space_is_limited() -> None:
    """The system refuses an array as large as its memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes() // 2, hard))
        with pytest.raises(MemoryError):
            np.empty(memory_bytes(), np.uint8)
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
