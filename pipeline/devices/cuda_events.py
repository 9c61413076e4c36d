"""Events of a GPU and the operations that end with one, with times on the host's clock."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from pipeline.errors import DeviceError
from pipeline.kernels.driver import call, call_error, driver

# NOTE: times mix two clocks, starts of the host's and ends of the GPU's, which drift apart: by some microseconds after
# this long (docs/notes/devices.md).
_ANCHOR_AGE_S = 0.25


class ClockAnchor:
    """A moment on both clocks: an event, and when it was on the host's. It is `needed_by` so many operations."""

    __slots__ = ("event", "host_s", "needed_by")

    def __init__(self, event: Any, host_s: float) -> None:
        self.event, self.host_s = event, host_s
        self.needed_by = 0


class EventPool:
    """Timing events, reused; and the anchor that ties their times to the host's clock."""

    def __init__(self, stream: Any) -> None:
        self._free: deque[Any] = deque()
        self._all: list[Any] = []
        self._stream = stream
        self._record = driver().cuEventRecord
        self.anchor = self._new_anchor()
        self._old_anchors: list[ClockAnchor] = []

    def _create(self) -> Any:
        event = call("cuEventCreate", 0)
        self._all.append(event)
        return event

    def _new_anchor(self) -> ClockAnchor:
        """The best of some moments: the one that two readings of the host's clock enclose most closely."""
        best: ClockAnchor | None = None
        best_s = float("inf")
        for _ in range(3):
            before_s = time.perf_counter()
            event = self.record(self._stream)
            call("cuEventSynchronize", event)
            after_s = time.perf_counter()
            unused = event
            if after_s - before_s < best_s:
                unused = None if best is None else best.event
                best, best_s = ClockAnchor(event, (before_s + after_s) / 2), after_s - before_s
            if unused is not None:
                self.release(unused)
        assert best is not None
        return best

    def record(self, stream: Any) -> Any:
        event = self._free.popleft() if self._free else self._create()
        (code,) = self._record(event, stream)
        if code != 0:
            raise call_error("cuEventRecord", code)
        return event

    def release(self, event: Any) -> None:
        self._free.append(event)

    def renew_anchor(self) -> None:
        """Take a new anchor where this one has aged: the two clocks drift apart, and events are far from it."""
        if time.perf_counter() - self.anchor.host_s < _ANCHOR_AGE_S:
            return
        self._old_anchors.append(self.anchor)
        self.anchor = self._new_anchor()
        for anchor in [anchor for anchor in self._old_anchors if not anchor.needed_by]:
            self._old_anchors.remove(anchor)
            self.release(anchor.event)

    def elapsed_s(self, start: Any, end: Any) -> float:
        return float(call("cuEventElapsedTime", start, end)) * 1e-3

    def close(self) -> None:
        for event in self._all:
            driver().cuEventDestroy(event)
        self._all.clear()
        self._free.clear()


class CudaOperation:
    """Work on a stream, up to an event behind it. `what` goes into error messages.

    It started when it was queued, or when the last of `before` ended: what its slot and its engine did before it.
    NOTE: an event before the work would tell as much, and cost the executor's loop more (docs/notes/devices.md).
    """

    __slots__ = ("_anchor", "_before", "_end", "_pool", "_queued_s", "_stream", "_times", "_what")

    def __init__(self, pool: EventPool, stream: Any, what: str, queued_s: float, before: list[CudaOperation]) -> None:
        self._pool, self._stream, self._what, self._queued_s, self._before = pool, stream, what, queued_s, before
        self._end = pool.record(stream)
        self._anchor = pool.anchor
        self._anchor.needed_by += 1
        self._times: tuple[float, float] | None = None

    def done(self) -> bool:
        if self._times is not None:
            return True
        api = driver()
        (code,) = api.cuEventQuery(self._end)
        if code == api.CUresult.CUDA_ERROR_NOT_READY:
            return False
        if code != 0:
            raise call_error(self._what, code)
        end_s = self._anchor.host_s + self._pool.elapsed_s(self._anchor.event, self._end)
        starts = [self._queued_s] + [before.times()[1] for before in self._before if before.done()]
        self._set_times(min(max(starts), end_s), end_s)
        return True

    def _set_times(self, start_s: float, end_s: float) -> None:
        """It is done; give back what told it."""
        self._times = start_s, end_s
        self._pool.release(self._end)
        self._anchor.needed_by -= 1
        self._before = []

    def hold(self, stream: Any) -> None:
        """Let what is queued on `stream` from now on wait for this operation."""
        if self._times is None and stream is not self._stream:
            call("cuStreamWaitEvent", stream, self._end, 0)

    def times(self) -> tuple[float, float]:
        if self._times is None:
            raise DeviceError(f"{self._what} isn't done yet")
        return self._times


class PlainEvents:
    """Events without times, for streams to wait for each other and for code in C. They live as long as the device."""

    def __init__(self) -> None:
        self._all: list[Any] = []
        self._behind_kernels: dict[int, int] = {}  # by slot

    def new(self) -> int:
        self._all.append(call("cuEventCreate", driver().CUevent_flags.CU_EVENT_DISABLE_TIMING))
        return int(self._all[-1])

    def after_kernel(self, slot: int, stream: Any) -> int:
        """An event behind what the slot's stream holds, one for each slot."""
        if slot not in self._behind_kernels:
            self._behind_kernels[slot] = self.new()
        call("cuEventRecord", self._behind_kernels[slot], stream)
        return self._behind_kernels[slot]

    def close(self) -> None:
        for event in self._all:
            driver().cuEventDestroy(event)
        self._all.clear()
