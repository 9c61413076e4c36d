"""What a run reports: rates, each stage's use and waiting, the share of the measured ceiling, the bound, and advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.instrument import STAGES, Ceilings, Recorder
from pipeline.report.timeline import DeviceUse, causes_text

_AT_CEILING = 0.9  # of the measured ceiling: the hardware is used up
_MOSTLY_BUSY = 0.75


@dataclass(frozen=True)
class StageStats:
    """One stage over all devices of a run. `busy_s` counts overlapping operations of a device once.

    `rate` is GB/s over the whole run, for the kernel TFLOP/s; `ceiling` is the same of the measured ceilings of all
    devices together, None where a device has none. `waiting_for` gives the shares of the waiting time by cause (fill,
    bus, kernel, drain, host), from the operations that were kept.
    """

    count: int
    bytes: int
    busy_s: float
    busy_share: float  # of the run's seconds, averaged over the devices
    waiting_s: float = 0.0
    waiting_for: dict[str, float] = field(default_factory=dict)
    rate: float = 0.0
    ceiling: float | None = None
    ceiling_share: float | None = None


@dataclass(frozen=True)
class Ends:
    """Where a run's rows come from and go to, as far as ceilings and advice depend on it."""

    source: str = "memory"  # or "file", "batches", "device"
    target: str = "memory"  # or "fresh memory", "file", "device"


@dataclass(frozen=True)
class Stats:
    """The figures of one run. Seconds are wall time, GB/s are 1e9 bytes a second."""

    rows: int
    seconds: float  # until the result is complete
    finish_s: float  # of these, after the last row was stored: a file is synced and gets its name
    rows_per_s: float
    bytes_in: int
    bytes_out: int
    gb_per_s_in: float
    gb_per_s_out: float
    tflops: float
    stages: dict[str, StageStats]
    bound: str  # the stage nearest to its limit, or "disk" (see `bound`); "none" for an empty run
    advice: str  # one sentence: what would make the run faster; "" for an empty run
    ceilings: dict[str, Ceilings]  # of the devices that have measured ones
    kernel_hidden_share: float | None  # of the kernels' time, spent while a copy ran as well
    copy_hidden_share: float | None  # of the time of copies in either direction, spent while a kernel ran as well
    devices: dict[str, str]  # name: hardware
    kernel: str
    precision: str  # that was asked for
    runs_as: str  # that ran
    exact_rows: int  # of "fp32": rows whose range asked for exact fp32 ("ieee")
    wire: str  # the element type that crossed the bus on the way in
    chunk_rows: int
    num_streams: int
    chunks: int
    copy_workers: str
    piece_bytes: int  # of the pinned ring in each direction, on the wire
    ring_pieces: int
    staging_origin: str  # where these two and the number of copy workers come from
    pinned_bytes: int
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The report as text: a summary, a table of the stages, the bound and what to do about it."""
        out = [
            f"{self.rows:,} rows in {self.seconds:.3f} s: {self.rows_per_s:,.0f} rows/s, "
            f"{self.gb_per_s_in:.2f} GB/s in, {self.gb_per_s_out:.2f} GB/s out",
            f"on {', '.join(f'{name} ({hardware})' for name, hardware in self.devices.items())}",
            f"{self.kernel}; precision {self.precision}, ran as {self.runs_as}"
            + (f", {self.exact_rows:,} rows in exact fp32" if self.exact_rows else ""),
            f"chunks: {self.chunks} of up to {self.chunk_rows} rows; streams: {self.num_streams}; "
            f"{self.pinned_bytes / 2**20:.0f} MiB pinned",
            f"{self.copy_workers}; ring: {self.ring_pieces} pieces of {self.piece_bytes / 2**20:g} MiB each way; "
            f"{self.staging_origin}",
            *stage_table(self.stages),
        ]
        if self.finish_s > 0.01 * self.seconds:
            out.append(f"completing the result took {self.finish_s:.3f} s after its last row was stored")
        if self.bound != "none":
            out.append(self.bound_line())
            out.append(f"to go faster: {self.advice}")
        if self.kernel_hidden_share is not None:
            out.append(f"{self.kernel_hidden_share:.0%} of the kernels' time was hidden behind copies")
        return out

    def bound_line(self) -> str:
        """The bound, its use, and how near it came to its measured ceiling."""
        if self.bound == "disk":
            return (
                f"bound by disk: {self.finish_s / self.seconds:.0%} of the time went by after the last row was stored"
            )
        stage = self.stages[self.bound]
        text = f"bound by {self.bound}: busy {stage.busy_share:.0%} of the time"
        if stage.ceiling is not None and stage.ceiling_share is not None:
            origin = next((f" ({c.origin})" for c in self.ceilings.values() if c.origin), "")
            text += f", at {stage.ceiling_share:.0%} of its ceiling of {rate_text(self.bound, stage.ceiling)}{origin}"
        return text


def stage_table(stages: Mapping[str, StageStats]) -> list[str]:
    """The stages as lines of text."""
    out = [f"{'stage':<8}{'count':>8}{'GB':>9}{'busy s':>9}{'busy':>6}{'wait':>6}{'rate':>14}{'ceiling':>9}  waits for"]
    for name, stage in stages.items():
        share = stage.ceiling_share
        out.append(
            f"{name:<8}{stage.count:>8}{stage.bytes / 1e9:>9.2f}{stage.busy_s:>9.3f}"
            f"{stage.busy_share:>6.0%}{1 - stage.busy_share if stage.count else 0:>6.0%}"
            f"{rate_text(name, stage.rate):>14}"
            f"{'-' if share is None else f'{share:.0%}':>9}  {causes_text(stage.waiting_for)}"
        )
    return out


def rate_text(stage: str, rate: float) -> str:
    """A stage's rate with its unit."""
    return f"{rate:{'.1f' if rate >= 10 else '.2f'}} {'TFLOP/s' if stage == 'kernel' else 'GB/s'}"


def stage_stats(
    recorders: Sequence[Recorder],
    seconds: float,
    uses: Sequence[DeviceUse] = (),
    ceilings: Mapping[str, Ceilings] | None = None,
    flop: float = 0.0,
) -> dict[str, StageStats]:
    """Totals of each stage over the devices' records of a run of `seconds`, whose kernels did `flop` operations."""
    stages = {}
    known = [(ceilings or {}).get(recorder.device) for recorder in recorders]
    for name in STAGES:
        totals = [recorder.totals[name] for recorder in recorders]
        count, n_bytes = sum(total.count for total in totals), sum(total.bytes for total in totals)
        busy_s = sum(total.busy_s for total in totals)
        available_s = seconds * len(recorders)
        each = [None if found is None else found.of(name) for found in known]
        ceiling = sum(value for value in each if value is not None) if each and None not in each else None
        rate = (flop / 1e12 if name == "kernel" else n_bytes / 1e9) / seconds if seconds > 0 else 0.0
        stages[name] = StageStats(
            count,
            n_bytes,
            busy_s,
            busy_share=busy_s / available_s if available_s > 0 else 0.0,
            waiting_s=max(0.0, available_s - busy_s) if count else 0.0,
            waiting_for=_causes(uses, name) if count else {},
            rate=rate,
            ceiling=ceiling,
            ceiling_share=rate / ceiling if ceiling and count else None,
        )
    return stages


def _causes(uses: Sequence[DeviceUse], stage: str) -> dict[str, float]:
    waiting_s = sum(use.lanes[stage].waiting_s for use in uses)
    causes: dict[str, float] = {}
    for use in uses:
        for cause, seconds in use.lanes[stage].waiting_for.items():
            causes[cause] = causes.get(cause, 0.0) + seconds / waiting_s
    return causes


def nearness(stage: StageStats) -> float:
    """How near a stage came to its limit: the share of the time that it was busy or, where that is more, of its
    measured ceiling. Fills and drains share the copy workers, whose ceiling is for both at once: they can be the limit
    while each is busy half of the time."""
    return max(stage.busy_share, stage.ceiling_share or 0.0)


def bound(stages: Mapping[str, StageStats], finish_share: float = 0.0) -> str:
    """The stage nearest to its limit; "disk" where completing the result took more of the time than any was busy."""
    nearest = max(stages, key=lambda name: nearness(stages[name]))
    if not stages[nearest].count:
        return "none"
    return "disk" if finish_share > nearness(stages[nearest]) else nearest


_MORE_WORKERS = "more copy workers where cores are idle"
_FILL_ADVICE = {
    "memory": f"copying from the source is the limit: pinned memory as the source (pipeline.pin), or {_MORE_WORKERS}",
    "file": f"reading the file is the limit: a faster disk, more memory to cache it, or {_MORE_WORKERS}",
    "batches": "gathering batches is the limit: larger batches, a source that makes them sooner, or an array or a file",
}
_DRAIN_ADVICE = {
    "memory": f"storing the result is the limit: pinned memory as the output (pipeline.pin), or {_MORE_WORKERS}",
    "fresh memory": "storing the result in fresh memory is the limit: pass an `out` that was written before",
    "file": f"writing the file is the limit: a faster disk, or {_MORE_WORKERS}",
}


def advice(
    stages: Mapping[str, StageStats],
    runs_as: str,
    on_cpu: bool,
    ends: Ends = Ends(),
    finish_share: float = 0.0,
) -> str:
    """One sentence: what would make a run with these stages faster."""
    name = bound(stages, finish_share)
    if name == "none":
        return ""
    if name == "disk":
        return "the disk still wrote when all rows were stored: a faster disk, or a narrower out_dtype"
    stage = stages[name]
    if nearness(stage) < _MOSTLY_BUSY:
        return (
            f"no stage is busy most of the time ({name} is for {stage.busy_share:.0%}): give more rows, larger "
            f"chunk_rows or more num_streams, or a source that delivers sooner"
        )
    if on_cpu and name in ("H2D", "kernel", "D2H"):
        return "the CPU computes and copies: a GPU, or more cores"
    if name in ("H2D", "D2H"):
        if stage.ceiling_share is not None and stage.ceiling_share < _AT_CEILING:
            return (
                f"the bus is busy but moves only {stage.ceiling_share:.0%} of what it can: look for other jobs on it, "
                f"try larger chunk_rows, and pinned memory at both ends"
            )
        fewer = "" if runs_as in ("bfloat16", "float16") else "data in bfloat16 or float16 (half the bytes), or "
        return f"the bus is used up: {fewer}another GPU with a bus of its own"
    if name == "kernel":
        lower = {"ieee": "precision='tf32' if its accuracy will do, or ", "tf32": "bfloat16 or float16 data, or "}
        return f"the GPU's arithmetic is used up: {lower.get(runs_as, '')}another GPU"
    return _FILL_ADVICE[ends.source] if name == "fill" else _DRAIN_ADVICE[ends.target]


def comparable(found: Ceilings, ends: Ends) -> Ceilings:
    """The ceilings that a run between these ends can be compared with: those of fills and drains are of memory."""
    return replace(
        found,
        fill_gb_per_s=None if ends.source == "file" else found.fill_gb_per_s,
        drain_gb_per_s=None if ends.target == "file" else found.drain_gb_per_s,
    )


def ceiling_rows_per_s(
    ceilings: Mapping[str, Ceilings], devices: Sequence[str], in_row_bytes: int, out_row_bytes: int, row_flop: int
) -> float | None:
    """Rows a second that the buses and kernels of all `devices` allow; None where one has no measured bus."""
    total = 0.0
    for device in devices:
        found = ceilings.get(device)
        if found is None or found.h2d_gb_per_s is None or found.d2h_gb_per_s is None:
            return None
        limits = [found.h2d_gb_per_s * 1e9 / in_row_bytes, found.d2h_gb_per_s * 1e9 / out_row_bytes]
        if found.kernel_tflops is not None:
            limits.append(found.kernel_tflops * 1e12 / row_flop)
        total += min(limits)
    return total or None


def mean_share(shares: Sequence[float | None]) -> float | None:
    """The mean over the devices that have one."""
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None
