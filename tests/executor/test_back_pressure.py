"""How far a run reads ahead, and who waits for whom."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.data import assert_same_bits, random_rows
from helpers.executor_rig import Memory, Rig, TroubledFeed, TroubledSink, open_sim
from helpers.leaks import nothing_left_behind, small_rings, wait_until
from helpers.schedules import layer_of

from pipeline import Pipeline
from pipeline.arrays import HostArray
from pipeline.devices.sim import SimDevice
from pipeline.errors import DriverError
from pipeline.flow import Chunk


@pytest.mark.parametrize("seed", range(12))
def test_executor_never_reads_further_ahead_than_its_slots(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the sink is: rows taken from the source but not landed fit the slots, pieces fit the rings."""
    rig = Rig(monkeypatch, seed=seed, num_streams=1 + seed % 4, pieces=1 + seed % 3, copy_threads=1)
    feed, most = TroubledFeed(rig.x, 16), []
    landed = 0

    def count(chunk: Chunk) -> None:
        nonlocal landed
        landed += chunk.rows

    class CountingSink(TroubledSink):
        def target(self, chunk: Chunk) -> Memory:
            most.append(feed.taken - landed)
            return super().target(chunk)

    rig.run(feed, CountingSink(rig.out), count)
    assert_same_bits(rig.out, rig.expected)
    assert max(most) <= rig.num_streams * 16
    assert rig.movers.pinned_bytes == rig.pieces * (384 + 384), "pieces of 5 * 17 and 9 * 9 floats, in whole lines"


def test_pipeline_reads_an_iterable_only_as_far_ahead_as_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is chunk buffers (streams + 1), slots and the batch in the reader's hands, however long the source."""
    small_rings(monkeypatch)
    layer, x = layer_of(17, 9), random_rows(16, 17)
    pulled = done = 0
    most = []

    def endless() -> Iterator[HostArray]:
        nonlocal pulled
        for _ in range(200):
            most.append(pulled - done)
            pulled += 1
            yield x

    def slow(progress: Any) -> None:
        nonlocal done
        done = progress.rows_done // 16
        time.sleep(0.001)

    with Pipeline(layer, devices="cpu", chunk_rows=16, num_streams=3) as pipeline:
        pipeline.run(endless(), progress=slow)
        assert sum(buffer.nbytes for buffer in pipeline.fleet.gather_buffers) == 4 * x.nbytes
    assert done == 200 and max(most) <= 4 + 3 + 1


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_stream_slow_consumer_holds_the_source_back(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch)
    layer, x = layer_of(17, 9), random_rows(16, 17)
    pulled, most = 0, 0

    def batches() -> Iterator[HostArray]:
        nonlocal pulled
        for _ in range(100):
            pulled += 1
            yield x

    with Pipeline(layer, devices=device, chunk_rows=16, num_streams=2) as pipeline:
        for number, result in enumerate(pipeline.stream(batches())):
            if number % 10 == 0:
                time.sleep(0.01)
            most = max(most, pulled - number)
            assert_same_bits(result, layer(x))
    assert pulled == 100
    assert most <= 2 * 2 + 2, "at most `limit` batches, the consumer's and the reader's"


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_stream_abandoned_iterator_ends_its_threads(device: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rings(monkeypatch)
    layer, x = layer_of(17, 9), random_rows(100, 17)
    closed = threading.Event()

    def batches() -> Iterator[HostArray]:
        try:
            while True:
                yield x
        finally:
            closed.set()

    with nothing_left_behind():
        with Pipeline(layer, devices=device, chunk_rows=16) as pipeline:
            with nothing_left_behind(copy_workers=False):
                results = pipeline.stream(batches())
                for _ in range(after):
                    assert_same_bits(next(results), layer(x))
                results.close()
                gc.collect()
                assert closed.is_set() or after == 0, "the iterable is kept alive"
            assert_same_bits(pipeline.run(x).out, layer(x))


def test_stream_device_failure_comes_out_while_the_consumer_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader waits for room that will never come: the failure must end it at once, and be what is raised."""
    small_rings(monkeypatch)
    layer, x = layer_of(17, 9), random_rows(16, 17)
    open_sim(monkeypatch, SimDevice(fail={"kernel": 3}))
    with nothing_left_behind():
        with Pipeline(layer, devices="sim", chunk_rows=16, num_streams=2) as pipeline:
            results = pipeline.stream(x for _ in range(100))
            first = next(results)
            assert wait_until(lambda: not any(t.name == "pipeline-stream" for t in threading.enumerate()), 3.0)
            rest = []
            with pytest.raises(DriverError, match="kernel operation 3"):
                for result in results:
                    rest.append(result)  # noqa: PERF402
            for result in (first, *rest):
                assert_same_bits(result, layer(x))
            assert len(rest) <= 2
            assert_same_bits(pipeline.run(x).out, layer(x))
