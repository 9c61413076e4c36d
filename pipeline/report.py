"""What a run reports: rates, busy times by stage, the stage that bounds it, and how far copies hide kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.instrument import STAGES, Recorder


@dataclass(frozen=True)
class StageStats:
    """One stage over all devices of a run. `busy_s` counts overlapping operations of a device once."""

    count: int
    bytes: int
    busy_s: float
    busy_share: float  # of the run's seconds, averaged over the devices


@dataclass(frozen=True)
class Stats:
    """The figures of one run. Seconds are wall time, GB/s are 1e9 bytes a second."""

    rows: int
    seconds: float
    rows_per_s: float
    bytes_in: int
    bytes_out: int
    gb_per_s_in: float
    gb_per_s_out: float
    stages: dict[str, StageStats]
    bound: str  # the stage with the largest busy share; "none" for an empty run
    kernel_hidden_share: float | None  # of the kernels' time, spent while a copy ran as well
    copy_hidden_share: float | None  # of the H2D copies' time, spent while a kernel ran as well
    devices: dict[str, str]  # name: hardware
    kernel: str
    precision: str  # that was asked for
    runs_as: str  # that ran
    chunk_rows: int
    num_streams: int
    chunks: int
    copy_workers: str
    pinned_bytes: int
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The report as text: a summary and a table of the stages."""
        out = [
            f"{self.rows:,} rows in {self.seconds:.3f} s: {self.rows_per_s:,.0f} rows/s, "
            f"{self.gb_per_s_in:.2f} GB/s in, {self.gb_per_s_out:.2f} GB/s out",
            f"on {', '.join(f'{name} ({hardware})' for name, hardware in self.devices.items())}",
            f"{self.kernel}; precision {self.precision}, ran as {self.runs_as}",
            f"chunks: {self.chunks} of up to {self.chunk_rows} rows; streams: {self.num_streams}; {self.copy_workers}, "
            f"{self.pinned_bytes / 2**20:.0f} MiB pinned",
            f"{'stage':<8}{'count':>8}{'GB':>10}{'busy s':>10}{'busy':>8}",
        ]
        for name, stage in self.stages.items():
            out.append(
                f"{name:<8}{stage.count:>8}{stage.bytes / 1e9:>10.2f}{stage.busy_s:>10.3f}{stage.busy_share:>8.0%}"
            )
        if self.bound != "none":
            out.append(f"bound by {self.bound}: busy {self.stages[self.bound].busy_share:.0%} of the time")
        if self.kernel_hidden_share is not None:
            out.append(f"{self.kernel_hidden_share:.0%} of the kernels' time was hidden behind copies")
        return out


def stage_stats(recorders: Sequence[Recorder], seconds: float) -> dict[str, StageStats]:
    """Totals of each stage over the devices' records."""
    stages = {}
    for name in STAGES:
        totals = [recorder.totals[name] for recorder in recorders]
        busy_s = sum(total.busy_s for total in totals)
        share = busy_s / (seconds * len(recorders)) if seconds > 0 and recorders else 0.0
        stages[name] = StageStats(
            sum(total.count for total in totals), sum(total.bytes for total in totals), busy_s, share
        )
    return stages


def bound(stages: dict[str, StageStats]) -> str:
    """The stage with the largest busy share."""
    busiest = max(stages, key=lambda name: stages[name].busy_share)
    return busiest if stages[busiest].count else "none"


def hidden_share(recorders: Sequence[Recorder], stage: str, behind: tuple[str, ...]) -> float | None:
    """The mean over the devices of the share of `stage`'s busy time hidden behind the stages `behind`."""
    shares = [share for recorder in recorders if (share := recorder.hidden_share(stage, behind)) is not None]
    return sum(shares) / len(shares) if shares else None
