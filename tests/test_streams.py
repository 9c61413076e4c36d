"""`Pipeline.stream`: results batch by batch."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from helpers.data import assert_same_bits, random_layer, random_rows
from helpers.leaks import PlannedError, nothing_left_behind, pipeline_threads, small_rings, wait_until
from helpers.pipelines import LAYER, X, open_pipeline

from pipeline import Pipeline
from pipeline.errors import PipelineError


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_stream_keeps_sizes_and_order(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch)
    sizes = np.random.default_rng(3).integers(0, 60, 40).tolist()
    x = random_rows(sum(sizes), 12)
    edges = np.cumsum([0, *sizes])
    with nothing_left_behind(), open_pipeline(devices=device) as pipeline:
        results = list(pipeline.stream(x[a:b] for a, b in pairwise(edges)))
    assert [len(result) for result in results] == sizes
    assert_same_bits(np.concatenate(results), LAYER(x))


def test_stream_of_tensors_gives_tensors_of_the_out_dtype() -> None:
    with open_pipeline(out_dtype="bfloat16") as pipeline:
        results = list(pipeline.stream(torch.from_numpy(X).split(30)))
    assert all(result.dtype == torch.bfloat16 for result in results)
    assert_same_bits(torch.cat(results), LAYER(X, out=torch.empty(200, 7, dtype=torch.bfloat16)))


def test_stream_results_come_as_soon_as_their_batch_is_done() -> None:
    """A consumer that asks for the first result while the source waits for it: no deadlock."""
    answered: list[int] = []

    def batches() -> Iterator[Any]:
        for number in range(5):
            assert wait_until(lambda number=number: len(answered) >= number)
            yield X[:10]

    with open_pipeline() as pipeline:
        for result in pipeline.stream(batches()):
            assert_same_bits(result, LAYER(X[:10]))
            answered.append(1)
    assert len(answered) == 5


def test_stream_error_comes_after_the_results_before_it() -> None:
    def batches() -> Iterator[Any]:
        for _ in range(6):
            yield X
        raise PlannedError

    got = 0
    with nothing_left_behind(), open_pipeline() as pipeline:
        with pytest.raises(PlannedError):
            for result in pipeline.stream(batches()):
                assert_same_bits(result, LAYER(X))
                got += 1
        assert got == 6
        assert_same_bits(pipeline.run(X).out, LAYER(X))


@pytest.mark.parametrize("source", [X, torch.from_numpy(X), "x.npy", 5])
def test_stream_takes_batches_only(source: Any, tmp_path: Path) -> None:
    if isinstance(source, str):
        np.save(tmp_path / "x.npy", X)
        source = tmp_path / "x.npy"
    with nothing_left_behind(), open_pipeline() as pipeline:
        with pytest.raises(PipelineError, match=r"use run\(\) for it|expected a NumPy array"):
            next(pipeline.stream(source))
        assert_same_bits(pipeline.run(X).out, LAYER(X))


def test_stream_of_nothing_ends_at_once() -> None:
    with open_pipeline() as pipeline:
        assert list(pipeline.stream([])) == []
        assert [len(result) for result in pipeline.stream([X[:0], X[:0]])] == [0, 0]


def test_stream_consumer_that_raises_ends_it() -> None:
    with nothing_left_behind(), open_pipeline() as pipeline:
        with pytest.raises(PlannedError):
            for _ in pipeline.stream(X for _ in range(100)):
                raise PlannedError
        assert_same_bits(pipeline.run(X).out, LAYER(X))


def test_stream_left_open_is_ended_by_close() -> None:
    """`close` frees the buffers, so the run that uses them ends first; the iterator then says why it is over."""
    with nothing_left_behind():
        with open_pipeline() as pipeline:
            results = pipeline.stream(X for _ in range(10**9))
            assert_same_bits(next(results), LAYER(X))
        assert pipeline_threads() == []
        with pytest.raises(PipelineError, match="closed while this stream was open"):
            for result in results:
                assert_same_bits(result, LAYER(X))


def test_stream_left_open_lets_the_interpreter_exit() -> None:
    code = """
        import numpy as np
        from pipeline import FusedLinear, Pipeline
        pipeline = Pipeline(FusedLinear(np.ones((3, 4), np.float32)), devices="cpu", chunk_rows=16)
        def batches():
            while True:
                yield np.ones((40, 4), np.float32)
        results = pipeline.stream(batches())
        print(next(results).shape)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "(40, 3)" and done.stderr == ""


def test_memory_of_a_stream_is_bounded_by_what_is_read_ahead() -> None:
    """100 MB through a pipeline of 0.5 MB chunks: the peak stays far below the dataset."""
    layer, x = random_layer(256, 256), random_rows(512, 256)
    process = psutil.Process()
    with Pipeline(layer, devices="cpu", chunk_rows=512, num_streams=2) as pipeline:
        list(pipeline.stream([x] * 10))
        before, peak = process.memory_info().rss, 0
        for result in pipeline.stream(x + 0 for _ in range(200)):
            peak = max(peak, process.memory_info().rss)
            assert len(result) == 512
    assert peak - before < 30e6
