"""What runs rely on in every source and sink, as checks for the tests of those who write one.

    def test_csv_source(tmp_path):
        rows = np.arange(60, dtype=np.float32).reshape(20, 3)
        np.savetxt(tmp_path / "x.csv", rows, delimiter=",")
        pipeline.testing.check_source(lambda: tmp_path / "x.csv", rows)

The value goes through the registry, as in a run. A check that fails raises AssertionError. Checked are values, orders,
threads, casts and what is left behind; faults of disks and networks are for tests of the format's own.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np

from pipeline.arrays import HostArray, convert, host_view
from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32, Cast, DType, cast_between, parse_dtype
from pipeline.errors import OptionError
from pipeline.flow import Chunk, Feed, Gather, Sink, Source
from pipeline.io.registry import SinkRequest, SourceRequest
from pipeline.io.sinks import open_sink
from pipeline.io.sources import open_source
from pipeline.rows import DeviceRows, Drain, Fill, Job
from pipeline.staging.native import open_workers

_MOST_PIECE_ROWS = 5  # so that even few rows are several pieces


# -- sources -----------------------------------------------------------------------------------------------------------


def check_source(make: Callable[[], Any], expected: Any) -> None:
    """Read a source in every way that runs do and compare its rows, bit by bit, with the expected ones.

    Its rows are read in chunks of several sizes, in pieces of odd sizes, in any order where it doesn't gather them
    itself, from several threads and by the package's copy workers; in its own element type and, of float32, in those
    that may cross the bus instead; with chunks left out. Nothing may stay open.

    Args:
        make: gives what a run would be passed as its source: a new value for each call.
        expected: its rows: a NumPy array or torch CPU tensor (rows, features), of some twenty rows at least.

    Raises:
        AssertionError: a row differs, or the source says something that isn't so.
    """
    rows, dtype = host_view(expected, "expected")
    order = random.Random(0)
    for wire in _wires(dtype):
        on_wire = _as_wire(rows, cast_between(dtype, wire))
        for chunk_rows in (1, 7, len(rows), len(rows) + 3):
            for workers in (False, True):
                with _opened(make, rows, dtype) as source:
                    chunks = _read(source, chunk_rows, wire, order, workers=workers)
                    _assert_chunks(chunks, on_wire, chunk_rows, frozenset())
    for skip in (frozenset({0, 2}), frozenset(range(1, -(-len(rows) // 7))), frozenset(range(len(rows)))):
        with _opened(make, rows, dtype) as source:
            _assert_chunks(_read(source, 7, dtype, order, skip), rows, 7, skip)
    with _opened(make, rows, dtype) as source:
        feed = source.feed(7, _gather(), dtype)
        _next(feed)
        feed.stop()
        assert feed.take() is None or source.gathers, "a feed that was stopped hands out a chunk"


@contextmanager
def _opened(make: Callable[[], Any], rows: HostArray, dtype: DType) -> Iterator[Source]:
    """The source, which must know what its rows are and close what it opened."""
    value = make()
    with _nothing_left_open("the source"):
        source = open_source(value, SourceRequest(rows.shape[1], dtype))
        try:
            assert source.rows in (None, len(rows)), f"it says it has {source.rows} rows, it has {len(rows)}"
            assert source.rows is not None or source.gathers, "it doesn't know its number of rows and doesn't gather"
            assert source.kind and source.where in ("memory", "file", "batches", "device")
            assert source.family in ("numpy", "torch", "cuda")
            yield source
        finally:
            source.close()
            source.close()


def _read(
    source: Source,
    chunk_rows: int,
    wire: DType,
    order: random.Random,
    skip: AbstractSet[int] = frozenset(),
    *,
    workers: bool = False,
) -> list[tuple[Chunk, HostArray]]:
    """Every chunk with its rows. The rows of all of them are read in disorder where the source allows it."""
    feed = source.feed(chunk_rows, _gather(), wire, skip)
    read: list[tuple[Chunk, HostArray]] = []
    jobs: list[Job] = []
    try:
        while (chunk := _next(feed)) is not None:
            assert not isinstance(chunk.source, DeviceRows), "rows in a device's memory can't be checked here"
            into = np.empty((chunk.rows, source.features), wire.carrier)
            into.view(np.uint8).fill(0xFF)  # what isn't read shows
            read.append((chunk, into))
            jobs += [Fill(chunk.source, first, into[first:end]) for first, end in _pieces(chunk.rows, order)]
            if source.gathers:
                _do(jobs, order, workers=workers)
                jobs.clear()
            if chunk.release is not None:
                chunk.release()
        _do(jobs, order, workers=workers)
    finally:
        feed.stop()
    assert feed.exhausted, "a feed that has no chunk left doesn't say so"
    total = sum(chunk.rows for chunk, _ in read) + feed.skipped_rows
    assert source.rows in (None, total), f"it skipped {feed.skipped_rows} rows: with the others, that makes {total}"
    return read


def _assert_chunks(
    read: list[tuple[Chunk, HostArray]], expected: HostArray, chunk_rows: int, skip: AbstractSet[int]
) -> None:
    numbers = [index for index in range(-(-len(expected) // chunk_rows)) if index not in skip]
    assert [chunk.index for chunk, _ in read] == numbers, f"expected the chunks {numbers}"
    for chunk, rows in read:
        assert chunk.row == chunk.index * chunk_rows
        assert_same_rows(rows, expected[chunk.row : chunk.row + chunk_rows], f"chunk {chunk.index}")


def _next(feed: Feed) -> Chunk | None:
    """The feed's next chunk, waited for; None where there is none any more."""
    while (chunk := feed.take()) is None and not feed.exhausted:
        sleep(0.0001)
    return chunk


def _gather() -> Gather:
    return Gather(lambda n_bytes: np.empty(n_bytes, np.uint8), 3, lambda job: job())


# -- sinks -------------------------------------------------------------------------------------------------------------


def check_sink(
    make: Callable[[int], Any],
    read: Callable[[Any], Any],
    *,
    dtype: str = "float32",
    rows: int = 23,
    features: int = 7,
    folder: Path | None = None,
) -> None:
    """Write to a sink in every way that runs do and compare what it holds, bit by bit, with what was written.

    Rows are written in pieces of odd sizes, in any order, from several threads and by the package's copy workers; in
    the result's element type and, for float32, in those that may have crossed the bus instead; where their number is
    known and, unless the sink refuses that with an OptionError, where only the end tells it; no rows; half of the rows,
    after which it is aborted, or left and reopened if it is `resumable`. Nothing may stay open.

    Args:
        make: gives what a run would be passed as `out`, for a result of so many rows: for each call a new value, where
            nothing has been written yet.
        read: the rows (rows, features) of what `finish` gave: a NumPy array or torch CPU tensor.
        dtype: the result's element type.
        rows, features: the result's shape, of some twenty rows at least.
        folder: where an aborted sink may leave nothing.

    Raises:
        AssertionError: a row differs, or something is left.
    """
    element, order = parse_dtype(dtype), random.Random(0)
    for wire in _wires(element):
        data = _random_rows(rows, features, wire)
        for known in (rows, None):
            for workers in (False, True):
                request = SinkRequest(_Rows(known, features), features, element, wire)
                _check_complete(make, read, request, data, order, workers=workers)
    request = SinkRequest(_Rows(0, features), features, element, element)
    _check_complete(make, read, request, _random_rows(0, features, element), order, workers=False)
    request = SinkRequest(_Rows(rows, features), features, element, element)
    _check_abort(make, request, _random_rows(rows, features, element), order, folder)
    _check_reopened(make, read, request, _random_rows(rows, features, element), order)


def _check_complete(
    make: Callable[[int], Any],
    read: Callable[[Any], Any],
    request: SinkRequest,
    data: HostArray,
    order: random.Random,
    *,
    workers: bool,
) -> None:
    out = make(len(data))
    with _nothing_left_open("the sink"):
        try:
            sink = open_sink(out, request)
        except OptionError:
            assert request.rows is None, "the sink refuses rows of a known number"
            return
        _write(sink, data, _chunks(len(data)), order, workers=workers)
        sink.stop()
        result = sink.finish(len(data))
    rows, _ = host_view(read(result), "what the sink holds")
    assert_same_rows(rows, _as_wire(data, request.cast), "what the sink holds")


def _check_abort(
    make: Callable[[int], Any], request: SinkRequest, data: HostArray, order: random.Random, folder: Path | None
) -> None:
    out = make(len(data))
    before = set() if folder is None else set(folder.rglob("*"))
    with _nothing_left_open("the sink"):
        sink = open_sink(out, request)
        _write(sink, data, _chunks(len(data))[::2], order)
        sink.stop()
        sink.abort()
        sink.abort()
    left = set() if folder is None else set(folder.rglob("*")) - before
    assert not left, f"an aborted sink left {sorted(map(str, left))}"


def _check_reopened(
    make: Callable[[int], Any],
    read: Callable[[Any], Any],
    request: SinkRequest,
    data: HostArray,
    order: random.Random,
) -> None:
    out = make(len(data))
    with _nothing_left_open("the sink"):
        sink = open_sink(out, request)
        if not sink.resumable:
            sink.abort()
            return
        _write(sink, data, _chunks(len(data))[::2], order)
        sink.leave()
        sink.abort()  # whatever cleans up afterwards doesn't remove what was left
        sink = open_sink(out, replace(request, reopen=True))
        _write(sink, data, _chunks(len(data))[1::2], order)
        result = sink.finish(len(data))
    rows, _ = host_view(read(result), "what the reopened sink holds")
    assert_same_rows(rows, data, "what the reopened sink holds")


class _Rows(Source):
    """What a sink may ask of the source whose results it takes."""

    kind = "rows of a test"

    def __init__(self, rows: int | None, features: int) -> None:
        self.rows, self.features, self.dtype = rows, features, FLOAT32


def _chunks(rows: int, chunk_rows: int = 6) -> list[tuple[int, int]]:
    return [(row, min(row + chunk_rows, rows)) for row in range(0, rows, chunk_rows)]


def _write(
    sink: Sink, data: HostArray, chunks: list[tuple[int, int]], order: random.Random, *, workers: bool = False
) -> None:
    """Write these chunks of the rows, in disorder."""
    sink.prepare()
    opened: list[Chunk] = []
    jobs: list[Job] = []
    for number, (row, end) in enumerate(order.sample(chunks, len(chunks))):
        chunk = Chunk(number, row, end - row, _NO_ROWS)
        target = sink.target(chunk)
        assert not isinstance(target, DeviceRows), "rows in a device's memory can't be checked here"
        opened.append(chunk)
        for first, last in _pieces(chunk.rows, order):
            jobs.append(Drain(target, first, data[row + first : row + last].copy()))
    _do(jobs, order, workers=workers)
    for job in jobs:
        job.piece.view(np.uint8).fill(0xFF)  # pieces are used again: a sink that kept one holds wrong rows now
    for chunk in opened:
        sink.commit(chunk)


# -- both --------------------------------------------------------------------------------------------------------------

_NO_ROWS = DeviceRows(0, 0, 0, 0, None)


def assert_same_rows(got: HostArray, expected: HostArray, what: str) -> None:
    """Assert that two arrays have one shape and the same bits, whatever their byte orders and strides."""
    assert got.shape == expected.shape, f"{what} has shape {got.shape}, expected {expected.shape}"
    a, b = (np.ascontiguousarray(each.astype(each.dtype.newbyteorder("="))).view(np.uint8) for each in (got, expected))
    wrong = np.flatnonzero((a != b).any(axis=1))
    assert not len(wrong), f"{what}: {len(wrong)} of {len(a)} rows differ, the first ones are {wrong[:8].tolist()}"


def _wires(dtype: DType) -> list[DType]:
    """The element types in which rows of `dtype` may cross the bus."""
    return [FLOAT32, BFLOAT16, FLOAT16] if dtype is FLOAT32 else [dtype]


def _as_wire(rows: HostArray, cast: Cast | None) -> HostArray:
    native = np.ascontiguousarray(rows.astype(rows.dtype.newbyteorder("=")))
    if cast is None:
        return native
    found = np.empty(native.shape, cast.target.carrier)
    convert(found, native, cast)
    return found


def _random_rows(rows: int, features: int, dtype: DType) -> HostArray:
    normal = np.random.default_rng(0).standard_normal((rows, features)).astype(np.float32)
    return _as_wire(normal, cast_between(FLOAT32, dtype))


def _pieces(rows: int, order: random.Random) -> Iterator[tuple[int, int]]:
    first = 0
    while first < rows:
        end = min(rows, first + order.randint(1, _MOST_PIECE_ROWS))
        yield first, end
        first = end


def _do(jobs: list[Job], order: random.Random, *, workers: bool) -> None:
    """Do jobs in disorder: from several threads, or by copy workers."""
    shuffled = order.sample(jobs, len(jobs))
    if workers:
        copies = open_workers(2)
        try:
            operations = [copies.submit(job) for job in shuffled]
            copies.wait_all()
            for operation in operations:
                operation.done()
        finally:
            copies.close()
        return
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda job: job(), shuffled))


@contextmanager
def _nothing_left_open(what: str) -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    left = set(os.listdir("/proc/self/fd")) - before
    assert not left, f"{what} left {len(left)} file descriptors open"
