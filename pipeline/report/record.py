"""What one run leaves behind: all that its reports are made from, whatever becomes of its devices meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.config import Staging
from pipeline.instrument import Ceilings, Recorder
from pipeline.report.timeline import Timeline, from_recorders

_NEARLY_ALL = 0.99


@dataclass(frozen=True)
class Ends:
    """Where a run's rows come from and go to, as far as ceilings and advice depend on it."""

    source: str = "memory"  # or "file", "batches", "device"
    target: str = "memory"  # or "fresh memory", "file", "device"


@dataclass(frozen=True)
class Parts:
    """The seconds of a run, in the order in which they pass. Every one of them belongs to one part.

    Set-up lasts from the call until the first row begins to move: devices, kernels, weights and rings are made ready,
    source and sink are opened, an iterable gives its first batch, the machine may be measured. Then rows move until the
    last one is stored. Finishing lasts until the result is complete: a file is synced and gets its name.
    """

    setup_s: float
    run_s: float  # rows move
    finish_s: float
    room_s: float = 0.0  # of set-up: the room of an output in memory was waited for when all else was ready

    @property
    def seconds(self) -> float:
        """From the call until the result is complete."""
        return self.setup_s + self.run_s + self.finish_s

    def text(self) -> str:
        """The parts in one short line; "" where nearly all of the time rows moved."""
        if self.run_s >= _NEARLY_ALL * self.seconds:
            return ""
        return f"set-up {self.setup_s:.3f} s, rows moved in {self.run_s:.3f} s, finishing {self.finish_s:.3f} s"


@dataclass(frozen=True)
class Setup:
    """How a run was made: its layer, its devices, its ends, and the options in force."""

    devices: dict[str, str]  # that took part, with what hardware they are
    ceilings: dict[str, Ceilings]  # those devices have some whose buses were measured
    kernel: str
    precision: str  # that was asked for
    runs_as: str  # that ran
    in_features: int
    out_features: int
    in_row_bytes: int  # in the source's element type
    out_row_bytes: int  # in the result's element type
    wire: str  # the element type that crossed the bus on the way in
    chunk_rows: int
    num_streams: int
    copy_workers: str
    staging: Staging
    pinned_bytes: int
    source: str
    ends: Ends = field(default_factory=Ends)


@dataclass(frozen=True)
class Record:
    """One run: what it moved and when, in seconds of its first device's clock."""

    setup: Setup
    rows: int
    start_s: float  # when the first row began to move
    parts: Parts
    exact_rows: int  # computed in exact fp32 because of their range
    recorders: Sequence[Recorder]

    def timeline(self) -> Timeline:
        return from_recorders(self.recorders, self.start_s, self.setup.devices)
