"""A run's timeline: what each lane of each device did and when, how far lanes hid behind each other, and what a lane
that stood still was waiting for. Made from the event record or from an Nsight Systems report, read the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.instrument import STAGES, Interval, Recorder, StageTotals

Array = npt.NDArray[Any]

# What a lane waits for, by the lane that is at work meanwhile. With none at work, it is the host's own code.
CAUSES = {"fill": "fill", "H2D": "bus", "kernel": "kernel", "D2H": "bus", "drain": "drain"}
HOST = "host"


@dataclass(frozen=True)
class Timeline:
    """The operations of each device, in seconds from the run's start, ordered by start within a stage.

    `origin` says what they were read from, `hardware` what the devices are. `dropped` operations were recorded and not
    kept: the earliest ones. `unassigned` counts copies and kernels on the GPU outside every range of the pipeline.
    """

    devices: dict[str, list[Interval]]
    origin: str = "event record"
    hardware: dict[str, str] = field(default_factory=dict)
    dropped: int = 0
    unassigned: int = 0


@dataclass(frozen=True)
class LaneUse:
    """One lane within a window. `busy_s` counts overlapping operations once; `waiting_for` splits `waiting_s` by cause
    (fill, bus, kernel, drain, host)."""

    count: int
    bytes: int
    busy_s: float
    busy_share: float
    waiting_s: float
    waiting_for: dict[str, float]
    longest_wait_s: float

    @property
    def waiting_shares(self) -> dict[str, float]:
        """`waiting_for` as shares of the waiting time."""
        return {cause: seconds / self.waiting_s for cause, seconds in self.waiting_for.items()}


@dataclass(frozen=True)
class DeviceUse:
    """What one device's lanes did between `start_s` and `end_s`.

    Shares are None where the stage in question was never busy.
    """

    start_s: float
    end_s: float
    lanes: dict[str, LaneUse]
    kernel_hidden_share: float | None  # the part of the kernels' time while a copy ran as well
    copy_hidden_share: float | None  # the part of the copies' time, either way, while a kernel ran as well

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def hidden_texts(self) -> list[str]:
        """The two shares in words, those that there are."""
        shares = (("kernel time", "copies", self.kernel_hidden_share), ("copy time", "kernels", self.copy_hidden_share))
        return [f"{what} hidden behind {behind}: {share:.1%}" for what, behind, share in shares if share is not None]


def from_recorders(recorders: Sequence[Recorder], start_s: float, hardware: dict[str, str] | None = None) -> Timeline:
    """The timeline of a run that started at `start_s` on the recorders' clock."""
    devices = {}
    for recorder in recorders:
        operations = [Interval(stage, c, t0 - start_s, t1 - start_s, n) for stage, c, t0, t1, n in recorder.intervals]
        devices[recorder.device] = sorted(operations, key=lambda i: i.start_s)
    return Timeline(devices, hardware=hardware or {}, dropped=sum(recorder.dropped for recorder in recorders))


def busy_s(operations: Sequence[Interval], stage: str) -> float:
    """Seconds in which a stage was at work, in all of the operations; those that overlap count once."""
    totals = StageTotals()
    for interval in sorted((i for i in operations if i.stage == stage), key=lambda i: i.start_s):
        totals.add(interval)
    return totals.busy_s


def steady_window(operations: Sequence[Interval]) -> tuple[float, float]:
    """From the first start of the last stage to the last end of the first stage: the lanes are full, rows still come.

    For runs in which that is less than a quarter of the time, from the first start to the last end.

    Raises:
        ValueError: no operations.
    """
    present = [stage for stage in STAGES if any(i.stage == stage for i in operations)]
    start = min(i.start_s for i in operations if i.stage == present[-1])
    end = max(i.end_s for i in operations if i.stage == present[0])
    whole = min(i.start_s for i in operations), max(i.end_s for i in operations)
    return (start, end) if end - start > 0.25 * (whole[1] - whole[0]) else whole


def device_use(operations: Sequence[Interval], window: tuple[float, float] | None = None) -> DeviceUse:
    """How the lanes were used within `window` (default: the steady one).

    While a lane stands still, each moment is put down to the lane that is at work then; where several are, to the one
    that is busiest over the window: that one holds up the others. Where none is, to the host.
    """
    if window is None:
        window = steady_window(operations) if operations else (0.0, 0.0)
    mine: dict[str, list[Interval]] = {stage: [] for stage in STAGES}
    for interval in operations:
        if interval.end_s > window[0] and interval.start_s < window[1]:
            mine[interval.stage].append(interval)
    # The window is cut wherever an operation starts or ends: within a moment, lanes are either at work or not.
    starts = {stage: np.clip([i.start_s for i in each], *window) for stage, each in mine.items()}
    ends = {stage: np.clip([i.end_s for i in each], *window) for stage, each in mine.items()}
    cuts = np.sort(np.concatenate([window, *starts.values(), *ends.values()]))
    cuts = cuts[np.append(True, cuts[1:] != cuts[:-1])]  # np.unique does this, and imports numpy.ma, which takes longer
    seconds = np.diff(cuts)
    at_work = {stage: _covered(cuts, starts[stage], ends[stage]) for stage in STAGES}
    busy = {stage: float(seconds[at_work[stage]].sum()) for stage in STAGES}
    by_use = sorted(STAGES, key=lambda stage: -busy[stage])
    whole_s = window[1] - window[0]
    lanes = {}
    for stage in STAGES:
        still = ~at_work[stage]
        begins, stops = np.flatnonzero(np.diff(still, prepend=False, append=False)).reshape(-1, 2).T
        lanes[stage] = LaneUse(
            count=len(mine[stage]),
            bytes=round(sum(_bytes_inside(i, window) for i in mine[stage])),
            busy_s=busy[stage],
            busy_share=busy[stage] / whole_s if whole_s > 0 else 0.0,
            waiting_s=float(seconds[still].sum()),
            waiting_for=_causes(seconds, still, [(other, at_work[other]) for other in by_use if other != stage]),
            longest_wait_s=float((cuts[stops] - cuts[begins]).max(initial=0.0)),
        )
    copies, kernels = at_work["H2D"] | at_work["D2H"], at_work["kernel"]
    return DeviceUse(*window, lanes, _hidden(seconds, kernels, copies), _hidden(seconds, copies, kernels))


def _covered(cuts: Array, starts: Array, ends: Array) -> Array:
    """Which of the moments between cuts lie within a span."""
    change = np.zeros(len(cuts), int)
    np.add.at(change, np.searchsorted(cuts, starts), 1)
    np.add.at(change, np.searchsorted(cuts, ends), -1)
    return change.cumsum()[:-1] > 0


def _bytes_inside(interval: Interval, window: tuple[float, float]) -> float:
    """The bytes of an operation that belong to the part of it inside the window."""
    start_s, end_s = interval.start_s, interval.end_s
    if window[0] <= start_s and end_s <= window[1]:
        return interval.bytes
    return interval.bytes * (min(end_s, window[1]) - max(start_s, window[0])) / (end_s - start_s)


def _causes(seconds: Array, still: Array, others: Sequence[tuple[str, Array]]) -> dict[str, float]:
    causes: dict[str, float] = {}
    for stage, at_work in others:
        waited_s = float(seconds[still & at_work].sum())
        if waited_s > 0:
            causes[CAUSES[stage]] = causes.get(CAUSES[stage], 0.0) + waited_s
        still = still & ~at_work
    left_s = float(seconds[still].sum())
    return {**causes, HOST: left_s} if left_s > 0 else causes


def _hidden(seconds: Array, busy: Array, behind: Array) -> float | None:
    busy_s = seconds[busy].sum()
    return float(seconds[busy & behind].sum() / busy_s) if busy_s > 0 else None


def lanes_of(operations: Sequence[Interval], stage: str) -> list[list[Interval]]:
    """The stage's operations in as few rows as show them without overlap: copy workers work at the same time."""
    rows: list[list[Interval]] = []
    for interval in sorted((i for i in operations if i.stage == stage), key=lambda i: i.start_s):
        for row in rows:
            if row[-1].end_s <= interval.start_s + 1e-9:
                row.append(interval)
                break
        else:
            rows.append([interval])
    return rows


def use_lines(timeline: Timeline) -> list[str]:
    """The use of every device's lanes in its steady window, as text."""
    out = []
    for name, operations in timeline.devices.items():
        about = f" ({timeline.hardware[name]})" if name in timeline.hardware else ""
        if not operations:
            out.append(f"{name}{about}: no operations in the {timeline.origin}")
            continue
        use = device_use(operations)
        chunks = len({i.chunk for i in operations})
        out.append(
            f"{name}{about}: {chunks:,} chunks; steady window of {(use.end_s - use.start_s) * 1e3:,.1f} ms, read from "
            f"the {timeline.origin}"
        )
        out.append(f"  {'lane':<8}{'count':>8}{'busy ms':>11}{'busy':>8}{'waiting':>9}{'longest':>10}  waiting for")
        for stage, lane in use.lanes.items():
            if lane.count:
                out.append(
                    f"  {stage:<8}{lane.count:>8,}{lane.busy_s * 1e3:>11,.1f}{lane.busy_share:>8.1%}"
                    f"{1 - lane.busy_share:>9.1%}{lane.longest_wait_s * 1e3:>7.2f} ms  "
                    f"{causes_text(lane.waiting_shares)}"
                )
        out += [f"  {text}" for text in use.hidden_texts()]
    if timeline.unassigned:
        out.append(f"{timeline.unassigned:,} copies and kernels lie outside the pipeline's ranges and are left out")
    if timeline.dropped:
        out.append(f"the earliest {timeline.dropped:,} operations were not kept")
    return out


def causes_text(shares: Mapping[str, float]) -> str:
    """`bus 61%, host 39%`: what a lane waited for, by shares of its waiting time; a dash where it didn't wait."""
    by_size = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{cause} {share:.0%}" for cause, share in by_size if share >= 0.005) or "-"
