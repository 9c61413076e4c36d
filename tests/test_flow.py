"""Chunks and feeds: every row once, in order, without those that are done. Sources and sinks of the fewest lines."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits, poisoned, random_layer, random_rows
from helpers.ends import IN, LAYER, OUT, X, open_pipeline
from hypothesis import given
from hypothesis import strategies as st

from pipeline import PipelineError, Sink, Source
from pipeline.arrays import HostArray
from pipeline.dtypes import BFLOAT16, FLOAT32
from pipeline.flow import Chunk, Gather, RangeFeed, Span
from pipeline.io.memory import ArraySource
from pipeline.io.registry import SINKS, SOURCES

NO_GATHER = Gather(lambda n: np.empty(n, np.uint8), 0, lambda job: job())


class Plain(Source):
    """Rows of an array, through `read` alone."""

    kind = "plain rows"

    def __init__(self, array: HostArray) -> None:
        self.array, self.dtype = array, FLOAT32
        self.rows, self.features = array.shape

    def read(self, first: int, piece: HostArray) -> None:
        piece[...] = self.array[first : first + len(piece)]


class Kept(Sink):
    """The result in an array of its own, through `write` alone."""

    def __init__(self, array: HostArray) -> None:
        self.array, self.aborted = array, False

    def write(self, first: int, piece: HostArray) -> None:
        self.array[first : first + len(piece)] = piece

    def finish(self, rows: int) -> HostArray:
        return self.array[:rows]

    def abort(self) -> None:
        self.aborted = True


def all_chunks(feed: Any) -> list[Chunk]:
    chunks = []
    while (chunk := feed.take()) is not None:
        chunks.append(chunk)
    assert feed.exhausted
    return chunks


@given(st.integers(0, 40_000), st.integers(100, 5000))
def test_chunks_cover_every_row_once(rows: int, chunk_rows: int) -> None:
    source = ArraySource(np.empty((rows, 1), np.float32), "NumPy array")
    chunks = all_chunks(source.feed(chunk_rows, NO_GATHER, FLOAT32))
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.row for chunk in chunks] == list(np.cumsum([0] + [chunk.rows for chunk in chunks])[:-1])
    assert sum(chunk.rows for chunk in chunks) == rows and all(chunk.rows == chunk_rows for chunk in chunks[:-1])


@given(st.integers(0, 300), st.integers(1, 40), st.sets(st.integers(0, 60)))
def test_chunks_that_are_skipped_leave_the_others_as_they_are(rows: int, chunk_rows: int, skip: set[int]) -> None:
    source = ArraySource(np.empty((rows, 1), np.float32), "NumPy array")
    every = {chunk.index: (chunk.row, chunk.rows) for chunk in all_chunks(source.feed(chunk_rows, NO_GATHER, FLOAT32))}
    feed = source.feed(chunk_rows, NO_GATHER, FLOAT32, skip)
    left = {chunk.index: (chunk.row, chunk.rows) for chunk in all_chunks(feed)}
    assert left == {index: place for index, place in every.items() if index not in skip}
    assert feed.skipped_rows == sum(n for index, (_, n) in every.items() if index in skip)


def test_feed_is_exhausted_where_only_skipped_chunks_follow() -> None:
    feed = RangeFeed(100, 10, lambda row, n: Plain(X).rows_at(row, n, FLOAT32), set(range(1, 10)))
    assert not feed.exhausted and feed.take() is not None and feed.exhausted
    assert RangeFeed(100, 10, lambda row, n: Plain(X).rows_at(row, n, FLOAT32), set(range(10))).exhausted


def test_feed_shared_by_threads_hands_out_each_chunk_once_and_none_after_stop() -> None:
    feed = RangeFeed(5000, 1, lambda row, n: Plain(X).rows_at(row, n, FLOAT32), set(range(0, 5000, 3)))
    taken: list[list[int]] = [[] for _ in range(4)]

    def take(into: list[int]) -> None:
        while (chunk := feed.take()) is not None:
            into.append(chunk.index)

    threads = [threading.Thread(target=take, args=(each,)) for each in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(index for each in taken for index in each) == [n for n in range(5000) if n % 3]
    stopped = RangeFeed(50, 10, lambda row, n: Plain(X).rows_at(row, n, FLOAT32))
    stopped.take()
    stopped.stop()
    assert stopped.take() is None and stopped.exhausted


@pytest.mark.parametrize("wire_dtype", [None, "bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_source_and_sink_of_one_method_each_give_the_bits_of_arrays(
    device: str, wire_dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The casts between their element types and the wire's are made around `read` and `write`."""
    monkeypatch.setattr(SOURCES, "_openers", {Plain: lambda value, request: value})
    monkeypatch.setattr(SINKS, "_openers", {Kept: lambda value, request: value})
    with open_pipeline(devices=device, wire_dtype=wire_dtype) as pipeline:
        sink = Kept(poisoned((50, OUT)))
        result = pipeline.run(Plain(X), sink)
        assert result.out.base is sink.array and not sink.aborted and result.stats.source == "plain rows"
        assert_same_bits(result.out, pipeline.run(X).out)
        assert_same_bits(pipeline.run(Plain(X)).out, result.out)


def test_source_and_sink_errors_name_the_chunk_and_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SOURCES, "_openers", {Plain: lambda value, request: value})
    monkeypatch.setattr(SINKS, "_openers", {Kept: lambda value, request: value})
    sink = Kept(poisoned((20, OUT)))  # too short
    with open_pipeline() as pipeline:
        with pytest.raises(ValueError) as caught:
            pipeline.run(Plain(X), sink)
        assert caught.value.__notes__[0].startswith("pipeline: in drain of chunk 1 ") and sink.aborted
        short = Plain(X)
        short.array = X[:20]
        with pytest.raises(ValueError) as caught:
            pipeline.run(short)
        assert caught.value.__notes__[0].startswith("pipeline: in fill of chunk 1 ")


def test_source_without_rows_or_methods_says_what_is_missing() -> None:
    class Nothing(Source):
        kind, rows, features, dtype = "nothing", None, IN, FLOAT32

    with pytest.raises(PipelineError, match=r"the source \(nothing\) doesn't know its number of rows, so it must"):
        Nothing().feed(10, NO_GATHER, FLOAT32)
    with pytest.raises(NotImplementedError, match="Nothing defines none of read, rows_at and feed"):
        Nothing().read(0, X)

    class Nowhere(Sink):
        def finish(self, rows: int) -> None: ...

    with pytest.raises(NotImplementedError, match="Nowhere defines neither write nor target"):
        Nowhere().write(0, X)


def test_source_reads_the_wires_element_type() -> None:
    layer, x = random_layer(IN, OUT), random_rows(9, IN)
    piece = np.zeros((4, IN), np.uint16)
    Plain(x).rows_at(2, 7, BFLOAT16).read(1, piece)  # type: ignore[union-attr]
    expected = (x[3:7].view(np.uint32) >> 16).astype(np.float64)
    assert (np.abs(piece.astype(np.float64) - expected) <= 1).all() and layer.in_features == LAYER.in_features


@pytest.mark.parametrize("dtype", ["float32", "fp32", np.dtype("f4"), np.float32])
def test_source_may_name_its_element_type(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SOURCES, "_openers", {Plain: lambda value, request: value})
    source = Plain(X)
    source.dtype = dtype
    with open_pipeline() as pipeline:
        assert_same_bits(pipeline.run(source).out, LAYER(X))


def test_spans_overlap_in_one_place_only() -> None:
    a = Span(0, 10)
    assert a.overlaps(Span(9, 12)) and not a.overlaps(Span(10, 12))
    assert not a.overlaps(Span(0, 10, (1, 2))) and Span(0, 10, (1, 2)).overlaps(Span(3, 4, (1, 2)))
    assert not Span(0, 10, (1, 2)).overlaps(Span(0, 10, (1, 3)))
