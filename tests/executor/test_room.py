"""Chunks that wait until their sink has room for them."""

from __future__ import annotations

import random
import threading

import pytest
from helpers.data import assert_same_bits
from helpers.executor_rig import Memory, Rig, TroubledFeed, TroubledSink
from helpers.leaks import PlannedError
from helpers.schedules import check_pieces, check_rest

from pipeline.arrays import HostArray
from pipeline.executor import Executor
from pipeline.flow import Chunk
from pipeline.instrument import Recorder


class SlowSink(TroubledSink):
    """Has room for a chunk when it has been asked for it some times, and fails from chunk `bad` on."""

    def __init__(self, out: HostArray, seed: int, bad: int = 10**6) -> None:
        super().__init__(out)
        self._dice, self._bad, self._ready = random.Random(seed), bad, set[int]()

    def ready(self, chunk: Chunk) -> bool:
        if chunk.index >= self._bad:
            raise PlannedError
        if self._dice.random() < 0.2:
            self._ready.add(chunk.index)
        return chunk.index in self._ready

    def target(self, chunk: Chunk) -> Memory:
        assert chunk.index in self._ready
        return super().target(chunk)


@pytest.mark.parametrize("seed", range(8))
def test_executor_holds_a_chunk_until_the_sink_is_ready(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, seed=seed, num_streams=1 + seed % 3)
    sink = SlowSink(rig.out, seed)
    rig.run(sink=sink)
    assert sink.committed == 150
    assert_same_bits(rig.out, rig.expected)
    rig.check_rest()


@pytest.mark.parametrize("bad", [0, 3, 9])
def test_executor_finishes_the_chunks_in_flight_when_there_is_no_room(
    bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(monkeypatch)
    sink = SlowSink(rig.out, seed=bad, bad=bad)
    with pytest.raises(PlannedError) as caught:
        rig.run(sink=sink)
    assert caught.value.__notes__ == ["pipeline: in the sink"]
    assert sink.committed == 16 * bad
    assert_same_bits(rig.out[: 16 * bad], rig.expected[: 16 * bad])
    rig.check_rest()
    rig.check_next_run()


@pytest.mark.parametrize("kind", [None, KeyboardInterrupt])
def test_executor_that_is_ended_gives_up_the_chunk_that_waits(
    kind: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, stopping = Rig(monkeypatch), threading.Event()

    class FullSink(TroubledSink):
        def ready(self, chunk: Chunk) -> bool:
            if chunk.index == 4 and kind is not None:
                raise kind
            if chunk.index == 4:
                stopping.set()
            return chunk.index < 4

    sink = FullSink(rig.out)
    feed, recorder = TroubledFeed(rig.x, 16), Recorder("sim")
    executor = Executor(rig.device, rig.movers, 3, feed, sink, recorder, lambda chunk: None, stopping)
    if kind is None:
        executor.run()
        assert sink.committed == 64
        assert_same_bits(rig.out[:64], rig.expected[:64])
        check_rest(executor, rig.movers)
    else:
        with pytest.raises(kind):
            executor.run()
        check_pieces(rig.movers)
    rig.check_next_run()
