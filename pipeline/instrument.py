"""What happened and when: NVTX ranges for profilers, and the event record that every report is made from."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import nvtx

STAGES = ("fill", "H2D", "kernel", "D2H", "drain")
RUN = "run"  # the range around a whole run on one device; its payload is the run's number in the process

# One colour a stage wherever it is drawn, apart for colour-blind readers too (Okabe and Ito's set).
STAGE_COLORS = {"fill": 0xE69F00, "H2D": 0x56B4E9, "kernel": 0x009E73, "D2H": 0x0072B2, "drain": 0xD55E00}
_COLORS = {**STAGE_COLORS, RUN: 0x999999}


class Ranges:
    """NVTX ranges in the domain "pipeline": one an operation, named after its stage, the chunk's number as payload.

    Without a profiler attached `nvtx` hands out a dummy domain and every range is one shared object that does
    nothing.
    """

    def __init__(self) -> None:
        self._domain: Any = nvtx.get_domain("pipeline")
        self.active = type(self._domain).__name__ != "DummyDomain"

    def __call__(self, stage: str, chunk: int) -> _Range | _NoRange:
        if not self.active:
            return _NO_RANGE
        return _Range(self._domain, self._attributes(stage, chunk))

    def begin(self, stage: str, chunk: int) -> Any:
        """Start a range that may end elsewhere, for work that other threads do: `end` takes what this gives back."""
        return self._domain.start_range(self._attributes(stage, chunk)) if self.active else None

    def end(self, begun: Any) -> None:
        if self.active:
            self._domain.end_range(begun)

    def _attributes(self, stage: str, chunk: int) -> Any:
        return self._domain.get_event_attributes(message=stage, color=_COLORS[stage], category=stage, payload=chunk)


class _Range:
    def __init__(self, domain: Any, attributes: Any) -> None:
        self._domain, self._attributes = domain, attributes

    def __enter__(self) -> None:
        self._domain.push_range(self._attributes)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._domain.pop_range()


class _NoRange:
    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass


_NO_RANGE = _NoRange()


class Interval(NamedTuple):  # made faster than a frozen dataclass
    """One operation: seconds on the run's clock, bytes moved (0 for kernels)."""

    stage: str
    chunk: int
    start_s: float
    end_s: float
    bytes: int


@dataclass(slots=True)
class StageTotals:
    """Running totals of one stage on one device. `busy_s` counts overlapping operations once."""

    count: int = 0
    bytes: int = 0
    busy_s: float = 0.0
    _busy_until_s: float = float("-inf")

    def add(self, interval: Interval) -> None:
        self.count += 1
        self.bytes += interval.bytes
        if interval.end_s > self._busy_until_s:
            self.busy_s += interval.end_s - max(interval.start_s, self._busy_until_s)
            self._busy_until_s = interval.end_s


KEPT = 2_000  # operations of a device that every run keeps: making its report takes time for each
KEPT_FOR_TRACE = 200_000


class Recorder:
    """The event record of one device in one run. `first_s` is when its first operation began, infinity without any.

    Totals cover the whole run; single operations are kept for the latest `keep` of them, so that memory stays flat
    however long a run is. Only the thread that runs the device's executor adds to it, each stage's operations in the
    order in which they started.
    """

    def __init__(self, device: str, keep: int = KEPT) -> None:
        self.device = device
        self.totals = {stage: StageTotals() for stage in STAGES}
        self.intervals: deque[Interval] = deque(maxlen=keep)
        self.first_s = float("inf")

    def add(self, stage: str, chunk: int, start_s: float, end_s: float, n_bytes: int = 0) -> None:
        interval = Interval(stage, chunk, start_s, end_s, n_bytes)
        self.totals[stage].add(interval)
        self.intervals.append(interval)
        if start_s < self.first_s:
            self.first_s = start_s

    @property
    def dropped(self) -> int:
        """Operations that were recorded and aren't kept any more."""
        return sum(total.count for total in self.totals.values()) - len(self.intervals)


@dataclass(frozen=True)
class Ceilings:
    """The most that one device and its host reach, as measured; None where nothing was measured, or nothing moved.

    GB/s are 1e9 bytes a second. H2D and D2H are each direction's rate while the other one moves its bytes of the same
    rows (`bus_rates`); fill and drain are the copy workers' rates while they do both for the same rows (`host_rates`).
    `origin` says when and how they were measured.
    """

    h2d_gb_per_s: float | None = None
    d2h_gb_per_s: float | None = None
    fill_gb_per_s: float | None = None
    drain_gb_per_s: float | None = None
    kernel_tflops: float | None = None
    origin: str = ""

    def of(self, stage: str) -> float | None:
        """The stage's ceiling: GB/s, TFLOP/s for the kernel."""
        return {
            "fill": self.fill_gb_per_s,
            "H2D": self.h2d_gb_per_s,
            "kernel": self.kernel_tflops,
            "D2H": self.d2h_gb_per_s,
            "drain": self.drain_gb_per_s,
        }[stage]


def bus_rates(
    in_bytes: float, out_bytes: float, h2d_gb_per_s: float, d2h_gb_per_s: float, duplex_gb_per_s: float
) -> tuple[float, float]:
    """GB/s of each direction of a bus that moves `in_bytes` one way for every `out_bytes` the other way.

    A direction runs at the duplex rate while the other one is busy too, and alone at its own rate for the rest. One
    that moves nothing has its own rate.
    """
    if not in_bytes or not out_bytes:
        return h2d_gb_per_s, d2h_gb_per_s
    both = min(in_bytes, out_bytes)
    h2d_s = both / duplex_gb_per_s + (in_bytes - both) / h2d_gb_per_s
    d2h_s = both / duplex_gb_per_s + (out_bytes - both) / d2h_gb_per_s
    return in_bytes / h2d_s, out_bytes / d2h_s


def host_rates(fill_bytes: float, drain_bytes: float, host_gb_per_s: float) -> tuple[float, float]:
    """GB/s of fills and of drains by copy workers that fill `fill_bytes` for every `drain_bytes` that they drain.

    They reach `host_gb_per_s` of either while they do as much of both. A byte takes them as long one way as the other.
    """
    together, bytes_moved = 2 * host_gb_per_s, fill_bytes + drain_bytes
    if not bytes_moved:
        return host_gb_per_s, host_gb_per_s
    return together * fill_bytes / bytes_moved, together * drain_bytes / bytes_moved
