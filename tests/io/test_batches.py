"""Iterables of batches: gathered by a reader thread, streamed batch by batch."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.data import assert_same_bits, batches_of, random_layer, random_rows
from helpers.ends import DTYPES, IN, LAYER, OUT, X, as_tensor, every, open_pipeline
from helpers.leaks import PlannedError, nothing_left_behind, pipeline_threads, small_rings
from hypothesis import given
from hypothesis import strategies as st

from pipeline import Pipeline, run_pipelined
from pipeline.arrays import HostArray, is_torch
from pipeline.dtypes import FLOAT32
from pipeline.errors import InputError
from pipeline.flow import Gather
from pipeline.io.registry import SourceRequest
from pipeline.io.sources import open_source
from pipeline.rows import Fill, SourceRows
from pipeline.staging.native import NativeWorkers


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


def test_source_may_be_a_torch_data_loader() -> None:
    loader = torch.utils.data.DataLoader(torch.from_numpy(X), batch_size=7)
    assert_same_bits(run_pipelined(LAYER, loader, devices="cpu").out, LAYER(X))


def test_source_batches_that_are_tuples_are_refused_by_name() -> None:
    labelled = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.zeros(len(X)))
    with pytest.raises(InputError, match=r"batch 0 is a (list|tuple), expected .*x for x, _ in loader"):
        run_pipelined(LAYER, torch.utils.data.DataLoader(labelled, batch_size=7), devices="cpu")


class Fails:
    """An array-like object whose conversion raises."""

    def __array__(self, *arguments: Any, **options: Any) -> HostArray:
        raise PlannedError


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


@pytest.mark.parametrize("skip", [set(), {0}, {1, 2}, {6}, {0, 1, 2, 3, 4, 5, 6}, {3, 99}])
def test_batches_of_chunks_that_are_done_are_passed_over(skip: set[int]) -> None:
    """Pulled, for they come in order, but not copied: the chunks that are left are what they would have been."""
    copied = []

    def copy(job: Fill) -> None:
        copied.append(len(job.piece))
        job()

    source = open_source(batches_of(X, [9, 1, 40]), SourceRequest(IN, FLOAT32))
    feed = source.feed(8, Gather(lambda n: np.empty(n, np.uint8), 2, copy), FLOAT32, skip)
    rows = {}
    while not feed.exhausted:
        chunk = feed.take()
        if chunk is not None:
            assert isinstance(chunk.source, SourceRows) and chunk.row == 8 * chunk.index and chunk.release is not None
            rows[chunk.index] = np.empty((chunk.rows, IN), np.float32)
            chunk.source.read(0, rows[chunk.index])
            chunk.release()
    feed.stop()
    assert sorted(rows) == [index for index in range(7) if index not in skip]
    for index, array in rows.items():
        assert_same_bits(array, X[8 * index : 8 * index + 8])
    assert feed.skipped_rows == 50 - sum(map(len, rows.values())) == 50 - sum(copied)
