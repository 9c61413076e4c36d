"""Operations of a GPU and their times on the host's clock, without a GPU."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.devices import cuda_events
from pipeline.devices.cuda_events import ClockAnchor, CudaOperation, EventPool


class FakeEvents:
    """Events that fire when the test says so, in place of the pool's. Each has the name of its stream."""

    def __init__(self) -> None:
        self.anchor = ClockAnchor("anchor", 100.0)
        self.fired: dict[str, float] = {}  # seconds on the host's clock
        self.released: list[str] = []

    def record(self, stream: str) -> str:
        return stream

    def elapsed_s(self, anchor: str, event: str) -> float:
        assert anchor == self.anchor.event
        return self.fired[event] - self.anchor.host_s

    def release(self, event: str) -> None:
        self.released.append(event)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> FakeEvents:
    events = FakeEvents()
    api = SimpleNamespace(
        cuEventQuery=lambda event: (0 if event in events.fired else 600,),
        CUresult=SimpleNamespace(CUDA_ERROR_NOT_READY=600),
    )
    monkeypatch.setattr(cuda_events, "driver", lambda: api)
    return events


def test_cuda_operation_starts_when_it_is_queued_or_when_the_last_before_it_ends(events: FakeEvents) -> None:
    first = CudaOperation(events, "first", "H2D copy", 101.0, [])  # type: ignore[arg-type]
    second = CudaOperation(events, "second", "H2D copy", 101.5, [first])  # type: ignore[arg-type]
    kernel = CudaOperation(events, "kernel", "kernel", 101.6, [second])  # type: ignore[arg-type]
    late = CudaOperation(events, "late", "D2H copy", 107.0, [kernel, first])  # type: ignore[arg-type]
    assert not any(operation.done() for operation in (first, second, kernel, late))
    events.fired = {"first": 103.0, "second": 105.0, "kernel": 106.0, "late": 108.0}
    assert late.done() and late.times() == (107.0, 108.0), "the bus stood still until it was queued"
    assert kernel.times() == (105.0, 106.0), "asked on the way"
    assert second.times() == (103.0, 105.0) and first.times() == (101.0, 103.0)
    assert sorted(events.released) == ["first", "kernel", "late", "second"]
    assert not late._before, "what came before isn't kept"
    assert events.anchor.needed_by == 0


def test_cuda_operation_holds_other_streams_until_it_is_seen_to_be_done(
    events: FakeEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[Any] = []
    monkeypatch.setattr(cuda_events, "call", lambda *arguments: waits.append(arguments))
    upload = CudaOperation(events, "H2D", "H2D copy", 101.0, [])  # type: ignore[arg-type]
    upload.hold("H2D")
    assert waits == [], "a stream keeps its order by itself"
    upload.hold("kernels")
    events.fired["H2D"] = 102.0
    upload.hold("kernels")
    assert waits == 2 * [("cuStreamWaitEvent", "kernels", "H2D", 0)]
    assert upload.done()
    upload.hold("kernels")
    assert len(waits) == 2, "its event may belong to another operation by now"


def test_cuda_times_follow_the_hosts_clock_from_which_the_gpus_drifts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU whose clock is slow by 100 ppm, ten minutes of copies one after the other, and one that takes long."""
    clock, events = SimpleNamespace(now_s=0.0), itertools.count()
    fired: dict[int, float] = {}  # on the GPU's clock

    def record(event: int, stream: object) -> tuple[int]:
        fired[event] = clock.now_s * (1 - 1e-4)
        return (0,)

    def call(name: str, *arguments: Any) -> Any:
        if name == "cuEventCreate":
            return next(events)
        if name == "cuEventElapsedTime":
            start, end = arguments
            return float(np.float32((fired[end] - fired[start]) * 1e3))
        assert name == "cuEventSynchronize"
        clock.now_s += 5e-6

    api = SimpleNamespace(
        cuEventRecord=record, cuEventQuery=lambda event: (0,), CUresult=SimpleNamespace(CUDA_ERROR_NOT_READY=600)
    )
    monkeypatch.setattr(cuda_events, "driver", lambda: api)
    monkeypatch.setattr(cuda_events, "call", call)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now_s)
    pool = EventPool("stream")
    slow_start_s = clock.now_s
    slow = CudaOperation(pool, "stream", "kernel", slow_start_s, [])
    while clock.now_s < 600:
        pool.renew_anchor()
        queued_s = clock.now_s
        clock.now_s += 0.01
        copy = CudaOperation(pool, "stream", "H2D copy", queued_s, [])
        assert copy.done() and copy.times() == pytest.approx((queued_s, clock.now_s), abs=50e-6)
    record(slow._end, "stream")
    assert slow.done() and slow.times()[1] == pytest.approx(clock.now_s, rel=2e-4), "its anchor is still there"
    assert next(events) < 20, "events are used again"


def test_cuda_operation_never_ends_before_it_starts(events: FakeEvents) -> None:
    operation = CudaOperation(events, "event", "kernel", 104.0, [])  # type: ignore[arg-type]
    events.fired["event"] = 103.99  # the two clocks differ by some microseconds
    assert operation.done() and operation.times() == (103.99, 103.99)
